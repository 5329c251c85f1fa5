"""Sparse projections: against the documented map in plain integers; what they estimate."""

from hashlib import blake2b
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels.launch import IS_INTERPRETED
from curate.kernels.projection import project_matrix
from curate.kernels.rademacher import stream_key
from curate.kernels.sparse_projection import (
    block_shape,
    places,
    sparse_project,
    sparse_project_matrix,
    sparse_project_rows,
)

KEY = stream_key(5, "w", "sparse")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _word(r: int, c: int, w: int) -> int:
    """kernels/rademacher.py's docstring in Python integers, for KEY."""

    def f(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    digest = blake2b(b"curate\0005\0sparse\0w", digest_size=8).digest()
    key0, key1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return f((f(((f(c ^ key0) + r * 0x9E3779B1) % 2**32) ^ key1) + w * 0x85EBCA77) % 2**32)


def _map(o: int, i: int, k: int, nonzeros: int) -> Tensor:
    """Return S [o * i, k] of the module's docstring, one coordinate after another."""
    log = k.bit_length() - 1
    k_c = 2 ** ((log + 1) // 2)
    k_r = k // k_c
    s = torch.zeros(o * i, k, dtype=torch.float64)
    for m in range(nonzeros):
        for r in range(o):
            for c in range(i):
                at = (r % k_r * k_c + c % k_c) ^ _word(r // k_r, c // k_c, 2 * m + 1) % k
                sign = 1 if _word(r, c // 32, 2 * m) >> c % 32 & 1 else -1
                s[r * i + c, at] += sign / sqrt(nonzeros)
    return s


def _truth(left: Tensor, right: Tensor, k: int, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Return the projection in float64 and twice the bound on float32 sums of any order: the number
    of terms (and 8 for roundings of products and scale) times 2^-24 times the sum of sizes."""
    left, right = left.double().cpu(), right.double().cpu()
    grad, size = (x.flatten(1) for x in (_pair(left, right), _pair(left.abs(), right.abs())))
    s = _map(left.shape[1] * left.shape[3], right.shape[3], k, nonzeros)
    terms = left.shape[2] + int((s != 0).sum(0).max()) + 8
    return grad @ s, size @ s.abs() * terms * 2.0**-23


def _pair(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("sgto,sgti->sgoi", left, right).flatten(1, 2)


def _agree(got: Tensor, want: Tensor, bound: Tensor) -> None:
    assert got.shape == want.shape
    assert ((got.double().cpu() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "k", "nonzeros"),
    [
        ((2, 1, 17, 19, 35), 256, 1),  # ragged tiles of 16 x 16
        ((1, 2, 3, 9, 37), 512, 2),  # the second group begins within a tile; tiles of 16 x 32
        ((2, 1, 5, 3, 4), 8, 1),  # tiles smaller than a block
        ((1, 1, 4, 20, 70), 2048, 1),  # 64 columns take two words
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_projection_is_the_documented_map(dtype, shape, k, nonzeros, device) -> None:
    s, g, t, o, i = shape
    left = torch.randn(s, g, t, o).to(device, dtype)
    right = torch.randn(s, g, t, i).to(device, dtype)
    want, bound = _truth(left, right, k, nonzeros)
    _agree(sparse_project(left, right, KEY, k, nonzeros), want, bound)


@pytest.mark.parametrize("k", [64, 256, 8192])
@pytest.mark.usefixtures("poisoned")
def test_it_does_not_matter_how_a_gradient_arrives(k, device) -> None:
    """A table's gradient as a pair with one-hot left factors, as rows, and as a matrix."""
    index, right = torch.randint(0, 7, (2, 5), device=device), torch.randn(2, 5, 11, device=device)
    left = torch.nn.functional.one_hot(index, 7).float()[:, None]
    want, bound = _truth(left, right[:, None], k, 2)
    _agree(sparse_project(left, right[:, None], KEY, k, 2), want, bound)
    _agree(sparse_project_rows(index, right, KEY, k, 2), want, bound)
    _agree(sparse_project_matrix(left[:, 0].mT @ right, KEY, k, 2), want, bound)


@pytest.mark.usefixtures("poisoned")
def test_rows_and_columns_beyond_a_block(device) -> None:
    """Tiles of 128 x 128 outputs are made by four programs; 64 columns of rows take two words.

    An output has at most four terms, of sizes below 5: float32 is off by less than 1e-6 x 4.
    """
    grad = torch.randn(1, 130, 70, device=device)
    want = sparse_project_matrix(grad.double().cpu(), KEY, 1 << 14)
    _agree(sparse_project_matrix(grad, KEY, 1 << 14), want, torch.full_like(want, 4e-6))
    index, right = (
        torch.tensor([[200, 3, 200]], device=device),
        torch.randn(1, 3, 70, device=device),
    )
    table = torch.zeros(1, 201, 70, dtype=torch.float64)
    table[0].index_add_(0, index[0].cpu(), right[0].double().cpu())
    want = sparse_project_matrix(table, KEY, 2048)
    _agree(sparse_project_rows(index, right, KEY, 2048), want, torch.full_like(want, 4e-6))


@pytest.mark.parametrize("k", [1, 2, 64, 256, 2048, 4096, 16384])
def test_coordinates_of_a_tile_never_meet(k) -> None:
    k_r, k_c = block_shape(k)
    assert k_r * k_c == k and k_c in (k_r, 2 * k_r)
    rows = torch.arange(3 * k_r, 4 * k_r)
    at, sign = places(rows, slice(k_c, 2 * k_c), KEY, k, 0, torch.float32)
    assert at.flatten().sort().values.tolist() == list(range(k))
    assert set(sign.flatten().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("nonzeros", [1, 3])
def test_inner_products_and_norms_are_kept_with_the_variance_of_dense_signs(nonzeros) -> None:
    """Gradients that a careless map would fail: one column, one row, one tile, low rank.

    The mean of N estimates is off by less than five of its standard errors. The variance of N
    estimates, of a distribution with at most some 15 of kurtosis, has a relative standard error of
    sqrt(14 / N) = 0.08: five of those are allowed above the proven bound.
    """
    o, i, k, n = 12, 20, 16, 2000
    x = torch.zeros(4, o, i, dtype=torch.float64)
    x[0, :, 3] = torch.randn(o)
    x[1, 5] = torch.randn(i)
    x[2, 4:8, 4:8] = torch.randn(4, 4)
    x[3] = torch.outer(torch.randn(o), torch.randn(i))
    y = x + torch.randn(4, 1, 1) * x.roll(1, dims=2)
    both = torch.cat([x, y])
    columns = []
    for seed in range(n):
        key = stream_key(seed, "w", "sparse")
        p = sparse_project_matrix(both, key, k, nonzeros)
        columns.append(torch.cat([(p[:4] * p[4:]).sum(1), p[:4].square().sum(1)]))
    estimates = torch.stack(columns)
    inner = (x * y).sum((1, 2))
    sq_x, sq_y = x.square().sum((1, 2)), y.square().sum((1, 2))
    exact = torch.cat([inner, sq_x])
    bound = torch.cat([sq_x * sq_y + inner**2, 2 * sq_x**2]) / k
    error = (estimates.mean(0) - exact).abs()
    assert (error <= 5 * estimates.std(0) / sqrt(n) + 1e-12).all()
    assert (estimates.var(0) <= 1.4 * bound + 1e-12).all()


def test_error_is_that_of_dense_signs_at_equal_k() -> None:
    """Mean squared error of one inner product over 300 seeds each. Of a near-normal error the mean
    square is known to sqrt(2 / 300), a ratio of two to 0.115: five of those are allowed."""
    x, y = torch.randn(2, 1, 24, 40, dtype=torch.float64)
    exact, errors = (x * y).sum(), []
    for project in (sparse_project_matrix, project_matrix):
        side = "sparse" if project is sparse_project_matrix else "whole"
        found = []
        for seed in range(300):
            p = project(torch.cat([x, y]), stream_key(seed, "w", side), 64)
            found.append((p[0] @ p[1] - exact).square())
        errors.append(torch.stack(found).mean())
    assert errors[0] / errors[1] < 1.6


def test_layers_add_up() -> None:
    """Different parameters have different streams, so a sum of projections is one of the whole."""
    x = [torch.randn(1, 8, 9, dtype=torch.float64), torch.randn(1, 1, 30, dtype=torch.float64)]
    exact = sum(a.square().sum() for a in x)
    found = torch.stack([
        sum(sparse_project_matrix(a, stream_key(seed, str(n), "sparse"), 32)
            for n, a in enumerate(x)).square().sum()
        for seed in range(500)
    ])  # fmt: skip
    assert (found.mean() - exact).abs() < 5 * found.std() / sqrt(500)


def test_projection_is_linear_and_ones_keep_their_parity(device) -> None:
    x, y = torch.randn(2, 1, 9, 11, device=device)
    both = sparse_project_matrix(x + 2 * y, KEY, 32)
    apart = sparse_project_matrix(x, KEY, 32) + 2 * sparse_project_matrix(y, KEY, 32)
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)
    got = sparse_project_matrix(torch.ones(1, 9, 11, device=device), KEY, 32)
    assert torch.equal(got, got.round()) and int(got.sum()) % 2 == 99 % 2


def test_samples_and_strides_do_not_matter(device) -> None:
    left = torch.randn(3, 1, 5, 20, device=device)
    right = torch.randn(5, 3, 1, 40, device=device).permute(1, 2, 0, 3)[..., 3:20]
    got = sparse_project(left, right, KEY, 256)
    torch.testing.assert_close(got, sparse_project(left, right.contiguous(), KEY, 256))
    order = torch.tensor([2, 0, 1], device=device)
    torch.testing.assert_close(sparse_project(left[order], right[order], KEY, 256), got[order])
    torch.testing.assert_close(sparse_project(left[1:2], right[1:2], KEY, 256), got[1:2])
    grad = torch.randn(2, 17, 20, device=device).mT
    torch.testing.assert_close(
        sparse_project_matrix(grad, KEY, 256), sparse_project_matrix(grad.contiguous(), KEY, 256)
    )


def test_nothing_gives_zeros_and_nonsense_is_refused(device) -> None:
    none = torch.zeros(2, 1, 0, 4, device=device)
    assert torch.equal(sparse_project(none, none, KEY, 8).cpu(), torch.zeros(2, 8))
    assert sparse_project(none[:0], none[:0], KEY, 8).shape == (0, 8)
    index = torch.zeros(2, 0, dtype=torch.long, device=device)
    assert torch.equal(sparse_project_rows(index, none[:, 0], KEY, 8).cpu(), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="1, 2, 4"):
        sparse_project(none, none, KEY, 12)
    with pytest.raises(ValueError, match="not to 0"):
        sparse_project(none, none, KEY, 8, 0)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_is_projected(data) -> None:
    s, g, t = (data.draw(st.integers(1, n)) for n in (2, 2, 20))
    o, i = (data.draw(st.sampled_from([1, 2, 15, 16, 17, 33])) for _ in range(2))
    k = 1 << data.draw(st.integers(5, 12))
    dtype = data.draw(st.sampled_from(DTYPES))
    left, right = torch.randn(s, g, t, o).to(dtype), torch.randn(s, g, t, i).to(dtype)
    want, bound = _truth(left, right, k, 1)
    for form in ("torch", "interpret") if IS_INTERPRETED else ("torch",):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CURATE_KERNELS", form)
            _agree(sparse_project(left, right, KEY, k), want, bound)
