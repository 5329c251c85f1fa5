"""Convolutions, plain and transposed: uses whose gradient pairs positions with patches.

Shapes: S sequences, N = S * f images, C channels, *x positions.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from curate.kernels.conv import Geometry, split, unfold
from curate.kernels.grad_norm import accumulable
from curate.scorers.parts import Convolved, Full, Layout, Pair, Part
from curate.scorers.uses import Lookup, Saved, Use, by_role, per_channel


def conv(
    param: Lookup,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    """Read torch.conv1d, conv2d and conv3d."""
    w, b = param(weight), param(bias)
    if param(input) or input.dim() != weight.dim() or (w is not None and w.transposed):
        return None
    n, kernel = weight.dim() - 2, tuple(weight.shape[2:])
    stride, dilation = _per_axis(stride, n), _per_axis(dilation, n)
    sides = _padding(padding, kernel, dilation)
    a, margins = Saved(input), [0] * (2 * n)
    if any(before != after for before, after in sides):  # "same" around an even kernel
        margins, sides = [p for side in reversed(sides) for p in side], [(0, 0)] * n
    geometry = Geometry(kernel, stride, tuple(p for p, _ in sides), dilation, groups)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        if "weight" in roles:
            x = F.pad(a.get(), margins) if any(margins) else a.get()
            out["weight"] = _patchwise(g, x, geometry, layout)
        if "bias" in roles:
            out["bias"] = Full(per_channel(accumulable(g), layout))
        return out

    return Use(f"conv{n}d", by_role(weight=w, bias=b), parts, _first, [a])


def conv_transpose(
    param: Lookup,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Use | None:
    """Read torch.conv_transpose1d, 2d and 3d: a convolution with input and output exchanged."""
    w, b = param(weight), param(bias)
    if param(input) or input.dim() != weight.dim() or (w is not None and w.transposed):
        return None
    n, a = weight.dim() - 2, Saved(input)
    stride, padding, dilation = (_per_axis(value, n) for value in (stride, padding, dilation))
    if any(e >= s for e, s in zip(_per_axis(output_padding, n), stride, strict=True)):
        return None  # more positions read from the output than there are in the input
    geometry = Geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        if "weight" in roles:
            out["weight"] = _patchwise(a.get(), g, geometry, layout)
        if "bias" in roles:
            out["bias"] = Full(per_channel(accumulable(g), layout))
        return out

    return Use(f"conv_transpose{n}d", by_role(weight=w, bias=b), parts, _first, [a])


def _patchwise(left: Tensor, x: Tensor, geometry: Geometry, layout: Layout) -> Part:
    """Return sum_t left_t patch_t(x)^T per sequence."""
    if layout.kind == "dense":
        return Convolved(left, x, geometry)
    # Several images a row: their positions count as one row's.
    factors = [layout.rows_first(y) for y in (split(left, geometry), unfold(x, geometry))]
    one, other = (y.transpose(1, 2).flatten(2, 3) for y in factors)
    return Pair(one, other)


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return what is added before and after each axis."""
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in _per_axis(0 if padding == "valid" else padding, len(kernel))]


def _first(axis: int, axes: int) -> bool:
    return axis == 0


def _per_axis(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
