"""Sums over tiles of each sample's gradient against the gradient itself, in float64."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels import grad_tiles, summation
from curate.kernels.dot import grad_dot_product
from curate.kernels.grad_norm import grad_sq_norm_gram, grad_sq_norm_packed
from curate.kernels.grad_tiles import (
    grad_sq_norm_tiles,
    grad_tile_sums,
    grad_tile_sums_packed,
    grad_weighted_sq_norm,
    rotated_sq_norm,
)

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# One and two tiles on each side, with a rest; whole tiles; one entry; groups; aligned and not.
SHAPES = [
    (3, 1, 5, 7, 9),
    (2, 2, 17, 33, 20),
    (1, 1, 3, 65, 63),
    (1, 1, 1, 1, 1),
    (1, 1, 16, 80, 64),
]


def _factors(shape, dtypes, device, scale=1.0) -> tuple[Tensor, Tensor]:
    s, g, t, o, i = shape
    left, right = torch.randn(s, g, t, o) * scale, torch.randn(s, g, t, i) * scale
    return left.to(device, dtypes[0]), right.to(device, dtypes[1])


def _whole(left: Tensor, right: Tensor) -> Tensor:
    grad = torch.einsum("sgto,sgti->sgoi", left.double(), right.double())
    return grad.flatten(1, 2)


def _check(got: Tensor, truth: Tensor, terms: Tensor) -> None:
    """Compare with the truth; `terms` is what the absolute values of what is added come to.

    Every product and addition rounds by at most 2^-24 of what it makes. Entries of G are sums of
    t <= 40 terms, blocks are added in trees: 32 roundings on the way are not reached by far.
    """
    assert got.dtype == torch.float32
    assert ((got.double() - truth).abs() <= 32 * 2**-24 * terms).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(HALVES[0], DTYPES[0]), HALVES])
def test_each_sum_is_that_of_the_whole_gradient(shape, dtypes, device, poisoned) -> None:
    left, right = _factors(shape, dtypes, device)
    grad = _whole(left, right)
    size = left.double().abs().mT @ right.double().abs()  # what the entries' terms come to
    size = size.flatten(1, 2)
    weight = torch.randn(grad.shape[1:], device=device)
    v = torch.randn(3, *grad.shape[1:], device=device)
    sums = grad_tile_sums(left, right, square=True, weight=weight, directions=v)
    _check(sums.square, grad.square().sum((1, 2)), size.square().sum((1, 2)))
    weighted, terms = weight * grad.square(), weight.abs() * size.square()
    _check(sums.weighted, weighted.sum((1, 2)), terms.sum((1, 2)))
    terms = torch.einsum("sri,mri->sm", size, v.abs().double())
    _check(sums.dots, torch.einsum("sri,mri->sm", grad, v.double()), terms)
    assert torch.equal(grad_sq_norm_tiles(left, right), sums.square)
    assert torch.equal(grad_weighted_sq_norm(left, right, weight), sums.weighted)
    assert torch.equal(grad_tile_sums(left, right, directions=v).dots, sums.dots)


sides = st.sampled_from([1, 2, 15, 16, 31, 63, 64, 65, 97])


@pytest.mark.slow
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 40), sides, sides),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_any_shape_and_dtype(device, shape, dtypes) -> None:
    left, right = _factors(shape, dtypes, device)
    grad, size = _whole(left, right), (left.double().abs().mT @ right.double().abs()).flatten(1, 2)
    sums = grad_tile_sums(left, right, square=True, weight=torch.ones_like(grad[0]))
    for got in (sums.square, sums.weighted):
        _check(got, grad.square().sum((1, 2)), size.square().sum((1, 2)))


@pytest.mark.parametrize("scratch", [60, 1 << 22])
def test_scratch_bounds_the_entries_made_at_a_time(scratch, monkeypatch) -> None:
    monkeypatch.setattr(summation, "SCRATCH", scratch)
    left, right = (x.double() for x in _factors((5, 2, 7, 33, 8), DTYPES[:2], "cpu"))
    grad = _whole(left, right)
    v = torch.randn(2, *grad.shape[1:], dtype=torch.float64)
    sums = grad_tile_sums(left, right, square=True, weight=v[0], directions=v)
    assert sums.square.dtype == torch.float64
    torch.testing.assert_close(sums.square, grad.square().sum((1, 2)))
    torch.testing.assert_close(sums.weighted, (v[0] * grad.square()).sum((1, 2)))
    torch.testing.assert_close(sums.dots, torch.einsum("sri,mri->sm", grad, v))


@pytest.mark.parametrize("shape", [(0, 1, 3, 4, 5), (2, 1, 0, 4, 5)])
def test_nothing_to_add_is_zero(shape, device) -> None:
    left, right = _factors(shape, DTYPES[:2], device)
    v = torch.ones(2, 4, 5, device=device)
    sums = grad_tile_sums(left, right, square=True, weight=v[0], directions=v)
    for got, size in zip(sums, [(shape[0],), (shape[0],), (shape[0], 2)], strict=True):
        assert torch.equal(got, torch.zeros(size, device=device))
    assert grad_tile_sums(left, right, directions=v[:0]).dots.shape == (shape[0], 0)


def test_what_is_not_asked_for_is_none(device) -> None:
    left, right = _factors(SHAPES[0], DTYPES[:2], device)
    assert grad_tile_sums(left, right, square=True)[1:] == (None, None)


def test_half_factors_whose_gradient_overflows_half(device) -> None:
    """Entries of G pass 65504 and their squares 10^9: everything after the factors is float32."""
    left, right = _factors((2, 1, 5, 20, 30), (torch.float16,) * 2, device, scale=300)
    grad = _whole(left, right)
    assert grad.abs().max() > 2 * 65504
    got = grad_sq_norm_tiles(left, right)
    torch.testing.assert_close(got.double(), grad.square().sum((1, 2)), rtol=1e-6, atol=0)


def test_a_sample_has_the_same_bits_in_any_batch(backend, device) -> None:
    if backend == "torch":
        pytest.skip("libraries choose their order by the size of the batch")
    left, right = _factors((4, 1, 5, 70, 9), (torch.bfloat16,) * 2, device)
    v = torch.randn(2, 70, 9, device=device)
    together = grad_tile_sums(left, right, square=True, directions=v)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = grad_tile_sums(left[order], right[order], square=True, directions=v)
    alone = grad_tile_sums(left[1:2], right[1:2], square=True, directions=v)
    for a, b, c in zip(together, permuted, alone, strict=True):
        if a is not None:
            assert torch.equal(a[order], b) and torch.equal(a[1:2], c)


def test_partial_sums_of_few_samples_at_a_time_change_no_bit(device, monkeypatch) -> None:
    left, right = _factors((5, 1, 3, 20, 70), (torch.float32,) * 2, device)
    v = torch.randn(2, 20, 70, device=device)
    packed = left.flatten(0, 2), right.flatten(0, 2), torch.arange(0, 16, 3, device=device)

    def everything() -> list[Tensor]:
        dense = grad_tile_sums(left, right, square=True, directions=v)
        return [
            dense.square, dense.dots, grad_tile_sums_packed(*packed, square=True).square,
            grad_sq_norm_gram(left, right), grad_sq_norm_packed(*packed),
            grad_dot_product(left, right, v),
        ]  # fmt: skip

    whole = everything()
    monkeypatch.setattr(summation, "PARTIALS", 12)
    for at_once, in_parts in zip(whole, everything(), strict=True):
        if not summation.IS_INTERPRETED:
            assert torch.equal(at_once, in_parts)
        torch.testing.assert_close(at_once, in_parts)


def test_strided_factors(device) -> None:
    """Sequence-first memory is read as it lies; a broken last axis is copied."""
    left, right = _factors((3, 2, 5, 16, 32), (torch.float32,) * 2, device)
    turned = left.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3), right.mT.contiguous().mT
    assert summation.addressable(turned[0]) is turned[0] and turned[1].stride(-1) == 5
    torch.testing.assert_close(grad_sq_norm_tiles(*turned), grad_sq_norm_tiles(left, right))
    expanded = left[:1].expand(3, -1, -1, -1)
    same = grad_sq_norm_tiles(expanded, right[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(same, grad_sq_norm_tiles(left[:1], right[:1]).expand(3))


@pytest.mark.parametrize("lengths", [[3, 0, 17, 1, 3], [4, 4, 4], [0, 0], []])
def test_packed_lengths_are_padded_ones_without_the_padding(lengths, device, poisoned) -> None:
    n, s, most = sum(lengths), len(lengths), max(lengths, default=0)
    left, right = torch.randn(n, 18).to(device), torch.randn(n, 33).to(device)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    padded = torch.zeros(s, 1, most, 18, device=device), torch.zeros(s, 1, most, 33, device=device)
    for row, (a, b) in enumerate(itertools.pairwise(starts)):
        padded[0][row, 0, : b - a], padded[1][row, 0, : b - a] = left[a:b], right[a:b]
    weight, v = torch.rand(18, 33, device=device), torch.randn(2, 18, 33, device=device)
    asked = dict(square=True, weight=weight, directions=v)
    packed = grad_tile_sums_packed(left, right, starts, **asked)
    for got, want in zip(packed, grad_tile_sums(*padded, **asked), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        grad_sq_norm_packed(left, right, starts), packed.square, rtol=1e-5, atol=0
    )


def test_a_packed_sample_has_the_same_bits_beside_others(backend, device) -> None:
    if backend == "torch":
        pytest.skip("libraries choose their order by the size of the batch")
    left, right = torch.randn(24, 18).to(device), torch.randn(24, 33).to(device)
    starts = torch.tensor([0, 3, 20, 24], device=device)
    whole = grad_tile_sums_packed(left, right, starts, square=True).square
    alone = grad_tile_sums_packed(left[3:20], right[3:20], starts[1:3] - 3, square=True).square
    assert torch.equal(whole[1:2], alone)


def test_a_rotation_keeps_the_norm_and_turns_the_weight(device) -> None:
    left, right = _factors((3, 1, 5, 6, 9), (torch.float32,) * 2, device)
    grad = _whole(left, right)
    bases = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0].to(device) for n in (6, 9)]
    q, p = (b.float() for b in bases)
    weight = torch.rand(6, 9, device=device)
    norm = rotated_sq_norm(left, right, q, p, torch.ones_like(weight))
    torch.testing.assert_close(norm.double(), grad.square().sum((1, 2)), rtol=1e-5, atol=0)
    truth = (weight * (bases[0].T @ grad @ bases[1]).square()).sum((1, 2))
    got = rotated_sq_norm(left, right, q, p, weight)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


def test_a_weight_of_another_shape_is_refused() -> None:
    left, right = _factors(SHAPES[0], DTYPES[:2], "cpu")
    with pytest.raises(ValueError, match=r"weight is .* give it the matrix's shape"):
        grad_weighted_sq_norm(left, right, torch.ones(9, 7))


def test_every_tile_of_a_tall_matrix_counts_once(device, poisoned) -> None:
    """More than eight rows of tiles, the last band broken: the order skips and repeats none."""
    left, right = _factors((1, 1, 1, 32 * 9 + 1, 65), (torch.float32,) * 2, device)
    assert left.shape[3] > 8 * min(c.blocks["BLOCK_O"] for c in grad_tiles.CONFIGS[90].values())
    norms = left.double().square().sum() * right.double().square().sum()
    got = grad_sq_norm_tiles(left, right).double()
    torch.testing.assert_close(got, norms[None], rtol=1e-6, atol=0)
