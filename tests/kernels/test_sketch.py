"""Two-sided sketches: against sign matrices written out, in either form; what they estimate."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels import rademacher
from curate.kernels.launch import IS_INTERPRETED
from curate.kernels.rademacher import Key, side_signs, signs, stream_key
from curate.kernels.sketch import (
    add_partials,
    sketch,
    sketch_from_sides,
    sketch_left,
    sketch_matrix,
    sketch_rows,
    sketch_side,
    sketch_vector,
)

KEYS = stream_key(3, "w", "rows"), stream_key(3, "w", "columns")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _matrix(key: Key, n: int, k: int) -> Tensor:
    return signs(key, torch.arange(n), k, dtype=torch.float64)


def _truth(left: Tensor, right: Tensor, k: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the sketch in float64 and a bound on what float32 sums of any order may differ by.

    A sum of n numbers is off by less than n u times the sum of their sizes, u = 2^-24; products of
    tf32 halves by 4 u more. Twice that is allowed.
    """
    _, g, t, o = left.shape
    left, right = left.double().cpu(), right.double().cpu()
    rows = _matrix(KEYS[0], g * o, k[0]).view(g, o, k[0])
    tall, wide = left @ rows, right @ _matrix(KEYS[1], right.shape[3], k[1])
    want = torch.einsum("sgtp,sgtq->spq", tall, wide).flatten(1) / sqrt(k[0] * k[1])
    size = (left.abs().sum(3) * right.abs().sum(3)).sum((1, 2)) / sqrt(k[0] * k[1])
    return want, ((o + right.shape[3] + g * t + 8) * 2.0**-23 * size)[:, None]


