"""What is taken for keeping the order of rows does keep it, whatever the values are.

The oracle: a function keeps the rows in place if a row's result stays where it is, and as it is,
whatever another row holds.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.scorers.row_moves import RowMoves

S = 3


def moves(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, bool]:
    """Return whether the call routes, and whether it reorders."""
    told = RowMoves(S)
    return told.routes(func, args, kwargs), told.reorders(func, args, kwargs)


def results(func: Callable[..., Any], axis: int, *rest: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return what comes of S rows along an axis of [4, 4, 4], before and after two change."""
    sizes = [4, 4, 4]
    sizes[axis] = S
    x = torch.arange(float(torch.Size(sizes).numel())).view(sizes)
    y = x.clone()
    y.select(axis, 1).add_(1000.0)  # is now the largest
    y.select(axis, 2).sub_(1000.0)
    outs = [func(z, *rest, **kwargs) for z in (x, y)]
    return tuple(o if isinstance(o, Tensor) else o[0] for o in outs)


SORTS = [
    (torch.sort, (), {}), (torch.sort, (0,), {}), (torch.sort, (), {"dim": 1}),
    (Tensor.sort, (-2,), {}), (torch.msort, (), {}), (Tensor.msort, (), {}),
    (torch.argsort, (2, True), {}),
    (torch.topk, (1,), {}), (torch.topk, (2,), {}), (torch.topk, (2, 0), {}),
    (Tensor.topk, (3,), {}), (Tensor.topk, (2,), {"dim": -3}), (Tensor.topk, (), {"k": 1}),
]  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("func", "rest", "kwargs"), SORTS)
def test_sorting_along_the_rows_is_seen_and_no_other(func, rest, kwargs, axis) -> None:
    before, after = results(func, axis, *rest, **kwargs)
    is_kept = before.shape[axis] == S and torch.equal(before.select(axis, 0), after.select(axis, 0))
    x = torch.zeros(*(S if d == axis else 4 for d in range(3)))
    assert moves(func, x, *rest, **kwargs) == (True, not is_kept)


def test_sorting_one_number_a_row() -> None:
    assert moves(torch.topk, torch.zeros(S), 2) == (True, True)
    assert moves(torch.nonzero, torch.zeros(S)) == (True, True)
    assert moves(torch.argwhere, torch.zeros(S)) == (True, True)
    assert moves(torch.randperm, S) == (True, False)  # what is picked by it is seen


@pytest.mark.parametrize("dim", [0, -2, 1, -1])
def test_rows_put_together_by_python_may_be_in_any_order(dim) -> None:
    along_rows = dim in (0, -2)
    rows = [torch.zeros(1, 4)] * S
    assert moves(torch.cat, rows, dim) == (along_rows, along_rows)
    assert moves(torch.cat, tensors=rows, dim=dim) == (along_rows, along_rows)
    batches = [torch.zeros(S, 4)] * 2
    assert moves(torch.cat, batches, dim) == (False, False)
    numbers = [torch.zeros(4)] * S
    assert moves(torch.stack, numbers, dim) == (False, along_rows)
    assert moves(torch.vstack, numbers) == (False, True)


def test_rows_picked_by_an_index() -> None:
    x, index = torch.zeros(S, 4), torch.tensor([2, 0, 1])
    for dim in (0, -2):
        assert moves(torch.index_select, x, dim, index) == (True, True)
        assert moves(Tensor.index_select, x, dim=dim, index=index) == (True, True)
    assert moves(torch.index_select, x, 1, index) == (True, False)
    assert moves(Tensor.__getitem__, x, index) == (True, True)
    assert moves(Tensor.__getitem__, x, (index, 0)) == (True, True)
    assert moves(Tensor.__getitem__, x, [2, 0, 1]) == (True, True)
    assert moves(Tensor.__getitem__, x, (slice(None), index)) == (True, False)
    assert moves(Tensor.__getitem__, x, slice(1, None)) == (False, False)
    assert moves(Tensor.__getitem__, x > 0, index) == (True, False)  # a mask holds no row
    assert moves(Tensor.__getitem__, x, x[:, 0] > 0) == (True, False)  # and keeps the order
    assert moves(Tensor.__getitem__, torch.zeros(5, 4), index) == (True, False)  # no rows there


def test_a_row_written_at_its_number() -> None:
    x = torch.zeros(S, 4)
    assert moves(Tensor.__getitem__, x, 1) == (False, False)
    assert moves(Tensor.__setitem__, x, 1, torch.ones(4)) == (False, True)
    assert moves(Tensor.__setitem__, x, (slice(None), 1), torch.ones(S)) == (False, False)


def test_an_index_that_counts_the_rows_keeps_their_order() -> None:
    told, x = RowMoves(S), torch.zeros(S, 4)
    count = torch.arange(S)
    assert told.reorders(Tensor.__getitem__, (x, count), {})
    told.made(torch.arange, (S,), count)
    column = count[:, None]
    told.made(Tensor.__getitem__, (count, (slice(None), None)), column)
    for index in (count, column, (count, torch.tensor([3, 1, 0]))):
        assert not told.reorders(Tensor.__getitem__, (x, index), {})
        assert told.routes(Tensor.__getitem__, (x, index), {})
    assert not told.reorders(torch.index_select, (x, 0, count), {})
    longer, doubled = torch.arange(S + 1), count * 2
    told.made(torch.arange, (S + 1,), longer)
    told.made(Tensor.__mul__, (count, 2), doubled)
    assert told.reorders(Tensor.__getitem__, (x, longer), {})
    assert told.reorders(Tensor.__getitem__, (x, doubled), {})


def test_where_with_a_condition_alone_gives_places() -> None:
    condition = torch.tensor([True, False, True])
    assert moves(torch.where, condition) == (True, False)
    assert moves(torch.where, condition, condition, condition) == (False, False)
    assert moves(torch.gather, torch.zeros(S, 4), 1, torch.zeros(S, 1)) == (True, False)
