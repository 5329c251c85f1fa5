"""How a convolution reads its input, and the factors of its kernel's gradient that follow.

Shapes: s samples, c input and o output channels, g groups, *x input and *y output positions, t
their product, r = o / g, i = c / g * kernel size the columns of the matrix [o, i] of the kernel.
"""

from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input, each with one number per axis; padding is the same on
    both sides."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def split(grad: Float[Tensor, "s o *y"], geometry: Geometry) -> Float[Tensor, "s g t r"]:
    """Return the left factors of G, positions as tokens."""
    groups = geometry.groups
    return grad.reshape(len(grad), groups, grad.shape[1] // groups, prod(grad.shape[2:])).mT


def unfold(input: Float[Tensor, "s c *x"], geometry: Geometry) -> Float[Tensor, "s g t i"]:
    """Return the right factors of G: the patches that the positions read."""
    n = len(geometry.kernel)
    margins = [p for side in reversed(geometry.padding) for p in (side, side)]
    x = F.pad(input, margins) if any(margins) else input
    axes = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    for axis, (size, step, d) in enumerate(axes, start=2):
        x = x.unfold(axis, d * (size - 1) + 1, step)[..., ::d]
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    x = x.reshape(len(x), groups, channels, *x.shape[2:])  # [s, g, c / g, *y, *kernel]
    # Positions run fastest in memory, as they do in the input: copied in runs, not one by one.
    x = x.permute(0, 1, 2, *range(3 + n, 3 + 2 * n), *range(3, 3 + n))
    return x.flatten(3 + n).flatten(2, 2 + n).mT


def matrix_shape(grad: Tensor, input: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Return (o, i)."""
    return grad.shape[1], input.shape[1] // geometry.groups * prod(geometry.kernel)
