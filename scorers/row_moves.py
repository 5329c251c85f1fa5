"""Which torch functions move rows about, so that only the batch's values say where a row is.

Shapes: S sequences.

Sorting, routing and lists of rows put together by Python may keep the order in the probe's rows
and break it in others. What comes after them is not read off by position.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_T = Tensor
_ROUTES = {
    torch.gather, _T.gather, torch.index_select, _T.index_select, torch.take_along_dim,
    torch.scatter, _T.scatter, _T.scatter_, _T.scatter_add_, torch.scatter_add, _T.scatter_add,
    torch.index_add, _T.index_add, _T.index_add_, _T.index_copy_, _T.index_put_, torch.index_put,
    torch.masked_select, _T.masked_select, _T.masked_scatter, _T.masked_scatter_, torch.take,
    torch.repeat_interleave, _T.repeat_interleave,
}  # fmt: skip
_REORDERS = {
    torch.sort, _T.sort, torch.argsort, _T.argsort, torch.topk, _T.topk, torch.msort,
    _T.msort, torch.nonzero, _T.nonzero, torch.argwhere, _T.argwhere, torch.unique, _T.unique,
    torch.randperm, torch._VF._pack_padded_sequence,
}  # fmt: skip
_TAKES_K = {torch.topk, _T.topk}
_SORTS_FIRST = {torch.msort, _T.msort}
_JOINS = {torch.cat, torch.concat, torch.concatenate}
_STACKS = {torch.stack, torch.vstack}
_PICKS = {torch.index_select, _T.index_select}
_KEEPS = {_T.__getitem__, _T.to, _T.long, _T.unsqueeze, torch.unsqueeze, _T.view, _T.reshape}


class RowMoves:
    """Tells, call by call, what a forward pass over S sequences does to their order."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._counts: list[Tensor] = []  # arange(S): an index by it keeps the order

    def made(self, func: Callable[..., Any], args: tuple[Any, ...], out: object) -> None:
        """Take note of what a function returned."""
        if not isinstance(out, Tensor):
            return
        if func is torch.arange:
            if len(out) == self._sequences:
                self._counts.append(out)
        elif func in _KEEPS and args and self._counts_rows(args[0]):
            self._counts.append(out)

    def routes(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Return whether the call picks entries by value, or joins pieces that are not batches."""
        if func in _JOINS:
            pieces = _pieces(args, kwargs)
            return _along_first(pieces, args, kwargs) and not all(map(self._has_rows, pieces))
        return func in _ROUTES or func in _REORDERS or _indexes(func, args, kwargs)

    def reorders(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Return whether rows may come out of the call in another order."""
        if func in _REORDERS:
            return self._along_rows(func, args, kwargs)
        if func in _JOINS or func in _STACKS:
            # One piece per row, in an order that Python chose.
            pieces = _pieces(args, kwargs)
            new = 0 if func in _JOINS else 1
            return len(pieces) == self._sequences and _along_first(pieces, args, kwargs, new)
        if func in _PICKS:
            index = kwargs.get("index", args[-1])
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            is_first = dim in (0, -args[0].dim())
            return is_first and self._has_rows(args[0]) and not self._counts_rows(index)
        if func in (_T.__getitem__, _T.__setitem__) and self._has_rows(args[0]):
            if args[0].dtype == torch.bool:
                return False  # a mask: it holds nothing that a layer takes
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if type(first) is int:
                return func is _T.__setitem__
            return isinstance(first, (Tensor, list)) and not self._counts_rows(first)
        return False

    def _has_rows(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and len(x) == self._sequences

    def _counts_rows(self, index: object) -> bool:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            return True  # a mask keeps the order; what it leaves out shows in the shape
        return any(index is c for c in self._counts)

    def _along_rows(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Sorting along the row axis puts rows where only this batch's values say."""
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or x.dim() == 0:
            return False
        numbers = [a for a in args[2 if func in _TAKES_K else 1 :] if type(a) is int]
        dim = kwargs.get("dim", numbers[-1] if numbers else None)
        if dim is None:
            dim = 0 if func in _SORTS_FIRST else -1
        return x.dim() == 1 or x.shape[dim] == self._sequences


def _pieces(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    pieces = args[0] if args else kwargs.get("tensors", ())
    return pieces if isinstance(pieces, (list, tuple)) else ()


def _along_first(
    pieces: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], new: int = 0
) -> bool:
    """Return whether the pieces are joined along the first axis, of which `new` come to theirs."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return len(pieces) > 0 and dim in (0, -(pieces[0].dim() + new))


def _indexes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the call indexes by a tensor."""
    if func in (torch.where, _T.where):
        return len(args) + len(kwargs) == 1
    if func not in (_T.__getitem__, _T.__setitem__):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, (Tensor, list)) for i in index)
