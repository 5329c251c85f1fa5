"""What one use of a parameter in a forward pass contributes to the parameter's per-row gradient.

Shapes: S sequences, T tokens or positions, O and I the sides of a matrix, g groups.

A use keeps what it needs of its inputs; given the gradient g of its output it returns, for each
of its parameters, a part: factors whose product is the gradient, never a matrix's gradient itself.
`read_use` recognises torch functions; what it does not recognise has another path (fallback.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.grad_norm import accumulable
from curate.scorers.parts import Full, Indexed, Layout, Pair, Part


class Overwritten(Exception):
    """An input was changed in place between the use and the backward pass.

    With frozen weights autograd does not notice: it has no need of that input itself.
    """


class Saved:
    """A tensor as it was when it was used."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def keep_copy(self) -> None:
        """Outlive a change in place."""
        self._tensor = self._tensor.clone()
        self._version = self._tensor._version

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise Overwritten
        return self._tensor


@dataclass(frozen=True)
class Param:
    """A parameter, or its transpose, as a function received it."""

    name: str
    shape: torch.Size
    transposed: bool = False


@dataclass
class Use:
    """One call that consumed parameters. `params` are by role: weight, bias."""

    kind: str
    params: dict[str, Param]
    parts: Callable[[Tensor, Layout, frozenset[str]], dict[str, Part]]
    """From the output's gradient, its layout and the roles wanted, to one part per role."""
    takes_row_axis: Callable[[int, int], bool]
    """Whether the rows may run along this axis of an output of so many axes."""
    saved: list[Saved] = field(default_factory=list)
    may_be_shared: bool = False
    """The output may be the same for all rows (a look-up of positions [1, T])."""


Lookup = Callable[[object], Param | None]


def read_use(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], param: Lookup
) -> Use | None:
    """Return how this call uses parameters, or None if it is not one that we know exactly."""
    reader = READERS.get(func)
    if reader is None:
        return None
    try:
        return reader(param, *args, **kwargs)
    except TypeError:  # arguments in a form that the reader does not take (out=, names, ...)
        return None


# -- matrices ------------------------------------------------------------------------------------


def _linear(param: Lookup, input: Tensor, weight: Any, bias: Any = None) -> Use | None:
    w, b = param(weight), param(bias)
    if param(input) or weight.dim() != 2:
        return None
    return _matrix_product("linear", input, w, b, output_is_rows=True)


