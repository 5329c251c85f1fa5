"""Norms, sketches, projections and dots of factored gradients against the gradients themselves."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.kernels import grad_norm, summation
from curate.kernels.dot import grad_dot, grad_dot_matrix, grad_dot_rows
from curate.kernels.embedding import embedding_cross, embedding_sq_norm
from curate.kernels.grad_norm import (
    cheaper_form,
    grad_sq_norm,
    grad_sq_norm_gram,
    grad_sq_norm_packed,
    grad_sq_norm_tiles,
)
from curate.kernels.projection import project, project_matrix, project_rows
from curate.kernels.rademacher import stream_key
from curate.kernels.sketch import sketch, sketch_matrix, sketch_rows, sketch_vector

KEYS = stream_key(3, "w", "rows"), stream_key(3, "w", "columns")
WHOLE = stream_key(3, "w", "whole")

shapes = st.tuples(
    st.integers(1, 4),
    st.sampled_from([1, 1, 3]),
    st.sampled_from([1, 2, 5, 17]),
    st.sampled_from([1, 3, 8, 33]),
    st.sampled_from([1, 2, 7, 40]),
)


def _factors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
    s, g, t, o, i = shape
    gen = torch.Generator().manual_seed(sum(shape))
    left = torch.randn(s, g, t, o, generator=gen, dtype=torch.float64).to(dtype)
    right = torch.randn(s, g, t, i, generator=gen, dtype=torch.float64).to(dtype)
    return left, right


def _whole(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.einsum("sgto,sgti->sgoi", left.double(), right.double()).flatten(1, 2)


@settings(deadline=None, max_examples=25)
@given(shape=shapes, scratch=st.sampled_from([60, 1 << 22]))
def test_every_form_is_that_of_the_whole_gradient(shape, scratch) -> None:
    left, right = _factors(shape)
    grad = _whole(left, right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summation, "SCRATCH", scratch)  # tiles of a few rows, all at once
        for form in (grad_sq_norm, grad_sq_norm_gram, grad_sq_norm_tiles):
            torch.testing.assert_close(form(left, right), grad.square().sum((1, 2)))
        v = torch.randn(2, *grad.shape[1:], dtype=torch.float64)
        dots = torch.einsum("sri,mri->sm", grad, v)
        torch.testing.assert_close(grad_dot(left, right, v), dots)
        torch.testing.assert_close(grad_dot_matrix(grad, v), dots)
        torch.testing.assert_close(
            sketch(left, right, KEYS, (5, 3)), sketch_matrix(grad, KEYS, (5, 3))
        )
        torch.testing.assert_close(project(left, right, WHOLE, 37), project_matrix(grad, WHOLE, 37))


@settings(deadline=None, max_examples=20)
@given(
    s=st.integers(1, 4), t=st.sampled_from([1, 2, 9]), v=st.sampled_from([1, 4, 30]),
    d=st.sampled_from([1, 6]), u=st.sampled_from([1, 5]), scratch=st.sampled_from([20, 1 << 22]),
)  # fmt: skip
def test_tables_are_matrices_with_unit_vectors(s, t, v, d, u, scratch) -> None:
    gen = torch.Generator().manual_seed(s + 10 * t + 100 * v)
    index = torch.randint(0, v, (s, t), generator=gen)
    right = torch.randn(s, t, d, generator=gen, dtype=torch.float64)
    other = torch.randn(s, u, v, generator=gen, dtype=torch.float64)
    hidden = torch.randn(s, u, d, generator=gen, dtype=torch.float64)
    unit = torch.nn.functional.one_hot(index, v).double()
    grad = unit.mT @ right
    directions = torch.randn(2, v, d, generator=gen, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summation, "SCRATCH", scratch)
        torch.testing.assert_close(embedding_sq_norm(index, right), grad.square().sum((1, 2)))
        torch.testing.assert_close(
            embedding_cross(index, right, other, hidden), (grad * (other.mT @ hidden)).sum((1, 2))
        )
        torch.testing.assert_close(
            grad_dot_rows(index, right, directions), grad_dot_matrix(grad, directions)
        )
        torch.testing.assert_close(
            sketch_rows(index, right, KEYS, (4, 4)), sketch_matrix(grad, KEYS, (4, 4))
        )
        torch.testing.assert_close(
            project_rows(index, right, WHOLE, 40), project_matrix(grad, WHOLE, 40)
        )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A part of a block, two blocks with a rest (16, 32 and 64 tokens each), many columns, aligned rows,
# one token, one number; groups.
GRAM_SHAPES = [
    (3, 2, 5, 7, 9), (2, 1, 33, 40, 3), (1, 1, 70, 16, 32), (2, 1, 17, 130, 1), (9, 2, 1, 70, 300),
    (1, 1, 1, 1, 1),
]  # fmt: skip


def _check(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Compare with float64. Whichever way a Gram sum is taken, its terms' absolute values come to
    at most (sum_t |left_t| |right_t|)^2 in each group; a rounding is 2^-24 of a term at most, and
    blocks are added in trees: 32 of them on the way of a term are not reached."""
    grad = torch.einsum("sgto,sgti->sgoi", left.double(), right.double())
    terms = (left.double().norm(dim=3) * right.double().norm(dim=3)).sum(2).square().sum(1)
    assert got.dtype == torch.float32 and (got >= 0).all()
    assert ((got.double() - grad.square().sum((1, 2, 3))).abs() <= 32 * 2**-24 * terms).all()


