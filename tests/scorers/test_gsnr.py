"""Signal-to-noise of a row's gradients over checkpoints: closed forms, and plain autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.gradient_spread import GradientSpread, vector_of
from curate.scorers.gradient_vectors import EXACT, Whole, readout
from curate.scorers.gsnr import MOST
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.readouts import Projection
from curate.scorers.registry import make_scorers
from curate.scorers.run_state import RunState, of_one_checkpoint

NEEDS = sorted(make_scorers("gsnr")["gsnr"].needs)
VECTOR = vector_of(NEEDS[0])


def gsnr(gradients: Tensor, request: str = "gsnr") -> Tensor:
    """Return the score of gradients [K, B, P], taken in one by one."""
    (scorer,) = make_scorers(request).values()
    state = GradientSpread(sorted(scorer.needs))
    (vector,) = {vector_of(s) for s in scorer.needs}
    for k, x in enumerate(gradients, start=1):
        found = state.take({vector: x}, k == len(gradients))
    weights = torch.full((len(gradients),), 1 / len(gradients), dtype=torch.float64)
    return scorer.reduce({s: x.double()[None] for s, x in found.items()}, weights)


def brute(gradients: Tensor) -> Tensor:
    """Return ‖mean‖² / mean ‖g − mean‖² as it is written."""
    mean = gradients.mean(0)
    return mean.square().sum(1) / (gradients - mean).square().sum(2).mean(0)


def test_a_case_worked_by_hand() -> None:
    """(1, 0) and (3, 2): mean (2, 1), 5; deviations (1, 1) both, 2."""
    gradients = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]], dtype=torch.float64)
    assert gsnr(gradients).item() == 2.5


def test_gradients_that_do_not_vary_have_the_most_and_none_have_nothing() -> None:
    steady = torch.tensor([1.0, 2.0, 3.0]).expand(4, 1, 3)
    assert gsnr(steady).item() == MOST
    assert gsnr(torch.zeros(4, 1, 3)).item() == 0.0
    opposite = torch.stack([steady[0], -steady[0]])
    assert gsnr(opposite).item() == 0.0


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(2, 6), st.floats(1e-6, 1e6), st.booleans())
def test_invariances(seed: int, checkpoints: int, scale: float, is_wide: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    spread = 1.0 if is_wide else 1e-3
    x = torch.randn(1, 5, 7, generator=draw, dtype=torch.float64) + spread * torch.randn(
        checkpoints, 5, 7, generator=draw, dtype=torch.float64
    )
    want, close = brute(x).clamp(max=MOST), {"rtol": 1e-8, "atol": 0.0}  # float64
    torch.testing.assert_close(gsnr(x), want, **close)
    torch.testing.assert_close(gsnr(scale * x), want, **close)
    order = torch.randperm(checkpoints, generator=draw)
    torch.testing.assert_close(gsnr(x[order]), want, **close)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=draw, dtype=torch.float64)).Q
    torch.testing.assert_close(gsnr(x @ turn), want, **close)


def test_signal_and_noise_have_the_means_that_statistics_say() -> None:
    """With independent noise of variance s² per entry over P entries and K checkpoints,
    E‖mean‖² = ‖m‖² + P s² / K and E noise = (1 − 1/K) P s²."""
    rows, k, p, s = 4000, 5, 20, 0.5
    draw = torch.Generator().manual_seed(1)
    m = torch.full((p,), 0.3, dtype=torch.float64)
    state = GradientSpread(NEEDS)
    for last in (False,) * (k - 1) + (True,):
        x = m + s * torch.randn(rows, p, generator=draw, dtype=torch.float64)
        found = state.take({VECTOR: x}, last)
    signal, noise = (
        next(found[n].mean().item() for n in NEEDS if n.kind == kind)
        for kind in ("grad_signal", "grad_noise")
    )
    # Standard errors of the means over 4000 rows are below one percent.
    assert signal == pytest.approx(p * 0.09 + p * s * s / k, rel=0.03)
    assert noise == pytest.approx((1 - 1 / k) * p * s * s, rel=0.03)


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)


def models(count: int, width: int = 8) -> list[nn.Module]:
    found: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double())
    return found


def truth(nets: list[nn.Module], batch: Batch, names: tuple[str, ...] | None = None) -> Tensor:
    """Return gradients [K, B, P] by plain autograd, row by row."""
    found = []
    for net in nets:
        params = [p for n, p in net.named_parameters() if names is None or n in names]
        rows = []
        for i in range(batch.rows):
            loss = nn.functional.cross_entropy(
                net(batch.inputs["x"][i : i + 1]), batch.targets[i : i + 1]
            )
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
        found.append(torch.stack(rows))
    return torch.stack(found)


def through_the_engine(nets: list[nn.Module], batch: Batch, request: str) -> Tensor:
    (scorer,) = make_scorers(request).values()
    state = RunState(sorted(scorer.needs))
    for k, net in enumerate(nets, start=1):
        reading = Engine(net, outputs, of_one_checkpoint(scorer.needs))(batch)
        found = state.take(reading, k == len(nets))
    weights = torch.ones(len(nets), dtype=torch.float64) / len(nets)
    return scorer.reduce({s: found[s][None] for s in scorer.needs}, weights)


@pytest.mark.parametrize(
    ("request_", "names"),
    [("gsnr", None), ("gsnr(params=head)", ("2.weight", "2.bias")), ("gsnr(sketch=0)", None)],
)
def test_short_gradients_are_exact(request_: str, names: tuple[str, ...] | None) -> None:
    nets, draw = models(3), torch.Generator().manual_seed(5)
    x = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    batch = Batch({"x": x}, torch.arange(9) % 3, 9)
    found = through_the_engine(nets, batch, request_)
    # Both in float64.
    torch.testing.assert_close(found, brute(truth(nets, batch, names)), rtol=1e-9, atol=0.0)


def test_sketches_are_as_good_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relative error stays within what the bound says: twice sqrt(2 / k) for one standard
    deviation; four of them over 24 rows."""
    monkeypatch.setattr("curate.scorers.gradient_vectors.EXACT", 0)
    nets, draw = models(3, width=64), torch.Generator().manual_seed(5)
    x = torch.randn(24, 6, generator=draw, dtype=torch.float64)
    batch = Batch({"x": x}, torch.arange(24) % 3, 24)
    want = brute(truth(nets, batch))
    found = through_the_engine(nets, batch, "gsnr(sketch=512)")
    error = (found / want).log().abs()
    assert 0 < error.max() < 4 * 2 * math.sqrt(2 / 512)
    assert error.square().mean().sqrt() < 2 * math.sqrt(2 / 512)


