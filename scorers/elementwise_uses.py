"""Norms, scales and shifts: uses whose gradient is a plain sum over what it was repeated for.

Shapes: S sequences, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.grad_norm import accumulable
from curate.scorers.parts import Full, Layout, Part
from curate.scorers.uses import Lookup, Saved, Use, by_role, per_channel


def layer_norm(
    param: Lookup,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Use | None:
    return _norm(
        "layer_norm", param, input, weight, bias, len(normalized_shape),
        lambda x: F.layer_norm(x, list(normalized_shape), None, None, eps),
    )  # fmt: skip


def rms_norm(
    param: Lookup, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Use | None:
    # The default eps is that of the input's own dtype, not of the dtype that we sum in.
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _norm(
        "rms_norm", param, input, weight, None, len(normalized_shape),
        lambda x: F.rms_norm(x, list(normalized_shape), None, eps),
    )  # fmt: skip


def group_norm(
    param: Lookup,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Use | None:
    return _norm(
        "group_norm", param, input, weight, bias, 0,
        lambda x: F.group_norm(x, num_groups, None, None, eps),
    )  # fmt: skip


def batch_norm(
    param: Lookup,
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Use | None:
    if training or running_mean is None or running_var is None:
        return None  # statistics of the batch: rows depend on one another
    mean, var = running_mean, running_var
    return _norm(
        "batch_norm", param, input, weight, bias, 0,
        lambda x: F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), None, None, False, 0.0, eps),
    )  # fmt: skip


def _norm(
    kind: str,
    param: Lookup,
    x: Tensor,
    weight: Any,
    bias: Any,
    trailing: int,
    normalised: Callable[[Tensor], Tensor],
) -> Use | None:
    """output = normalised(x) * w + b over the last `trailing` axes, or if 0 per channel."""
    w, b = param(weight), param(bias)
    if param(x) or any(p is not None and p.transposed for p in (w, b)):
        return None
    a = Saved(x)

    def total(y: Tensor, layout: Layout) -> Tensor:
        if trailing == 0:
            return per_channel(y, layout)
        y = layout.rows_first(y)
        return y.reshape(len(y), -1, *y.shape[y.dim() - trailing :]).sum(1)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        g, out = accumulable(g), dict[str, Part]()
        if "weight" in roles:
            out["weight"] = Full(total(g * normalised(accumulable(a.get())), layout))
        if "bias" in roles:
            out["bias"] = Full(total(g, layout))
        return out

    def takes_row_axis(axis: int, axes: int) -> bool:
        return axis < axes - trailing if trailing else axis == 0

    return Use(kind, by_role(weight=w, bias=b), parts, takes_row_axis, [a])


def _elementwise(
    kind: str,
    param: Lookup,
    left: Any,
    right: Any,
    through: Callable[[Tensor, Tensor, bool], Tensor],
    *,
    in_place: bool = False,
    reads_other: bool,
) -> Use | None:
    """output = left (op) right with one side a parameter, broadcast over the other.

    `through(g, other, on_left)` is the gradient of the parameter before the broadcast is undone.
    """
    p, on_left = (param(left), True) if param(left) else (param(right), False)
    other = right if on_left else left
    if p is None or p.transposed or not isinstance(other, Tensor) or param(other):
        return None
    if in_place and on_left:
        return None
    # An in-place product overwrites the very factor that its gradient needs.
    a = Saved(other.clone() if in_place and reads_other else other)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        if reads_other:
            g = through(accumulable(g), accumulable(a.get()), on_left)
        else:
            g = through(accumulable(g), g, on_left)
        return {"weight": Full(_unbroadcast(g, p.shape, layout))}

    return Use(kind, {"weight": p}, parts, _outside(p.shape), [a] if reads_other else [])


def mul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise("scale", param, input, other, lambda g, x, _: g * x, reads_other=True)


def imul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise(
        "scale", param, input, other, lambda g, x, _: g * x, in_place=True, reads_other=True
    )


def add(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise("shift", param, input, other, lambda g, *_: g, reads_other=False)


def iadd(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise(
        "shift", param, input, other, lambda g, *_: g, in_place=True, reads_other=False
    )


def sub(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise(
        "shift", param, input, other, lambda g, _, on_left: g if on_left else -g, reads_other=False
    )


def rsub(param: Lookup, input: Any, other: Any) -> Use | None:
    return sub(param, other, input)


def expand(param: Lookup, input: Any, *sizes: Any, **kwargs: Any) -> Use | None:
    """A parameter repeated for every row (class tokens): the gradient is summed back."""
    p = param(input)
    if p is None or p.transposed:
        return None

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        return {"weight": Full(_unbroadcast(accumulable(g), p.shape, layout))}

    return Use("expand", {"weight": p}, parts, _outside(p.shape))


def _unbroadcast(g: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Return g [S, *shape]: rows first, summed over where the parameter was repeated."""
    aligned = (1,) * (g.dim() - len(shape)) + tuple(shape)
    rest = [n for axis, n in enumerate(aligned) if axis != layout.axis]
    g = layout.rows_first(g)
    extra = g.dim() - 1 - len(rest)  # a flat axis was split in two
    repeated = [1 + i for i in range(extra)]
    repeated += [1 + extra + i for i, n in enumerate(rest) if n == 1]
    return (g.sum(repeated) if repeated else g).reshape(len(g), *shape)


def _outside(shape: torch.Size) -> Callable[[int, int], bool]:
    """Return the rule that the rows run along none of the parameter's own axes."""

    def takes_row_axis(axis: int, axes: int) -> bool:
        own = axis - (axes - len(shape))
        return own < 0 or shape[own] == 1

    return takes_row_axis
