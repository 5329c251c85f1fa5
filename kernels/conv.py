"""Each sample's gradient of a convolution kernel: its squared norm and its sketch.

Shapes: s samples, c input and o output channels, g groups, *x input and *y output positions, t
their product, i = c / g * kernel size the columns of the matrix [o, i] that the kernel is.

G = sum_t left_t right_t^T with right_t the patch that position t reads. Patches are k^d times as
large as the input, so they are made (`unfold`) only where the Gram form over few positions wins.
Elsewhere G is made a few samples at a time by the convolution's own backward pass, the samples
standing side by side as groups, or never: a patch's projection is a convolution with the signs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import grad as conv_grad

from curate.kernels.grad_norm import (
    accumulable,
    accumulator,
    cheaper_form,
    grad_sq_norm_gram,
    inner,
)
from curate.kernels.rademacher import Key, signs
from curate.kernels.sketch import sketch_matrix

# Elements of G at a time. Measured on an AMD EPYC (AVX-512), 2026-11: beyond a core's cache the
# grouped backward pass of oneDNN is two to four times slower.
TILE = 1 << 18
_CONVOLUTION: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: conv_grad.conv1d_weight,
    2: conv_grad.conv2d_weight,
    3: conv_grad.conv3d_weight,
}


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input, each with one number per axis; padding is the same on
    both sides."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv_sq_norm(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample, in the cheaper of the Gram form and the direct one.

    Accumulates in float32 (float64 for float64 inputs). Scratch: TILE elements of G, or the
    patches where there are few positions.
    """
    t, (rows, columns) = prod(grad.shape[2:]), _matrix_shape(grad, input, geometry)
    if cheaper_form(t, rows // geometry.groups, columns) == "gram":
        return grad_sq_norm_gram(split(grad, geometry), unfold(input, geometry))
    out = grad.new_zeros(len(grad), dtype=accumulator(grad))
    for part in _tiles(len(grad), rows * columns):
        g = conv_matrix(grad[part], input[part], geometry)
        out[part] = inner(g, g)
    return out


def conv_sketch(
    grad: Float[Tensor, "s o *y"],
    input: Float[Tensor, "s c *x"],
    geometry: Geometry,
    keys: tuple[Key, Key],
    k: tuple[int, int],
) -> Float[Tensor, "s kk"]:
    """Return the flattened k_o x k_i sketch of G, as `sketch` does of a linear layer's."""
    rows, columns = _matrix_shape(grad, input, geometry)
    projected = geometry.groups * (columns * k[1] + k[0] * k[1]) + rows * k[0]
    if rows * columns <= projected:  # per position: small matrices are sketched as they are
        tiles = _tiles(len(grad), rows * columns)
        return torch.cat(
            [sketch_matrix(conv_matrix(grad[p], input[p], geometry), keys, k) for p in tiles]
        )
    dtype, groups, device = accumulator(grad), geometry.groups, grad.device
    row_signs = signs(keys[0], torch.arange(rows, device=device), k[0], dtype=dtype)
    column_signs = signs(keys[1], torch.arange(columns, device=device), k[1], dtype=dtype)
    kernel = column_signs.T.reshape(k[1], -1, *geometry.kernel).repeat(
        groups, *[1] * (grad.dim() - 1)
    )
    wide = _convolve(accumulable(input), kernel, geometry)
    wide = wide.view(len(grad), groups, k[1], -1).transpose(1, 2).flatten(2)
    left = accumulable(grad).reshape(len(grad), groups, rows // groups, -1)
    tall = row_signs.view(groups, -1, k[0]).mT @ left
    tall = tall.transpose(1, 2).flatten(2)
    return torch.bmm(tall, wide.mT).flatten(1) / sqrt(k[0] * k[1])


def conv_matrix(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, "s o i"]:
    """Return G itself of a few samples: one backward pass with the samples as groups."""
    samples, rows = grad.shape[:2]
    groups = samples * geometry.groups
    shape = samples * rows, input.shape[1] // geometry.groups, *geometry.kernel
    weight: Tensor = _WEIGHT_GRADIENT[len(geometry.kernel)](
        accumulable(input).reshape(1, -1, *input.shape[2:]), shape,
        accumulable(grad).reshape(1, -1, *grad.shape[2:]),
        geometry.stride, geometry.padding, geometry.dilation, groups,
    )  # fmt: skip
    return weight.reshape(samples, rows, -1)


def split(grad: Float[Tensor, "s o *y"], geometry: Geometry) -> Float[Tensor, "s g t r"]:
    """Return the left factors of G, positions as tokens."""
    return grad.reshape(len(grad), geometry.groups, -1, prod(grad.shape[2:])).mT


def unfold(input: Float[Tensor, "s c *x"], geometry: Geometry) -> Float[Tensor, "s g t i"]:
    """Return the right factors of G: the patches that the positions read."""
    n = len(geometry.kernel)
    x = F.pad(input, [p for side in reversed(geometry.padding) for p in (side, side)])
    axes = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    for axis, (size, step, d) in enumerate(axes, start=2):
        x = x.unfold(axis, d * (size - 1) + 1, step)[..., ::d]
    x = x.view(len(x), geometry.groups, -1, *x.shape[2:])  # [s, g, c / g, *y, *kernel]
    # Positions run fastest in memory, as they do in the input: copied in runs, not one by one.
    x = x.permute(0, 1, 2, *range(3 + n, 3 + 2 * n), *range(3, 3 + n))
    return x.flatten(3 + n).flatten(2, 2 + n).mT


def _convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    out: Tensor = _CONVOLUTION[len(geometry.kernel)](
        x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    return out


def _matrix_shape(grad: Tensor, input: Tensor, geometry: Geometry) -> tuple[int, int]:
    return grad.shape[1], input.shape[1] // geometry.groups * prod(geometry.kernel)


def _tiles(samples: int, cost: int) -> list[slice]:
    step = max(1, TILE // max(1, cost))
    return [slice(a, min(a + step, samples)) for a in range(0, samples, step)]
