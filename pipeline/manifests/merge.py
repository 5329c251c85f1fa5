"""Selections side by side: rows of several manifests in step, by (shard, row), in bounded memory.

Shapes: S selections, N distinct rows of a window.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

Source = Callable[[], Iterable[pa.RecordBatch]]
"""Gives the rows of a selection anew each time: `shard`, `row` and more, sorted by both."""

ROW_BITS = 40  # a shard of 10^12 rows, 8 million shards


@dataclass(frozen=True)
class Window:
    """All rows of some range that are in any of the selections, once each and in order."""

    keys: Int64[ndarray, " n"]
    present: Bool[ndarray, "s n"]
    weight: Float32[ndarray, "s n"]
    """1 where the selection has no weights; meaningless where the row is not present."""

    rows: pa.Table
    """`shard`, `row` and the further columns as the first selection that has the row gives them."""


def windows(sources: Sequence[Source], further: Sequence[Sequence[str]]) -> Iterator[Window]:
    """Yield the rows of all selections, range by range; memory is a batch of each.

    `further` names for each selection the columns that come along; null where it has none of them.
    """
    streams = [_Stream(source(), names) for source, names in zip(sources, further, strict=True)]
    while any(stream.has_rows() for stream in streams):
        # Every stream is complete up to the smallest last key that is in hand.
        limit = min(stream.last for stream in streams if stream.has_rows())
        yield _window([stream.take(limit) for stream in streams])


class _Stream:
    """A selection, read up to a key at a time."""

    def __init__(self, batches: Iterable[pa.RecordBatch], further: Sequence[str]) -> None:
        self._batches, self._columns = iter(batches), ["shard", "row", *further]
        self._held: pa.RecordBatch | None = None
        self._keys = np.empty(0, dtype=np.int64)

    def has_rows(self) -> bool:
        """True unless all is taken; reads on where nothing is in hand."""
        while not len(self._keys):
            self._held = next(self._batches, None)
            if self._held is None:
                return False
            self._keys = row_keys(self._held)
        return True

    @property
    def last(self) -> int:
        return int(self._keys[-1])

    def take(self, limit: int) -> "_Piece | None":
        """Return the rows in hand up to that key; None if there are none."""
        if self._held is None or not len(self._keys):
            return None
        stop = int(np.searchsorted(self._keys, limit, side="right"))
        rows = self._held.slice(0, stop)
        piece = _Piece(self._keys[:stop], _weights(rows), rows.select(self._columns))
        self._held, self._keys = self._held.slice(stop), self._keys[stop:]
        return piece if stop else None


@dataclass(frozen=True)
class _Piece:
    keys: Int64[ndarray, " n"]
    weight: Float32[ndarray, " n"]
    rows: pa.RecordBatch


def row_keys(batch: pa.RecordBatch) -> Int64[ndarray, " n"]:
    """Return one number per row that orders as (shard, row) does."""
    shard = batch.column("shard").to_numpy().astype(np.int64)
    return np.asarray((shard << ROW_BITS) + batch.column("row").to_numpy())


def _window(pieces: Sequence[_Piece | None]) -> Window:
    there = [piece for piece in pieces if piece is not None]
    keys, first = np.unique(np.concatenate([p.keys for p in there]), return_index=True)
    present = np.zeros((len(pieces), len(keys)), dtype=bool)
    weight = np.ones((len(pieces), len(keys)), dtype=np.float32)
    for i, piece in enumerate(pieces):
        if piece is not None:
            at = np.searchsorted(keys, piece.keys)
            present[i, at] = True
            weight[i, at] = piece.weight
    tables = [pa.Table.from_batches([piece.rows]) for piece in there]
    rows = pa.concat_tables(tables, promote_options="default").take(pa.array(first))
    return Window(keys, present, weight, rows)


def _weights(rows: pa.RecordBatch) -> Float32[ndarray, " n"]:
    if "weight" not in rows.schema.names:
        return np.ones(rows.num_rows, dtype=np.float32)
    return np.asarray(rows.column("weight").fill_null(1.0).to_numpy(zero_copy_only=False))
