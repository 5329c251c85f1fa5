"""Streaming moments against torch's own, over checkpoints kept whole, in float64."""

import math

import pytest
import torch
from torch import Tensor

from curate.kernels.moments import finish_moments, update_moments

# One entry; a prime; one below, at and above a block of 1024.
SHAPES = [(1, 1), (3, 7), (2, 1023), (2, 1024), (1, 1025)]


def _checkpoints(shape, k: int, device, offset: float = 0.0, dtype=torch.float32) -> Tensor:
    torch.manual_seed(k)
    return (torch.randn(k, *shape, dtype=torch.float64) + offset).to(device, dtype)


def _spread(xs: Tensor, spread: str, ddof: int) -> Tensor:
    """Take every checkpoint but the last into the moments, and finish with that."""
    mean, m2 = (torch.empty(xs.shape[1:], device=xs.device) for _ in range(2))
    if xs.dtype == torch.float64:
        mean, m2 = mean.double(), m2.double()
    for count, x in enumerate(xs[:-1], start=1):
        update_moments(mean, m2, x, count)
    before = mean.clone(), m2.clone()
    out = finish_moments(mean, m2, xs[-1], len(xs), spread, ddof)
    assert all(torch.equal(a, b) or len(xs) == 1 for a, b in zip((mean, m2), before, strict=True))
    return out


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("spread", ["std", "var"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_spread_is_torchs(shape, spread, ddof, backend, device, poisoned) -> None:
    xs = _checkpoints(shape, 5, device)
    want = getattr(torch, spread)(xs.double(), 0, correction=ddof).mean(1)
    # Five updates of a few roundings each, on deviations of about 1: 32 eps.
    torch.testing.assert_close(
        _spread(xs, spread, ddof).double(), want, rtol=32 * 2.0**-23, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_in_16_bits_are_kept_in_float32(dtype, backend, device, poisoned) -> None:
    xs = _checkpoints((2, 33), 4, device, dtype=dtype)
    got = _spread(xs, "std", 0)
    assert got.dtype == torch.float32
    want = xs.double().std(0, correction=0).mean(1)
    torch.testing.assert_close(got.double(), want, rtol=32 * 2.0**-23, atol=1e-9)


@pytest.mark.parametrize("k", [2, 10])
def test_a_mean_far_from_zero_leaves_the_spread(k, backend, device) -> None:
    """Mean 1e4, deviation 1: the difference of E[x^2] and E[x]^2 would keep no digit of it.

    The running mean is rounded to 1e4 * 2^-24 = 6e-4 at each of k checkpoints; the deviations
    average that out over entries and samples only in part.
    """
    xs = _checkpoints((2, 500), k, device, offset=1e4)
    want = xs.double().std(0, correction=0).mean(1)
    torch.testing.assert_close(_spread(xs, "std", 0).double(), want, rtol=k * 6e-4, atol=0)
    naive = (xs.square().mean(0) - xs.mean(0).square()).clamp(min=0).sqrt().mean(1)
    assert (naive.double() - want).abs().min() > 0.1, "the test would not notice"


def test_the_moments_are_the_textbooks(backend, device) -> None:
    xs = _checkpoints((3, 40), 6, device)
    mean, m2 = torch.full((2, 3, 40), torch.nan, device=device)
    for count, x in enumerate(xs, start=1):
        update_moments(mean, m2, x, count)
    torch.testing.assert_close(mean.double(), xs.double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(m2.double(), 6 * xs.double().var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("spread", "want"), [("std", 1.1153551), ("var", 1.3333333)])
def test_three_checkpoints_worked_by_hand(spread, want, backend, device) -> None:
    """(1, 0), (3, 0), (2, 3): variances 2/3 and 2."""
    xs = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[2.0, 3.0]]], device=device)
    assert math.isclose(_spread(xs, spread, 0).item(), want, rel_tol=1e-6)


def test_equal_checkpoints_have_no_spread(backend, device) -> None:
    x = _checkpoints((2, 9), 1, device)
    for k in (1, 4):
        assert torch.equal(_spread(x.expand(k, 2, 9), "std", 0), torch.zeros(2, device=device))


def test_strides_do_not_matter_and_a_sample_has_the_same_bits_alone(backend, device) -> None:
    xs = _checkpoints((6, 60), 3, device)
    cut = xs[:, ::2, 5:35:3]
    whole = _spread(cut, "std", 1)
    assert torch.equal(whole, _spread(cut.contiguous(), "std", 1))
    mean, m2 = torch.zeros(2, 20, 6, device=device).mT
    for count, x in enumerate(xs[:2, :, :20], start=1):
        update_moments(mean, m2, x, count)
    torch.testing.assert_close(mean, xs[:2, :, :20].mean(0))
    if backend == "triton":
        for i in range(3):
            assert torch.equal(_spread(cut[:, i : i + 1], "std", 1), whole[i : i + 1])


def test_float64_stays_float64() -> None:
    xs = _checkpoints((2, 9), 4, "cpu", dtype=torch.float64)
    torch.testing.assert_close(_spread(xs, "var", 1), xs.var(0).mean(1))


@pytest.mark.parametrize(("count", "ddof"), [(0, 0), (1, 1), (2, 2)])
def test_too_few_checkpoints_are_an_error(count, ddof) -> None:
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"{count} checkpoints with ddof={ddof}"):
        finish_moments(x, x, x, count, "std", ddof)
    with pytest.raises(ValueError, match="got 0"):
        update_moments(x, x, x, 0)


def test_no_samples_give_nothing(backend, device) -> None:
    x = torch.ones(0, 5, device=device)
    update_moments(x.clone(), x.clone(), x, 2)
    assert finish_moments(x, x, x, 2).shape == (0,)
    empty = torch.ones(2, 0, device=device)
    assert finish_moments(empty, empty, empty, 2).isnan().all()
