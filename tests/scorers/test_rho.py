"""rho, pvi and loss_change: arithmetic of losses, against the formulas written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.scorers.loss_change import LossChange
from curate.scorers.protocol import Signal
from curate.scorers.pvi import PVI
from curate.scorers.rho import RHO

LOSS, REFERENCE, NULL = Signal("loss"), Signal("reference_loss"), Signal("null_loss")
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


def drawn(seed: int, k: int, b: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses at K checkpoints, and at R references, which no checkpoint changes."""
    draw = torch.Generator().manual_seed(seed)
    loss = torch.rand(k, b, generator=draw, dtype=torch.float64)
    at = torch.rand(b, r, generator=draw, dtype=torch.float64)
    return loss, at.expand(k, b, r)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), sizes)
def test_each_is_the_difference_of_two_means(seed: int, size: tuple[int, int, int]) -> None:
    loss, other = drawn(seed, *size)
    weights = torch.full((size[0],), 1 / size[0], dtype=torch.float64)
    rho = RHO().reduce({LOSS: loss, REFERENCE: other}, weights)
    change = LossChange("reference").reduce({LOSS: loss, REFERENCE: other}, weights)
    pvi = PVI().reduce({LOSS: loss, NULL: other}, weights)
    for row in range(size[1]):
        of_model = sum(loss[:, row].tolist()) / size[0]
        of_reference = sum(other[0, row].tolist()) / size[2]
        assert rho[row].item() == pytest.approx(of_model - of_reference, abs=1e-12)
        assert change[row].item() == pytest.approx(of_reference - of_model, abs=1e-12)
        in_bits = (of_reference - of_model) / math.log(2)
        assert pvi[row].item() == pytest.approx(in_bits, abs=1e-12)


def test_pvi_of_the_probabilities_themselves() -> None:
    """f[x](y) = 1/2 and f[∅](y) = 1/8: the input gives two bits; the other way round, minus two."""
    half, eighth = math.log(2), math.log(8)
    loss = torch.tensor([[half, eighth]], dtype=torch.float64)
    null = torch.tensor([[[eighth], [half]]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(
        PVI().reduce({LOSS: loss, NULL: null}, one), torch.tensor([2.0, -2.0]).double()
    )


def test_without_a_reference_loss_change_is_first_less_last() -> None:
    loss = torch.tensor([[3.0, 1.0], [9.0, 9.0], [0.5, 2.0]], dtype=torch.float64)
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    for since in ("first", "auto"):
        found = LossChange(since).reduce({LOSS: loss}, weights)
        torch.testing.assert_close(found, torch.tensor([2.5, -1.0]).double())


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="since is one of reference, first, auto, not 'last'"):
        LossChange("last")