@pytest.mark.parametrize("shape", GRAM_SHAPES)
@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), (DTYPES[1], DTYPES[0])])
def test_the_gram_form_is_the_norm_of_the_whole_gradient(shape, dtypes, device, poisoned) -> None:
    left, right = (x.to(device, d) for x, d in zip(_factors(shape), dtypes, strict=True))
    _check(grad_sq_norm_gram(left, right), left, right)
    _check(grad_sq_norm(left, right), left, right)


sides = st.sampled_from([1, 2, 15, 16, 31, 32, 63, 64, 65, 97])


@pytest.mark.slow
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 70), sides, sides),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_the_gram_form_at_any_shape_and_dtype(device, shape, dtypes) -> None:
    left, right = (x.to(device, d) for x, d in zip(_factors(shape), dtypes, strict=True))
    _check(grad_sq_norm_gram(left, right), left, right)


@pytest.mark.parametrize("t", [64, 65, 130, 257])
def test_halving_the_diagonal_loses_no_block(t) -> None:
    """The CPU's form multiplies what symmetry leaves, at every depth of halving."""
    left, right = _factors((2, 2, t, 9, 4))
    torch.testing.assert_close(
        grad_sq_norm_gram(left, right), _whole(left, right).square().sum((1, 2))
    )


def test_pairs_of_blocks_are_found_from_their_number() -> None:
    """p -> (a, b) as the kernel finds it in float32, to 2^21 tokens in blocks of 128."""
    a = torch.arange(1 << 14, dtype=torch.int32)
    for b in (torch.zeros_like(a), a):
        p = a * (a + 1) // 2 + b
        found = ((torch.sqrt((8 * p + 1).float()) - 1) * 0.5).int()
        found = torch.where(found * (found + 1) // 2 > p, found - 1, found)
        found = torch.where((found + 1) * (found + 2) // 2 <= p, found + 1, found)
        assert torch.equal(found, a)


@pytest.mark.parametrize("t", [1, 5, 40])
def test_a_sample_has_the_same_bits_in_any_batch(t, backend, device) -> None:
    if backend == "torch":
        pytest.skip("libraries choose their order by the size of the batch")
    left, right = (x.to(device, torch.bfloat16) for x in _factors((5, 1, t, 9, 20)))
    together = grad_sq_norm_gram(left, right)
    order = torch.tensor([2, 0, 4, 3, 1], device=device)
    assert torch.equal(grad_sq_norm_gram(left[order], right[order]), together[order])
    assert torch.equal(grad_sq_norm_gram(left[1:2], right[1:2]), together[1:2])


@pytest.mark.parametrize("form", ["gram", "tiles"])
def test_packed_samples_are_those_alone(form, device, poisoned, monkeypatch) -> None:
    """In whichever form, at lengths of zero, one and several blocks."""
    monkeypatch.setattr(grad_norm, "cheaper_form", lambda *_: form)
    lengths = [3, 0, 40, 1, 3]
    left, right = torch.randn(47, 5, device=device), torch.randn(47, 20, device=device)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    alone = [
        grad_sq_norm(left[a:b][None, None], right[a:b][None, None])
        for a, b in itertools.pairwise(starts.tolist())
    ]
    got = grad_sq_norm_packed(left, right, starts)
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-5, atol=0)
    assert got[1] == 0


def test_a_packed_sample_has_the_same_bits_beside_others(backend, device) -> None:
    """Its form and its blocks follow from its own length, not from the longest one's."""
    if backend == "torch":
        pytest.skip("libraries choose their order by the size of the batch")
    lengths = [5, 30, 40, 70]
    left, right = torch.randn(145, 48, device=device), torch.randn(145, 64, device=device)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    whole = grad_sq_norm_packed(left, right, starts)
    for row, (a, b) in enumerate(itertools.pairwise(starts.tolist())):
        alone = torch.tensor([0, b - a], device=device)
        assert torch.equal(grad_sq_norm_packed(left[a:b], right[a:b], alone), whole[row : row + 1])
    assert {cheaper_form(t, 48, 64, device.type) for t in lengths} == {"gram", "tiles"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [grad_sq_norm_gram, grad_sq_norm_tiles])
def test_low_precision_sums_in_float32(dtype, form, device) -> None:
    """Sums of thousands of products that overflow float16 keep float32's accuracy."""
    left, right = (x.to(device) for x in _factors((2, 1, 40, 20, 30), dtype))
    left = left * 300
    truth = _whole(left, right).square().sum((1, 2))
    got = form(left, right)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=0)