def _addmm(
    param: Lookup, input: Any, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> Use | None:
    w, b = param(mat2), param(input)
    if param(mat1) or beta != 1 or alpha != 1 or (b is not None and len(b.shape) != 1):
        return None
    return _matrix_product("linear", mat1, w, b, output_is_rows=False)


def _matmul(param: Lookup, input: Tensor, other: Any) -> Use | None:
    w = param(other)
    if w is None or param(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return _matrix_product("linear", input, w, None, output_is_rows=False)


def _matrix_product(
    kind: str, x: Tensor, w: Param | None, b: Param | None, *, output_is_rows: bool
) -> Use:
    """output = x @ W^T + b, W [O, I] stored as the parameter (or its transpose)."""
    a = Saved(x)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        g = _tokens(layout.rows_first(g))
        if "weight" in roles and w is not None:
            left, right = g[:, None], _tokens(layout.rows_first(a.get()))[:, None]
            swap = output_is_rows == w.transposed
            out["weight"] = Pair(right, left) if swap else Pair(left, right)
        if "bias" in roles and b is not None:
            out["bias"] = Full(accumulable(g).sum(1))
        return out

    return Use(kind, _roles(weight=w, bias=b), parts, _not_last, [a])


def _conv(
    param: Lookup,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    w, b = param(weight), param(bias)
    if param(input) or input.dim() != weight.dim() or (w is not None and w.transposed):
        return None
    a, kernel, n = Saved(input), tuple(weight.shape[2:]), weight.dim() - 2
    stride, dilation = _tuple(stride, n), _tuple(dilation, n)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        if "weight" in roles:
            patches = unfold(a.get(), kernel, stride, padding, dilation, groups)
            left = g.reshape(len(g), groups, -1, math.prod(g.shape[2:])).mT
            out["weight"] = Pair(*(_positions(layout.rows_first(x)) for x in (left, patches)))
        if "bias" in roles:
            out["bias"] = Full(_per_channel(accumulable(g), layout))
        return out

    return Use(f"conv{n}d", _roles(weight=w, bias=b), parts, _first, [a])


def unfold(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Any,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the patches [N, groups, positions, C / groups * kernel] a convolution reads."""
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [(s // 2, s - s // 2) for s in spans]
    else:
        sides = [(p, p) for p in _tuple(0 if padding == "valid" else padding, len(kernel))]
    x = F.pad(x, [p for side in reversed(sides) for p in side])
    for axis, (span, step, d) in enumerate(zip(spans, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, span + 1, step)[..., ::d]
    n = len(kernel)
    x = x.view(len(x), groups, -1, *x.shape[2:])  # [N, groups, C / groups, *positions, *kernel]
    x = x.movedim(2, 2 + n).flatten(2 + n)  # channels beside the kernel, as in the weight
    return x.flatten(2, 1 + n)


# -- tables --------------------------------------------------------------------------------------


def _embedding(
    param: Lookup,
    weight: Any,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    w = param(weight)
    if w is None or w.transposed or scale_grad_by_freq:
        return None
    a = Saved(indices)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        g = _tokens(layout.rows_first(g))
        index = layout.rows_first(layout.spread(a.get())).reshape(len(g), -1)
        if padding_idx >= 0:
            g = g.masked_fill((index == padding_idx)[..., None], 0.0)
        return {"weight": Indexed(index, g)}

    return Use("embedding", {"weight": w}, parts, _not_last, [a], may_be_shared=True)


# -- norms ---------------------------------------------------------------------------------------


def _layer_norm(
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


def _rms_norm(
    param: Lookup, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Use | None:
    # The default eps is that of the input's own dtype, not of the dtype that we sum in.
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _norm(
        "rms_norm", param, input, weight, None, len(normalized_shape),
        lambda x: F.rms_norm(x, list(normalized_shape), None, eps),
    )  # fmt: skip


def _group_norm(
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


def _batch_norm(
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
            return _per_channel(y, layout)
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

    return Use(kind, _roles(weight=w, bias=b), parts, takes_row_axis, [a])


# -- elementwise ---------------------------------------------------------------------------------


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


def _mul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise("scale", param, input, other, lambda g, x, _: g * x, reads_other=True)


def _imul(param: Lookup, input: Any, other: Any) -> Use | None:
    return _elementwise(
        "scale", param, input, other, lambda g, x, _: g * x, in_place=True, reads_other=True
    )


def _add(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise("shift", param, input, other, lambda g, *_: g, reads_other=False)


def _iadd(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise(
        "shift", param, input, other, lambda g, *_: g, in_place=True, reads_other=False
    )


def _sub(param: Lookup, input: Any, other: Any, *, alpha: float = 1) -> Use | None:
    if alpha != 1:
        return None
    return _elementwise(
        "shift", param, input, other, lambda g, _, on_left: g if on_left else -g, reads_other=False
    )


def _rsub(param: Lookup, input: Any, other: Any) -> Use | None:
    return _sub(param, other, input)


def _expand(param: Lookup, input: Any, *sizes: Any, **kwargs: Any) -> Use | None:
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


def _first(axis: int, axes: int) -> bool:
    return axis == 0


def _not_last(axis: int, axes: int) -> bool:
    return axis < axes - 1


def _outside(shape: torch.Size) -> Callable[[int, int], bool]:
    """Return the rule that the rows run along none of the parameter's own axes."""

    def takes_row_axis(axis: int, axes: int) -> bool:
        own = axis - (axes - len(shape))
        return own < 0 or shape[own] == 1

    return takes_row_axis


def _per_channel(g: Tensor, layout: Layout) -> Tensor:
    """Return [S, C] from [N, C, *positions]."""
    g = g.flatten(2).sum(2) if g.dim() > 2 else g
    g = layout.rows_first(g)
    return g.sum(1) if g.dim() == 3 else g


def _tokens(x: Tensor) -> Tensor:
    """Return [S, T, c] from [S, *, c], all between taken as tokens."""
    return x.reshape(len(x), -1, x.shape[-1])


def _positions(x: Tensor) -> Tensor:
    """Return [S, g, T, c] from [S, g, T, c] or, with several images a row, [S, f, g, T, c]."""
    return x if x.dim() == 4 else x.transpose(1, 2).flatten(2, 3)


def _roles(**params: Param | None) -> dict[str, Param]:
    return {role: p for role, p in params.items() if p is not None}


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


Reader = Callable[..., Use | None]
_T = Tensor
READERS: dict[Callable[..., Any], Reader] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, _T.addmm), _addmm),
    **dict.fromkeys((torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm), _matmul),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv),
    torch.embedding: _embedding,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
    torch.group_norm: _group_norm,
    torch.batch_norm: _batch_norm,
    **dict.fromkeys((torch.mul, torch.multiply, _T.mul, _T.multiply), _mul),
    **dict.fromkeys((_T.__mul__, _T.__rmul__), _mul),
    **dict.fromkeys((_T.mul_, _T.__imul__), _imul),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), _add),
    **dict.fromkeys((_T.add_, _T.__iadd__), _iadd),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__), _sub),
    _T.__rsub__: _rsub,
    **dict.fromkeys((_T.expand, _T.expand_as, _T.repeat, torch.broadcast_to), _expand),
}
"""Functions that we know exactly. Division and the like go through the fallback paths."""

_TRANSPOSES = {_T.t, torch.t, _T.T.__get__, _T.mT.__get__}  # type: ignore[attr-defined]
_SWAPS = {_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes}
_CASTS = {_T.to, _T.float, _T.double, _T.half, _T.bfloat16, _T.type_as, _T.contiguous, _T.type}


def read_alias(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], p: Param
) -> Param | None:
    """Return the parameter under its new form if the call only transposed or cast it."""
    if func in _CASTS:
        return p
    if len(p.shape) != 2:
        return None
    swapped = sorted(int(d) % 2 for d in args[1:] if isinstance(d, int)) == [0, 1]
    if func in _TRANSPOSES or (func in _SWAPS and swapped and not kwargs):
        return Param(p.name, p.shape, not p.transposed)
    return None