def test_the_map_follows_from_the_number_of_parameters() -> None:
    assert readout(4096, EXACT) == Whole() and readout(0, 10 * EXACT) == Whole()
    assert readout(4096, EXACT + 1) == Projection(0, 4096, is_sparse=True)
    assert readout(100, EXACT + 1) == Projection(0, 100, is_sparse=False)
    assert readout(2 * EXACT, EXACT + 1) == Whole()  # no longer than the sketch


def test_runs_follow_one_another() -> None:
    x, state = torch.randn(2, 4, 5, dtype=torch.float64), GradientSpread(NEEDS)
    for _ in range(2):
        for k in range(2):
            found = state.take({VECTOR: x[k], Signal("loss"): x[k, :, 0]}, k == 1)
    noise = next(s for s in NEEDS if s.kind == "grad_noise")
    want = (x - x.mean(0)).square().sum(2).mean(0)
    torch.testing.assert_close(found[noise], want)
    assert torch.equal(found[Signal("loss")], x[1, :, 0])


@pytest.mark.parametrize("value", ["-1", "0.5", "True"])
def test_what_is_no_size_is_refused(value: str) -> None:
    # A number of the wrong type is refused by the annotation where types are checked.
    with pytest.raises((ValueError, TypeError), match=r"number of dimensions|Type-check error"):
        make_scorers(f"gsnr(sketch={value})")
