"""Per-sample gradients of convolution kernels, against autograd on one sample at a time."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels import conv, conv_gram
from curate.kernels.conv import (
    Geometry,
    conv_dot,
    conv_sketch,
    conv_sq_norm,
    conv_sums,
    split,
    unfold,
)
from curate.kernels.conv_gram import conv_sq_norm_gram
from curate.kernels.conv_tiles import conv_sq_norm_tiles
from curate.kernels.rademacher import signs, stream_key

KEYS = stream_key(3, "w", "rows"), stream_key(3, "w", "columns")
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Geometry, input channels, output channels, size.
CASES = {
    "2d": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), 4, 5, 9),
    "2d, uneven": (Geometry((3, 2), (2, 1), (0, 3), (1, 2), 1), 3, 4, 10),
    "2d, groups": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 3), 6, 9, 7),
    "2d, depthwise": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 6), 6, 6, 7),
    "2d, stride leaves a rest": (Geometry((3, 3), (3, 3), (0, 0), (1, 1), 1), 2, 3, 11),
    "2d, 1 x 1 that skips": (Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1), 3, 4, 7),
    "2d, padding alone": (Geometry((2, 2), (1, 1), (3, 3), (1, 1), 1), 2, 3, 3),
    "2d, one position": (Geometry((4, 4), (1, 1), (0, 0), (1, 1), 1), 8, 8, 4),
    "2d, wide": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2), 24, 24, 6),
    "1d": (Geometry((4,), (2,), (3,), (1,), 1), 5, 3, 17),
    "3d": (Geometry((2, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 1), 3, 4, 5),
}
TINY = ("2d, uneven", "2d, depthwise", "1d", "3d", "2d, 1 x 1 that skips")


def _random(case, samples: int = 3) -> tuple[Tensor, Tensor, Geometry, Tensor]:
    """Return output gradients, inputs, the geometry, and the truth [s, o, i], in float64."""
    geometry, channels, outputs, size = case
    torch.manual_seed(0)
    n = len(geometry.kernel)
    x = torch.randn(samples, channels, *[size] * n, dtype=torch.float64)
    shape = outputs, channels // geometry.groups, *geometry.kernel
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rest = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    y = CONVOLVE[n](x, weight, None, *rest)
    grad = torch.randn_like(y)
    truth = [
        torch.autograd.grad((row * g).sum(), weight, retain_graph=True)[0]
        for row, g in zip(y, grad, strict=True)
    ]
    return grad, x, geometry, torch.stack(truth).flatten(2)


def _sketched(truth: Tensor, k: tuple[int, int]) -> Tensor:
    rows, columns = (
        signs(key, torch.arange(n), size, dtype=torch.float64)
        for key, n, size in zip(KEYS, truth.shape[1:], k, strict=True)
    )
    return (rows.T @ truth @ columns).flatten(1) / math.sqrt(k[0] * k[1])


WAYS = [
    conv._Way(norm, sketch, matrix)
    for norm, sketch, matrix in product(
        (None, "gram", "matrix"), (None, "projected", "matrix"), ("grouped", "patches")
    )
    if norm or sketch
]


def _take(monkeypatch: pytest.MonkeyPatch, way: conv._Way) -> None:
    monkeypatch.setattr(conv, "_cheapest", lambda *_: way)


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_the_sums_gives_those_of_autograds_gradient(name, poisoned, monkeypatch):
    grad, x, geometry, truth = _random(CASES[name])
    k = (2, 3)
    monkeypatch.setattr(conv, "TILE", 2 * truth[0].numel())  # two samples at a time, then one
    monkeypatch.setattr(conv_gram, "TILE", 1)
    for way in WAYS:
        _take(monkeypatch, way)
        found = conv_sums(
            grad, x, geometry, square=way.norm is not None, sketch=(KEYS, k) if way.sketch else None
        )
        if way.norm:
            torch.testing.assert_close(found.sq_norm, truth.square().sum((1, 2)))
        if way.sketch:
            torch.testing.assert_close(found.sketch, _sketched(truth, k))
        assert (found.sq_norm is None, found.sketch is None) == (not way.norm, not way.sketch)


@pytest.mark.parametrize("k", [(2, 3), (33, 40)])
@pytest.mark.parametrize("name", CASES)
def test_the_way_chosen_is_right(name, k) -> None:
    grad, x, geometry, truth = _random(CASES[name])
    torch.testing.assert_close(conv_sketch(grad, x, geometry, KEYS, k), _sketched(truth, k))
    torch.testing.assert_close(conv_sq_norm(grad, x, geometry), truth.square().sum((1, 2)))
    v = torch.randn(3, *truth.shape[1:], dtype=torch.float64)
    dots = torch.einsum("soi,moi->sm", truth, v)
    for several in (slice(0, 1), slice(None)):  # as a convolution, and from G
        torch.testing.assert_close(conv_dot(grad, x, geometry, v[several]), dots[:, several])


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((32, 32, 32, 3), ("matrix", "matrix", "grouped")),  # one G serves both
        ((128, 128, 8, 3), ("gram", "projected", None)),  # few positions, large matrix
        ((3, 32, 32, 3), ("matrix", "matrix", "patches")),  # too few channels for oneDNN
    ],
)
def test_shapes_measured_take_the_way_that_was_faster(shape, want) -> None:
    channels, outputs, size, kernel = shape
    x, grad = torch.empty(1, channels, size, size), torch.empty(1, outputs, size, size)
    geometry = Geometry((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), 1)
    way = conv._cheapest(grad, x, geometry, True, (32, 32))
    assert (way.norm, way.sketch) == want[:2]
    assert want[2] in (None, way.matrix)


@pytest.mark.parametrize("name", CASES)
def test_factors_multiply_to_the_matrix(name) -> None:
    grad, x, geometry, truth = _random(CASES[name])
    left, right = split(grad, geometry), unfold(x, geometry)
    torch.testing.assert_close((left.mT @ right).flatten(1, 2), truth)


@st.composite
def cases(draw: st.DrawFn, axes: tuple[int, ...] = (1, 2, 3), largest: int = 8):
    n = draw(st.sampled_from(axes))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    kernel, dilation, padding = per_axis(1, 4), per_axis(1, 3), per_axis(0, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    geometry = Geometry(kernel, per_axis(1, 3), padding, dilation, groups)
    reach = max(d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True))
    size = draw(st.integers(max(1, reach), max(1, reach) + largest))
    channels, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    return geometry, channels, outputs, size


@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_the_gram_of_pixels_is_right_for_every_geometry(case) -> None:
    grad, x, geometry, truth = _random(case, samples=2)
    want = truth.square().sum((1, 2))
    torch.testing.assert_close(conv_sq_norm_gram(grad, x, geometry), want)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(case=cases(), k=st.sampled_from([(1, 1), (3, 5), (33, 2)]))
def test_every_form_is_right_for_every_geometry(case, k) -> None:
    grad, x, geometry, truth = _random(case, samples=3)
    with pytest.MonkeyPatch.context() as patch:
        for way in (way for way in WAYS if way.sketch):
            _take(patch, way)
            found = conv_sums(grad, x, geometry, square=way.norm is not None, sketch=(KEYS, k))
            torch.testing.assert_close(found.sketch, _sketched(truth, k))
            if way.norm:
                torch.testing.assert_close(found.sq_norm, truth.square().sum((1, 2)))


# -- Triton --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_tiles_in_registers_are_those_of_the_matrix(name, dtype, backend, device, poisoned) -> None:
    """Products of 16-bit numbers are exact in float32, so both forms round only in their sums.

    Bound: n additions of float32 lose at most n eps of the sum of absolute values; here n is the
    number of positions and then of entries of G.
    """
    if backend == "torch":
        pytest.skip("Triton alone")
    grad, x, geometry, _ = _random(CASES[name])
    grad, x = grad.to(device, dtype), x.to(device, dtype)
    got = conv_sq_norm_tiles(grad, x, geometry)
    assert got.dtype == torch.float32
    matrix = conv.conv_matrix(grad.double(), x.double(), geometry)
    absolute = conv.conv_matrix(grad.double().abs(), x.double().abs(), geometry)
    rounding = (math.prod(grad.shape[2:]) + matrix[0].numel()) * 2.0**-24
    want = matrix.square().sum((1, 2))
    assert torch.all((got - want).abs() <= 2 * rounding * absolute.square().sum((1, 2)))


def test_tiles_do_not_depend_on_the_batch_or_the_layout(backend, device) -> None:
    if backend == "torch":
        pytest.skip("Triton alone")
    grad, x, geometry, _ = _random(CASES["2d, uneven"])
    grad, x = grad.to(device, torch.float32), x.to(device, torch.float32)
    got = conv_sq_norm_tiles(grad, x, geometry)
    for sample in range(len(x)):
        one = slice(sample, sample + 1)
        assert torch.equal(conv_sq_norm_tiles(grad[one], x[one], geometry), got[one])
    last = torch.channels_last
    views = grad.contiguous(memory_format=last), x.contiguous(memory_format=last)
    assert torch.equal(conv_sq_norm_tiles(*views, geometry), got)
    wide = torch.full((3, 9, 12, 12), torch.nan, device=device)
    wide[:, 1:7:2, 1:11, 1:11] = x
    assert torch.equal(conv_sq_norm_tiles(grad, wide[:, 1:7:2, 1:11, 1:11], geometry), got)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(case=cases(largest=4))
def test_tiles_are_right_for_every_geometry(case) -> None:
    grad, x, geometry, truth = _random(case, samples=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURATE_KERNELS", "interpret")
        got = conv_sq_norm_tiles(grad.float(), x.float(), geometry)
    # Entries of at most 9^3 positions, of numbers near 1: see the bound above.
    torch.testing.assert_close(got.double(), truth.square().sum((1, 2)), rtol=1e-4, atol=1e-3)


def test_the_kernel_is_what_the_public_function_runs(backend, device, monkeypatch) -> None:
    grad, x, geometry, truth = _random(CASES["2d, uneven"])
    grad, x = grad.to(device, torch.float32), x.to(device, torch.float32)
    ran = []
    monkeypatch.setattr(
        conv, "conv_sq_norm_tiles", lambda *a: ran.append(1) or conv_sq_norm_tiles(*a)
    )
    got = conv_sums(grad, x, geometry, square=True, sketch=(KEYS, (4, 4)))
    assert ran == ([1] if backend == "triton" else [])
    torch.testing.assert_close(
        got.sq_norm.double().cpu(), truth.square().sum((1, 2)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        got.sketch.double().cpu(), _sketched(truth, (4, 4)), rtol=1e-4, atol=1e-4
    )


# -- edges ---------------------------------------------------------------------------------------


def test_half_precision_is_summed_in_float32() -> None:
    grad, x, geometry, _ = _random(CASES["2d"])
    half = conv_sq_norm(grad.bfloat16(), x.bfloat16(), geometry)
    exact = conv_sq_norm(grad.bfloat16().double(), x.bfloat16().double(), geometry)
    assert half.dtype == torch.float32
    # 81 positions and 180 entries, each sum a few roundings of 2^-24 deep.
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=0)


def test_no_samples_and_no_channels_give_zeros(backend, device) -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for s, o in ((0, 4), (2, 0)):
        grad, x = torch.ones(s, o, 5, 5, device=device), torch.ones(s, 3, 5, 5, device=device)
        found = conv_sums(grad, x, geometry, square=True, sketch=(KEYS, (2, 3)))
        assert torch.equal(found.sq_norm, torch.zeros(s, device=device))
        assert torch.equal(found.sketch, torch.zeros(s, 6, device=device))
        assert conv_dot(grad, x, geometry, torch.ones(2, o, 27, device=device)).shape == (s, 2)


def test_a_gram_sum_never_falls_below_zero() -> None:
    """Two positions whose gradients cancel: the norm is 0, and its Gram sum a rounding error."""
    x = torch.full((1, 1, 1, 2), 1 / 3)
    grad = torch.tensor([1 / 7, -1 / 7]).view(1, 1, 1, 2)
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    assert conv_sq_norm_gram(grad, x, geometry).item() >= 0


def test_another_samples_infinity_stays_there() -> None:
    grad, x, geometry, truth = _random(CASES["2d"])
    x[1, 0, 0, 0] = torch.inf
    want = truth.square().sum((1, 2))
    for way in (way for way in WAYS if way.norm and not way.sketch):
        with pytest.MonkeyPatch.context() as patch:
            _take(patch, way)
            found = conv_sums(grad, x, geometry, square=True, sketch=None)
            torch.testing.assert_close(found.sq_norm[[0, 2]], want[[0, 2]])