def test_large_matrices_keep_float32_accuracy() -> None:
    """One BLAS dot product over the 4 million elements would be 1e-4 off and more."""
    left, right = _factors((1, 1, 2, 4000, 1000), torch.float32)
    truth = _whole(left, right).square().sum((1, 2))
    torch.testing.assert_close(grad_sq_norm_tiles(left, right).double(), truth, rtol=5e-6, atol=0)


def test_a_gram_sum_that_cancels_is_not_negative(device) -> None:
    x = torch.randn(64, 1, 2, 9, device=device)
    left = torch.cat([x, x], 2)
    right = torch.cat([x, -x], 2)  # the gradient is exactly 0
    assert (grad_sq_norm_gram(left, right) >= 0).all()


@pytest.mark.parametrize("shape", [(0, 1, 3, 4, 5), (2, 1, 0, 4, 5), (0, 1, 1, 2, 2)])
def test_no_samples_or_tokens_are_zeros(shape, device) -> None:
    left, right = (x.to(device, torch.float32) for x in _factors(shape))
    for form in (grad_sq_norm, grad_sq_norm_gram, grad_sq_norm_tiles):
        assert torch.equal(form(left, right), torch.zeros(shape[0], device=device))


def test_one_token_is_a_product_of_norms() -> None:
    left, right = _factors((5, 1, 1, 4, 6))
    norms = left.square().sum((1, 2, 3)) * right.square().sum((1, 2, 3))
    torch.testing.assert_close(grad_sq_norm(left, right), norms)


def test_the_form_follows_the_shape() -> None:
    assert cheaper_form(128, 768, 768) == "gram"
    assert cheaper_form(4096, 768, 768) == "tiles"
    assert cheaper_form(1024, 64, 576) == "tiles"
    assert cheaper_form(1, 10, 10) == cheaper_form(1, 10, 10, "cuda") == "gram"
    assert cheaper_form(128, 768, 768, "cuda") == "gram"
    assert cheaper_form(4096, 768, 768, "cuda") == "tiles"


def test_non_contiguous_factors() -> None:
    left, right = _factors((3, 2, 5, 4, 6))
    turned = left.mT.contiguous().mT, right.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned[0].is_contiguous() and not turned[1].is_contiguous()
    torch.testing.assert_close(grad_sq_norm(*turned), grad_sq_norm(left, right))
    torch.testing.assert_close(sketch(*turned, KEYS, (4, 4)), sketch(left, right, KEYS, (4, 4)))


@pytest.mark.parametrize("kind", ["two-sided", "vector", "one-sided"])
def test_inner_products_are_kept_in_expectation(kind) -> None:
    """Over 200 seeds the mean lies within 5 standard errors, whatever the shape of the matrix."""
    gen = torch.Generator().manual_seed(0)
    for o, i in [(3, 5), (11, 4)]:
        pair = torch.randn(2, o, i, generator=gen, dtype=torch.float64)
        true = (pair[0] * pair[1]).sum()
        products = []
        for seed in range(200):
            sides = [stream_key(seed, "w", side) for side in ("rows", "columns", "whole")]
            if kind == "two-sided":
                out = sketch_matrix(pair, (sides[0], sides[1]), (4, 4))
            elif kind == "vector":
                out = sketch_vector(pair.flatten(1), sides[2], 16)
            else:
                out = project_matrix(pair, sides[2], 16)
            products.append(out[0] @ out[1])
        x = torch.stack(products)
        assert (x.mean() - true).abs() < 5 * x.std() / math.sqrt(len(x))


def test_a_sketch_of_ones_has_the_parity_of_their_number() -> None:
    ones = torch.ones(1, 7, dtype=torch.float64)
    sums = sketch_vector(ones, WHOLE, 64) * 8
    assert torch.equal(sums.remainder(2), torch.ones_like(sums)) and sums.abs().max() <= 7
