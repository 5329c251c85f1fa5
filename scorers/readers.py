"""The torch functions whose use of a parameter is known exactly, and who reads them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers import conv_uses, head_uses
from curate.scorers import elementwise_uses as elementwise
from curate.scorers import product_uses as product
from curate.scorers.uses import Lookup, Param, Use

Reader = Callable[..., Use | None]
_T = Tensor
READERS: dict[Callable[..., Any], Reader] = {
    F.linear: product.linear,
    linear_cross_entropy: head_uses.linear_cross_entropy,
    **dict.fromkeys((torch.addmm, _T.addmm), product.addmm),
    **dict.fromkeys((torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm), product.matmul),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv_uses.conv),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        conv_uses.conv_transpose,
    ),
    torch.embedding: product.embedding,
    torch.layer_norm: elementwise.layer_norm,
    torch.rms_norm: elementwise.rms_norm,
    torch.group_norm: elementwise.group_norm,
    torch.batch_norm: elementwise.batch_norm,
    **dict.fromkeys((torch.mul, torch.multiply, _T.mul, _T.multiply), elementwise.mul),
    **dict.fromkeys((_T.__mul__, _T.__rmul__), elementwise.mul),
    **dict.fromkeys((_T.mul_, _T.__imul__), elementwise.imul),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), elementwise.add),
    **dict.fromkeys((_T.add_, _T.__iadd__), elementwise.iadd),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__), elementwise.sub),
    _T.__rsub__: elementwise.rsub,
    **dict.fromkeys((_T.expand, _T.expand_as, torch.broadcast_to), elementwise.expand),
    _T.repeat: elementwise.repeat,
}
"""Functions that we know exactly. Division and the like go through the fallback paths."""


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


_TRANSPOSES = {_T.t, torch.t, _T.T.__get__, _T.mT.__get__}  # type: ignore[attr-defined]
_SWAPS = {_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes}
_SHIFTS = {torch.add, _T.add, _T.__add__, _T.__radd__}
_CASTS = {_T.to, _T.float, _T.double, _T.half, _T.bfloat16, _T.type_as, _T.contiguous, _T.type}


def read_alias(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], p: Param
) -> Param | None:
    """Return the parameter under its new form if its gradient is the same or transposed: a cast,
    a transpose, or a vector with a number added (Gemma's norms scale by 1 + weight)."""
    if func in _CASTS:
        return p
    if func in _SHIFTS and len(p.shape) == 1 and not kwargs:
        return p if len(args) == 2 and isinstance(args[1], (int, float)) else None
    if len(p.shape) != 2:
        return None
    swapped = sorted(int(d) % 2 for d in args[1:] if isinstance(d, int)) == [0, 1]
    if func in _TRANSPOSES or (func in _SWAPS and swapped and not kwargs):
        return Param(p.name, p.shape, not p.transposed)
    return None
