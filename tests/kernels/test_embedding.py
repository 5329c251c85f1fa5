"""Gradients of table look-ups, against the whole table's gradient."""

import pytest
import torch
from torch import Tensor

from curate.kernels.embedding import embedding_cross, embedding_cross_at, embedding_sq_norm

# Samples, look-ups, features, rows of the table. Blocks are of 64 look-ups and 32 or 64 features:
# one short of a block, one beyond, runs of equal look-ups within a block, over several, all.
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 4), (2, 63, 33, 500), (2, 65, 3, 20), (1, 150, 5, 2)]


def _table(index: Tensor, right: Tensor, rows: int) -> Tensor:
    """Return G itself [s, v, d], in float64."""
    out = torch.zeros(len(index), rows, right.shape[2], dtype=torch.float64)
    for g, i, r in zip(out, index.cpu(), right.double().cpu(), strict=True):
        g.index_put_((i,), r, accumulate=True)
    return out


def _inputs(shape, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    s, t, d, v = shape
    torch.manual_seed(t)
    index = torch.randint(v, (s, t))
    return index.to(device), torch.randn(s, t, d, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_look_ups_add_up_before_the_norm(shape, dtype, backend, device, poisoned) -> None:
    """Bound: t^2 d products, exact in 16 bits, each sum off by eps of the absolute values."""
    index, right = _inputs(shape, dtype, device)
    got = embedding_sq_norm(index, right)
    assert got.dtype == torch.float32
    want = _table(index, right, shape[3]).square().sum((1, 2))
    absolute = _table(index, right.abs(), shape[3]).square().sum((1, 2))
    bound = (shape[1] + shape[2] + 16) * 2.0**-23 * absolute
    assert torch.all((got.double().cpu() - want).abs() <= bound)


def test_gradients_that_cancel_leave_nothing_below_zero(backend, device) -> None:
    index = torch.zeros(1, 4, dtype=torch.long, device=device)
    row = torch.full((1, 1, 3), 1 / 3, device=device)
    right = torch.cat([row, -row, row / 7, -row / 7], 1)
    assert 0 <= embedding_sq_norm(index, right).item() < 1e-12


def test_the_order_of_look_ups_and_their_numbers_do_not_matter(backend, device) -> None:
    index, right = _inputs((2, 70, 6, 9), device=device)
    norm = embedding_sq_norm(index, right)
    order = torch.randperm(70, device=device)
    torch.testing.assert_close(embedding_sq_norm(index[:, order], right[:, order]), norm)
    names = torch.randperm(262144, device=device)[:9]  # ids up to the largest vocabulary
    torch.testing.assert_close(embedding_sq_norm(names[index], right), norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("u", [1, 66])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_the_cross_term_is_the_inner_product_with_the_other_gradient(
    shape, u, dtype, backend, device, poisoned
) -> None:
    s, t, d, v = shape
    index, right = _inputs(shape, dtype, device)
    left = torch.randn(s, u, v, dtype=torch.float64).to(device, dtype)
    other = torch.randn(s, u, d, dtype=torch.float64).to(device, dtype)

    def truth(right: Tensor, left: Tensor, other: Tensor) -> Tensor:
        whole = left.double().cpu().mT @ other.double().cpu()
        return (_table(index, right, v) * whole).sum((1, 2))

    want = truth(right, left, other)
    bound = (t + u + d + 16) * 2.0**-23 * truth(right.abs(), left.abs(), other.abs())
    at = left.gather(2, index[:, None].expand(-1, u, -1))
    for got in (
        embedding_cross(index, right, left, other),
        embedding_cross_at(at, right, other),
        embedding_cross_at(at.mT.contiguous().mT, right, other),
    ):
        assert got.dtype == torch.float32
        assert torch.all((got.double().cpu() - want).abs() <= bound)


def test_a_sample_has_the_same_bits_alone_and_in_a_batch(backend, device) -> None:
    if backend == "torch":
        pytest.skip("torch orders its sums by the whole shape")
    index, right = _inputs((3, 70, 5, 12), device=device)
    left, other = torch.randn(3, 4, 12, device=device), torch.randn(3, 4, 5, device=device)
    norm, cross = embedding_sq_norm(index, right), embedding_cross(index, right, left, other)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(embedding_sq_norm(index[one], right[one]), norm[one])
        alone = embedding_cross(index[one], right[one], left[one], other[one])
        assert torch.equal(alone, cross[one])


def test_strides_do_not_matter(backend, device) -> None:
    index, right = _inputs((4, 9, 8, 5), device=device)
    left, other = torch.randn(4, 6, 5, device=device), torch.randn(4, 6, 8, device=device)
    some = slice(None, None, 2)
    for cut in (slice(1, 7), slice(None, None, 3)):
        a, b = right[some, :, cut], other[some, :, cut]
        torch.testing.assert_close(
            embedding_sq_norm(index[some], a), embedding_sq_norm(index[some], a.contiguous())
        )
        torch.testing.assert_close(
            embedding_cross(index[some], a, left[some], b),
            embedding_cross(index[some], a.contiguous(), left[some].contiguous(), b.contiguous()),
        )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_look_ups_give_zeros(shape, backend, device, poisoned) -> None:
    s, t, d = shape
    right = torch.ones(shape, device=device)
    index = torch.zeros(s, t, dtype=torch.long, device=device)
    other = torch.ones(s, 2, d, device=device)
    zero = torch.zeros(s, device=device)
    assert torch.equal(embedding_sq_norm(index, right), zero)
    assert torch.equal(
        embedding_cross(index, right, torch.ones(s, 2, 5, device=device), other), zero
    )
    assert torch.equal(embedding_cross_at(torch.ones(s, 2, t, device=device), right, other), zero)


def test_another_samples_infinity_stays_there(backend, device) -> None:
    index, right = _inputs((3, 70, 4, 6), device=device)
    want = embedding_sq_norm(index, right)
    right[1, 0, 0] = torch.inf
    got = embedding_sq_norm(index, right)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    assert not got[1].isfinite()
