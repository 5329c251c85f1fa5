"""Norms, scales and shifts: uses whose gradient is a plain sum over what it was repeated for.

Shapes: S sequences, C channels.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.elementwise import channel_products, channel_sum, norm_products, token_sum
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
    return _token_norm(
        "layer_norm", param, input, weight, bias, len(normalized_shape), eps, centred=True
    )


def rms_norm(
    param: Lookup, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Use | None:
    # The default eps is that of the input's own dtype, not of the dtype that we sum in.
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _token_norm(
        "rms_norm", param, input, weight, None, len(normalized_shape), eps, centred=False
    )


def group_norm(
    param: Lookup,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Use | None:
    def products(g: Tensor, x: Tensor) -> Tensor:
        normalised = F.group_norm(accumulable(x), num_groups, None, None, eps)
        return channel_products(_positions(normalised), _positions(g))

    return _channel_norm("group_norm", param, input, weight, bias, products)


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

    def products(g: Tensor, x: Tensor) -> Tensor:
        found = channel_products(_positions(x), _positions(g), mean)
        return found * (var.to(found.dtype) + eps).rsqrt()

    return _channel_norm("batch_norm", param, input, weight, bias, products)


def _token_norm(
    kind: str, param: Lookup, x: Tensor, weight: Any, bias: Any, trailing: int, eps: float,
    *, centred: bool,
) -> Use | None:  # fmt: skip
    """output = normalised(x) * w + b over the last `trailing` axes, token by token."""

    def tokens(y: Tensor, layout: Layout) -> Tensor:
        y, features = layout.rows_first(y), y.shape[y.dim() - trailing :]
        return y.reshape(len(y), prod(y.shape[1 : y.dim() - trailing]), features.numel())

    def products(g: Tensor, x: Tensor, layout: Layout) -> Tensor:
        found = norm_products(tokens(g, layout), tokens(x, layout), eps=eps, centred=centred)
        return found.view(-1, *x.shape[x.dim() - trailing :])

    def sums(g: Tensor, layout: Layout) -> Tensor:
        return token_sum(tokens(g, layout)).view(-1, *g.shape[g.dim() - trailing :])

    def takes_row_axis(axis: int, axes: int) -> bool:
        return axis < axes - trailing

    return _norm(kind, param, x, weight, bias, products, sums, takes_row_axis)


def _channel_norm(
    kind: str, param: Lookup, x: Tensor, weight: Any, bias: Any,
    products: Callable[[Tensor, Tensor], Tensor],
) -> Use | None:  # fmt: skip
    """output = normalised(x) * w + b per channel; `products(g, x)` is [N, C]."""
    return _norm(
        kind, param, x, weight, bias,
        lambda g, x, layout: per_channel(products(g, x), layout),
        lambda g, layout: per_channel(channel_sum(_positions(g)), layout),
        lambda axis, axes: axis == 0,
    )  # fmt: skip


def _norm(
    kind: str,
    param: Lookup,
    x: Tensor,
    weight: Any,
    bias: Any,
    products: Callable[[Tensor, Tensor, Layout], Tensor],
    sums: Callable[[Tensor, Layout], Tensor],
    takes_row_axis: Callable[[int, int], bool],
) -> Use | None:
    """output = normalised(x) * w + b, with the gradients of w and b per sequence."""
    w, b = param(weight), param(bias)
    if param(x) or any(p is not None and p.transposed for p in (w, b)):
        return None
    a = Saved(x)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        if "weight" in roles:
            out["weight"] = Full(products(g, a.get(), layout))
        if "bias" in roles:
            out["bias"] = Full(sums(g, layout))
        return out

    return Use(kind, by_role(weight=w, bias=b), parts, takes_row_axis, [a])


def _positions(x: Tensor) -> Tensor:
    """Return [N, C, positions]."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


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
    saved = [Saved(other.clone() if in_place else other)] if reads_other else []

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        factor = accumulable(saved[0].get()) if saved else g
        g = through(accumulable(g), factor, on_left)
        return {"weight": Full(_unbroadcast(g, p.shape, layout))}

    return Use(kind, {"weight": p}, parts, _outside(p.shape), saved)


def mul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise("scale", param, input, other, lambda g, x, _: g * x, reads_other=True)


def imul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise(
        "scale", param, input, other, lambda g, x, _: g * x, in_place=True, reads_other=True
    )


def add(param: Lookup, input: Any, other: Any, *, alpha: float | int = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise("shift", param, input, other, lambda g, *_: g, reads_other=False)


def iadd(param: Lookup, input: Any, other: Any, *, alpha: float | int = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise(
        "shift", param, input, other, lambda g, *_: g, in_place=True, reads_other=False
    )


def sub(param: Lookup, input: Any, other: Any, *, alpha: float | int = 1) -> Use | None:
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


def repeat(param: Lookup, input: Any, *sizes: Any) -> Use | None:
    """The same by a copy; not where the parameter stands side by side with itself."""
    p = param(input)
    counts = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if p is None or any(
        n > 1 and count != 1 for n, count in zip(reversed(p.shape), reversed(counts), strict=False)
    ):
        return None
    return expand(param, input)


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
