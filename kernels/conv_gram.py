"""||G||_F^2 of a convolution kernel's gradient from the Gram matrix of pixels, not of patches.

Shapes: b samples times groups, o and c output and input channels of a group, *x input and *y
output positions, t and u their products.

    ||G||_F^2 = sum_{p, q} (grad_p . grad_q) (patch_p . patch_q)
    patch_p . patch_q = sum_k x_{p + k} . x_{q + k}        k over the offsets within the kernel

Patches overlap: their products are sums of entries of one [u, u] matrix of pixels' products, taken
along its diagonals. That is t^2 o + u^2 c multiplications and a few additions per entry, where
patches cost the size of the kernel times as much. A stride splits the input into phases that never
meet (pixels s p + k of one residue k mod s), so the work falls by that once more.
"""

from itertools import product
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.conv_geometry import Geometry
from curate.kernels.summation import accumulable, accumulator, inner

# Elements of the Gram matrices at a time, so that they are added up near a core.
TILE = 1 << 19


def conv_sq_norm_gram(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample, clamped at 0: rounding may take the sum below it."""
    s, groups, t = len(grad), geometry.groups, prod(grad.shape[2:])
    out = grad.new_zeros(s, dtype=accumulator(grad))
    u = max(t, prod(input.shape[2:]) // prod(geometry.stride))
    step = max(1, TILE // max(1, groups * (t * t + u * u)))
    for first in range(0, s, step):
        part = slice(first, first + step)
        left = accumulable(grad[part]).reshape(-1, grad.shape[1] // groups, t)
        right = accumulable(input[part]).reshape(
            len(left), input.shape[1] // groups, *input.shape[2:]
        )
        products = _patch_gram(right, tuple(grad.shape[2:]), geometry)
        out[part] = inner(_gram(left), products).view(-1, groups).sum(1)
    return out.clamp_(min=0)


def _patch_gram(
    x: Float[Tensor, "b c *x"], outputs: tuple[int, ...], geometry: Geometry
) -> Float[Tensor, "b t t"]:
    """Return the products of the patches that the output positions read."""
    n = len(outputs)
    steps = [_steps(a, outputs, x.shape[2:], geometry) for a in range(n)]
    total: dict[tuple[int, ...], Tensor] = {}
    for phase in product(*steps):
        pixels = x
        for axis, (first, stride) in enumerate(zip(phase, geometry.stride, strict=True), start=2):
            pixels = pixels[(slice(None),) * axis + (slice(first, None, stride),)]
        total[phase] = _gram(pixels.flatten(2)).view(len(x), *pixels.shape[2:], *pixels.shape[2:])
    # One axis after the other, the last first: k + k additions for a k x k kernel, not k * k.
    for axis in reversed(range(n)):
        merged: dict[tuple[int, ...], Tensor] = {}
        for phase, gram in total.items():
            shape = list(gram.shape)
            shape[1 + axis] = shape[1 + n + axis] = outputs[axis]
            if phase[:axis] not in merged:
                merged[phase[:axis]] = gram.new_zeros(shape)
            for to, shift in steps[axis][phase[axis]]:
                size = to.stop - to.start
                target = _square(merged[phase[:axis]], axis, n, to.start, size)
                target += _square(gram, axis, n, to.start + shift, size)
        total = merged
    t = prod(outputs)
    if not total:  # along some axis nothing but padding is read
        return x.new_zeros(len(x), t, t)
    return total[()].view(len(x), t, t)


def _steps(
    axis: int, outputs: tuple[int, ...], sizes: torch.Size, geometry: Geometry
) -> dict[int, list[tuple[slice, int]]]:
    """Return what an axis of the kernel reads, by the phase's first pixel.

    Each offset of the kernel gives the output positions that read a pixel there and not padding,
    and how far behind the output position that pixel is among the phase's.
    """
    stride, padding = geometry.stride[axis], geometry.padding[axis]
    found: dict[int, list[tuple[slice, int]]] = {}
    for k in range(geometry.kernel[axis]):
        offset = k * geometry.dilation[axis] - padding  # position p reads pixel stride * p + offset
        first, shift = offset % stride, offset // stride
        pixels = len(range(first, sizes[axis], stride))
        start, stop = max(0, -shift), min(outputs[axis], pixels - shift)
        if start < stop:
            found.setdefault(first, []).append((slice(start, stop), shift))
    return found


def _square(gram: Tensor, axis: int, n: int, start: int, size: int) -> Tensor:
    """Return a range of one axis, on both sides of a Gram matrix of n axes each."""
    return gram.narrow(1 + axis, start, size).narrow(1 + n + axis, start, size)


def _gram(x: Float[Tensor, "b c t"]) -> Float[Tensor, "b t t"]:
    return torch.bmm(x.mT, x)