def _agree(got: Tensor, want: Tensor, bound: Tensor) -> None:
    assert got.shape == want.shape
    assert ((got.double().cpu() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((2, 1, 70, 5, 67), (5, 33)),  # one program holds both sides, ragged in every axis
        ((2, 2, 33, 65, 3), (32, 16)),  # groups; columns one above a block
        ((3, 1, 1, 40, 9), (7, 64)),  # one token: each side alone
        ((1, 2, 5, 6, 4), (70, 3)),  # wider than a program's product
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_sketch_is_the_product_with_the_sign_matrices(dtype, shape, k, device) -> None:
    s, g, t, o, i = shape
    left, right = torch.randn(s, g, t, o).to(device, dtype), torch.randn(s, g, t, i)
    right = right.to(device, dtype)
    want, bound = _truth(left, right, k)
    _agree(sketch(left, right, KEYS, k), want, bound)
    wide = sketch_side(right, KEYS[1], k[1])
    assert wide.dtype == torch.float32
    _agree(sketch_left(left, wide, KEYS[0], k), want, bound)
    rows = _matrix(KEYS[0], g * o, k[0]).view(g, o, k[0])
    tall = left.double().cpu() @ rows
    from_sides = sketch_from_sides(tall.flatten(1, 2).float(), wide.cpu().flatten(1, 2))
    _agree(from_sides, want, bound)


@pytest.mark.usefixtures("poisoned")
def test_float64_is_summed_in_float64() -> None:
    left, right = (torch.randn(2, 1, 9, n, dtype=torch.float64) for n in (5, 7))
    got = sketch(left, right, KEYS, (8, 8))
    want, _ = _truth(left, right, (8, 8))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("poisoned")
def test_rows_are_factors_of_unit_vectors(device) -> None:
    """Tables of a vocabulary: the same as with the unit vectors written out."""
    for t in (3, 40):
        index = torch.randint(0, 11, (2, t), device=device)
        right = torch.randn(2, t, 6, device=device)
        left = torch.nn.functional.one_hot(index, 11).float()[:, None]
        want, bound = _truth(left, right[:, None], (20, 9))
        _agree(sketch_rows(index, right, KEYS, (20, 9)), want, bound)


@pytest.mark.usefixtures("poisoned")
def test_matrices_and_vectors_at_hand(device) -> None:
    grad = torch.randn(3, 10, 7, device=device)
    eye = torch.eye(10, device=device).expand(3, 1, 10, 10)
    want, bound = _truth(eye, grad[:, None], (12, 34))
    _agree(sketch_matrix(grad, KEYS, (12, 34)), want, bound)
    vector = torch.randn(3, 37, device=device)
    want = vector.double().cpu() @ _matrix(KEYS[0], 37, 300) / sqrt(300)
    bound = (vector.double().abs().sum(1, keepdim=True) * 45 * 2.0**-23 / sqrt(300)).cpu()
    _agree(sketch_vector(vector, KEYS[0], 300), want, bound)


@pytest.mark.usefixtures("poisoned")
def test_long_rows_of_few_tokens_are_split_and_added_in_order(device) -> None:
    x = torch.randn(3, 700, device=device)
    want = x.double().cpu() @ _matrix(KEYS[0], 700, 5)
    _agree(sketch_side(x, KEYS[0], 5), want, x.abs().sum(1, keepdim=True).cpu() * 708 * 2.0**-23)
    partials = torch.randn(2, 5, 200, device=device)
    in_order = torch.zeros(2, 200, device=device)
    for p in range(5):
        in_order += partials[:, p]
    assert torch.equal(add_partials(partials), in_order)


def test_strides_do_not_matter(backend, device) -> None:
    """Transposed, spread and sliced inputs give what their copies do, in Triton bit for bit."""
    left = torch.randn(34, 2, 1, 9, device=device).permute(1, 2, 0, 3)
    spread = torch.randn(1, 1, 34, 12, device=device).expand(2, 1, 34, 12)[..., 1:8]
    across = torch.randn(2, 1, 7, 34, device=device).mT
    for right in (spread, across):
        got = sketch(left, right, KEYS, (4, 4))
        want = sketch(left.contiguous(), right.contiguous(), KEYS, (4, 4))
        assert torch.equal(got, want) or backend == "torch"  # BLAS orders its sums by the layout
        torch.testing.assert_close(got, want)
    x = torch.randn(5, 3, 8, device=device).transpose(0, 1)
    got, want = sketch_side(x, KEYS[0], 6), sketch_side(x.contiguous(), KEYS[0], 6)
    assert torch.equal(got, want) or backend == "torch"
    torch.testing.assert_close(got, want)


def test_a_sample_alone_has_the_bits_it_has_in_a_batch(backend, device) -> None:
    left, right = torch.randn(3, 1, 40, 6, device=device), torch.randn(3, 1, 40, 5, device=device)
    together = sketch(left, right, KEYS, (8, 8))
    order = torch.tensor([2, 0, 1], device=device)
    permuted = sketch(left[order], right[order], KEYS, (8, 8))
    assert torch.equal(permuted, together[order])
    alone = sketch(left[1:2], right[1:2], KEYS, (8, 8))
    assert torch.equal(alone, together[1:2]) or backend == "torch"  # BLAS cuts by the batch's size
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-5)


def test_nothing_gives_zeros(device) -> None:
    none = torch.zeros(2, 1, 0, 4, device=device)
    assert torch.equal(sketch(none, none, KEYS, (3, 2)).cpu(), torch.zeros(2, 6))
    assert sketch(none[:0], none[:0], KEYS, (3, 2)).shape == (0, 6)
    assert sketch_side(torch.zeros(0, 4, device=device), KEYS[0], 3).shape == (0, 3)


def test_inner_products_are_kept_without_bias() -> None:
    """Over 300 seeds, and layers of different shapes add up. Both factors of a two-sided sketch
    have mean <x, y>, so the estimate's mean is off by less than five of its standard errors."""
    shapes, k = [(6, 5), (3, 9)], (4, 4)
    x = [torch.randn(1, *shape, dtype=torch.float64) for shape in shapes]
    y = [a + torch.randn_like(a) for a in x]
    exact = sum((a * b).sum() for a, b in zip(x, y, strict=True))
    found = []
    for seed in range(300):
        total = torch.zeros((), dtype=torch.float64)
        for n, (a, b) in enumerate(zip(x, y, strict=True)):
            keys = stream_key(seed, str(n), "rows"), stream_key(seed, str(n), "columns")
            both = sketch_matrix(torch.cat([a, b]), keys, k)
            total += both[0] @ both[1]
        found.append(total)
    estimates = torch.stack(found)
    assert (estimates.mean() - exact).abs() < 5 * estimates.std() / sqrt(300)


def test_the_sketch_of_ones_has_their_parity(device) -> None:
    for m in (7, 8):
        got = sketch_vector(torch.ones(1, m, device=device), KEYS[0], 40) * sqrt(40)
        assert torch.all(got.round().long() % 2 == m % 2)
        torch.testing.assert_close(got, got.round(), atol=1e-5, rtol=0)


def test_kept_signs_are_bounded_and_the_last_used_stay(monkeypatch) -> None:
    monkeypatch.setattr(rademacher, "KEPT_BYTES", 4096)
    monkeypatch.setattr(rademacher, "_kept", type(rademacher._kept)())

    def make(n: int) -> Tensor:
        return side_signs(Key(n, 0), 8, 32, torch.float32, torch.device("cpu"))

    first = make(0)
    for n in (1, 2, 0, 3, 4):
        make(n)
    assert make(0) is first
    assert sum(kept.nbytes for kept in rademacher._kept.values()) == rademacher._kept.nbytes <= 4096
    assert torch.equal(make(1), signs(Key(1, 0), torch.arange(8), 32))
    big = side_signs(Key(9, 0), 64, 32, torch.float32, torch.device("cpu"))
    assert all(kept is not big for kept in rademacher._kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape_is_sketched(dtype, data) -> None:
    """Both forms on shapes drawn around the blocks' sizes."""
    s, g = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    t = data.draw(st.sampled_from([1, 2, 31, 32, 63, 64, 65]))
    o, i = (data.draw(st.sampled_from([1, 3, 16, 31, 33, 64, 65])) for _ in range(2))
    k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    left, right = torch.randn(s, g, t, o).to(dtype), torch.randn(s, g, t, i).to(dtype)
    want, bound = _truth(left, right, k)
    for form in ("torch", "interpret") if IS_INTERPRETED else ("torch",):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CURATE_KERNELS", form)
            _agree(sketch(left, right, KEYS, k), want, bound)
