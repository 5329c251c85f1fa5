"""Per-sample gradients of convolution kernels, against autograd on one sample at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels import conv
from curate.kernels.conv import Geometry, conv_sketch, conv_sq_norm, split, unfold
from curate.kernels.rademacher import signs, stream_key

KEYS = stream_key(3, "w", "rows"), stream_key(3, "w", "columns")

# Axes, input channels, output channels, size: many positions (direct) and few (Gram), columns
# many and few enough to be sketched as they are.
CASES = {
    "2d": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1), 4, 5, 9),
    "2d, uneven": (Geometry((3, 2), (2, 1), (0, 3), (1, 2), 1), 3, 4, 10),
    "2d, groups": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 3), 6, 9, 7),
    "2d, depthwise": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 6), 6, 6, 7),
    "2d, stride leaves a rest": (Geometry((3, 3), (3, 3), (0, 0), (1, 1), 1), 2, 3, 11),
    "2d, one position": (Geometry((4, 4), (1, 1), (0, 0), (1, 1), 1), 8, 8, 4),
    "2d, wide": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2), 24, 24, 6),
    "1d": (Geometry((4,), (2,), (3,), (1,), 1), 5, 3, 17),
    "3d": (Geometry((2, 2, 1), (1, 2, 1), (1, 0, 0), (1, 1, 1), 1), 3, 4, 5),
}


def _inputs(name: str) -> tuple[Tensor, Tensor, Geometry, Tensor]:
    """Return output gradients, inputs, the geometry, and the truth [s, o, i]."""
    geometry, channels, outputs, size = CASES[name]
    torch.manual_seed(0)
    n = len(geometry.kernel)
    x = torch.randn(3, channels, *[size] * n, dtype=torch.float64)
    shape = outputs, channels // geometry.groups, *geometry.kernel
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
    y = convolve(x, weight, None, *_positional(geometry))
    grad = torch.randn_like(y)
    truth = [
        torch.autograd.grad((row * g).sum(), weight, retain_graph=True)[0]
        for row, g in zip(y, grad, strict=True)
    ]
    return grad, x, geometry, torch.stack(truth).flatten(2)


def _positional(geometry: Geometry):
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


@pytest.mark.parametrize("form", ["gram", "tiles"])
@pytest.mark.parametrize("name", CASES)
def test_both_forms_of_the_norm_are_autograds(name, form, monkeypatch) -> None:
    grad, x, geometry, truth = _inputs(name)
    monkeypatch.setattr(conv, "cheaper_form", lambda *_: form)
    monkeypatch.setattr(conv, "TILE", 2 * truth[0].numel())  # two samples at a time, then one
    torch.testing.assert_close(conv_sq_norm(grad, x, geometry), truth.square().sum((1, 2)))


@pytest.mark.parametrize("k", [(2, 3), (33, 40)])  # projected first, and sketched as it is
@pytest.mark.parametrize("name", CASES)
def test_the_sketch_is_that_of_the_matrix(name, k) -> None:
    grad, x, geometry, truth = _inputs(name)
    rows, columns = (
        signs(key, torch.arange(n), size, dtype=torch.float64)
        for key, n, size in zip(KEYS, truth.shape[1:], k, strict=True)
    )
    want = (rows.T @ truth @ columns).flatten(1) / math.sqrt(k[0] * k[1])
    torch.testing.assert_close(conv_sketch(grad, x, geometry, KEYS, k), want)


@pytest.mark.parametrize("name", CASES)
def test_factors_multiply_to_the_matrix(name) -> None:
    grad, x, geometry, truth = _inputs(name)
    left, right = split(grad, geometry), unfold(x, geometry)
    torch.testing.assert_close((left.mT @ right).flatten(1, 2), truth)


def test_half_precision_is_summed_in_float32() -> None:
    grad, x, geometry, _ = _inputs("2d")
    half = conv_sq_norm(grad.bfloat16(), x.bfloat16(), geometry)
    exact = conv_sq_norm(grad.bfloat16().double(), x.bfloat16().double(), geometry)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=0)
