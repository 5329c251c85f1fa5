"""Rows in model-ready form, with those that cannot be used found and left out.

Shapes: N rows of a source, B rows of a batch.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.row_source import ROW, SHARD, RowSource
from curate.pipeline.tasks.task import Task
from curate.scorers.protocol import Batch

HELD_BYTES = 1 << 30
"""A source whose encoded and collated rows take no more is encoded once and held in memory."""
CHUNK_ROWS = 1024
SAID = 5
"""Bad rows that are named while training goes on; their number is said when it ends."""

log = logging.getLogger("curate.train")


@dataclass
class BadRows:
    """Rows that training leaves out, by (shard, row), each with the reason.

    The first `said` are named as they are found.
    """

    said: int = SAID
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, shard: int, row: int, reason: str) -> None:
        if (shard, row) not in self.reasons:
            self.reasons[shard, row] = reason
            level = logging.WARNING if len(self.reasons) <= self.said else logging.DEBUG
            log.log(level, "row %d of shard %d is left out: %s", row, shard, reason)
            if len(self.reasons) == self.said + 1 > 1:
                log.warning("more rows are left out; -v names them all")

    def first(self) -> str:
        """Say what is wrong with one of them."""
        for (shard, row), reason in self.reasons.items():
            return f"row {row} of shard {shard}: {reason}"
        return "there are none"


def encode(
    task: Task, rows: pa.Table, bad: BadRows
) -> tuple[pa.Table | None, Int64[ndarray, " n"]]:
    """Return the usable rows, encoded, and which of the rows they are; the others go to `bad`.

    A row is bad when `task` raises ValueError for it alone. Bisection finds one among B in about
    2 log2 B attempts. Rows that are fine alone but cannot be collated together are no row's fault:
    that error comes out of the caller's own `collate`.
    """
    good = list(_usable(task, rows, 0, bad))
    if not good:
        return None, np.empty(0, dtype=np.int64)
    kept = np.concatenate([np.arange(start, start + t.num_rows) for start, t in good])
    return pa.concat_tables([t for _, t in good]), kept


def _usable(task: Task, rows: pa.Table, start: int, bad: BadRows) -> Iterator[tuple[int, pa.Table]]:
    """Yield runs of usable rows, encoded, each with the place of its first row."""
    if not rows.num_rows:
        return
    try:
        encoded = task.encode(rows)
        task.collate(encoded)
    except ValueError as reason:
        if rows.num_rows == 1:
            bad.add(rows[SHARD][0].as_py(), rows[ROW][0].as_py(), str(reason))
            return
        half = rows.num_rows // 2
        yield from _usable(task, rows.slice(0, half), start, bad)
        yield from _usable(task, rows.slice(half), start + half, bad)
        return
    yield start, encoded


class HeldRows:
    """All rows of a source, encoded once; collated once too where rows do not pad each other."""

    def __init__(self, source: RowSource, task: Task, device: str, bad: BadRows) -> None:
        tables = []
        self._at = np.full(len(source), -1, dtype=np.int64)  # row of the table, by position
        rows = 0
        for start in range(0, len(source), CHUNK_ROWS):
            positions = np.arange(start, min(start + CHUNK_ROWS, len(source)))
            table, kept = encode(task, source.take(positions), bad)
            if table is not None:
                self._at[positions[kept]] = np.arange(rows, rows + table.num_rows)
                rows += table.num_rows
                tables.append(table)
        if not tables:
            raise ValueError(f"no row of {source.corpus.uri} can be trained on; {bad.first()}")
        self._task, self._device = task, device
        self._table = pa.concat_tables(tables).combine_chunks()
        self._whole = _collated(task, self._table, device)

    def batch(self, positions: Int64[ndarray, " b"]) -> tuple[Batch | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as a batch, and which of them they are."""
        kept = np.flatnonzero(self._at[positions] >= 0)
        if not len(kept):
            return None, kept
        at = self._at[positions[kept]]
        if self._whole is None:
            return self._task.collate(self._table.take(pa.array(at))).to(self._device), kept
        index = torch.from_numpy(at).to(self._device)
        inputs = {name: value[index] for name, value in self._whole.inputs.items()}
        return Batch(inputs, self._whole.targets[index], len(at)), kept

    def encoded(
        self, positions: Int64[ndarray, " b"]
    ) -> tuple[pa.Table | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as the task encodes them, and which they are."""
        kept = np.flatnonzero(self._at[positions] >= 0)
        if not len(kept):
            return None, kept
        return self._table.take(pa.array(self._at[positions[kept]])), kept


@dataclass(frozen=True)
class PickedRows:
    """Some of the rows that are held for a larger source."""

    held: HeldRows
    at: Int64[ndarray, " k"]  # where each position stands in the larger source

    def batch(self, positions: Int64[ndarray, " b"]) -> tuple[Batch | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as a batch, and which of them they are."""
        return self.held.batch(self.at[positions])

    def encoded(
        self, positions: Int64[ndarray, " b"]
    ) -> tuple[pa.Table | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as the task encodes them, and which they are."""
        return self.held.encoded(self.at[positions])


class StreamedRows:
    """Rows of a source of any size, encoded batch by batch."""

    def __init__(self, source: RowSource, task: Task, device: str, bad: BadRows) -> None:
        self._source, self._task, self._device, self._bad = source, task, device, bad

    def batch(self, positions: Int64[ndarray, " b"]) -> tuple[Batch | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as a batch, and which of them they are."""
        rows = self._source.take(positions)
        try:
            batch = self._task.collate(self._task.encode(rows))
        except ValueError:
            table, kept = encode(self._task, rows, self._bad)
            if table is None:
                return None, kept
            return self._task.collate(table).to(self._device), kept
        return batch.to(self._device), np.arange(len(positions))

    def encoded(
        self, positions: Int64[ndarray, " b"]
    ) -> tuple[pa.Table | None, Int64[ndarray, " n"]]:
        """Return the usable rows among `positions` as the task encodes them, and which they are."""
        return encode(self._task, self._source.take(positions), self._bad)


def trainable_rows(
    source: RowSource, task: Task, device: str, bad: BadRows, presentations: int
) -> HeldRows | StreamedRows:
    """Return the rows held in memory where they fit and are seen at least once each."""
    if presentations >= len(source) and _fit_in_memory(source, task):
        return HeldRows(source, task, device, bad)
    return StreamedRows(source, task, device, bad)


def _fit_in_memory(source: RowSource, task: Task) -> bool:
    """Judge by the first thousand rows; one of them all bad counts as no."""
    positions = np.arange(min(CHUNK_ROWS, len(source)))
    table, _ = encode(task, source.take(positions), BadRows(said=0))
    if table is None:
        return False
    # Collating turns bytes into float32: up to four times as much again.
    return bool(5 * table.nbytes / table.num_rows * len(source) <= HELD_BYTES)


def _collated(task: Task, table: pa.Table, device: str) -> Batch | None:
    """Return all rows as one batch, if a slice of it is the batch of those rows bit for bit."""
    if np.unique(task.cost(table)).size != 1:
        return None
    whole = task.collate(table)
    if whole.row_ids is not None or whole.weights is not None:
        return None
    picks = np.unique([0, table.num_rows // 2, table.num_rows - 1])
    few = task.collate(table.take(pa.array(picks)))
    if not _same(few, whole, picks.tolist()):
        return None
    return whole.to(device)


def _same(few: Batch, whole: Batch, picks: Sequence[int]) -> bool:
    """True if `few` is what picking rows from `whole` gives; a batch-wide input is none."""
    tensors = [(few.targets, whole.targets)]
    if few.inputs.keys() != whole.inputs.keys():
        return False
    tensors += [(few.inputs[name], whole.inputs[name]) for name in few.inputs]
    return all(
        b.dim() > 0 and len(b) == whole.rows and a.dtype == b.dtype and torch.equal(a, b[picks])
        for a, b in tensors
    )
