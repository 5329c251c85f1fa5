"""Rows of a batch, whatever the batch is made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curate.scorers.protocol import Batch


def count_rows(batch: object) -> int:
    """Return the number of rows: a `Batch` says it, elsewhere the first tensor's first axis.

    Raises:
        ValueError: there is no tensor with a first axis in the batch.
    """
    if isinstance(batch, Batch):
        return batch.rows
    for tensor in tensors_of(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise ValueError("the batch holds no tensor whose first axis could be the rows")


def sequences_of(batch: object) -> tuple[int, Tensor | None]:
    """Return the number of sequences and, where it differs from the rows, each one's row."""
    if isinstance(batch, Batch) and batch.row_ids is not None:
        return len(batch.row_ids), batch.row_ids.long()
    return count_rows(batch), None


def select_rows(batch: Any, rows: Sequence[int]) -> Any:
    """Return the batch of these rows, in this order.

    Tensors whose first axis has one entry per row are indexed; everything else is kept as it is.
    """
    if isinstance(batch, Batch):
        return batch.select_rows(rows)
    return _select(batch, torch.as_tensor(rows), count_rows(batch))


def _select(value: Any, index: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        chosen = {k: _select(v, index, rows) for k, v in value.items()}
        return chosen if type(value) is dict else type(value)(chosen)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_select(v, index, rows) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_select(v, index, rows) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _select(getattr(value, f.name), index, rows) for f in fields(value)}
        )
    return value


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a batch in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_of(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_of(v)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from tensors_of(getattr(value, f.name))
