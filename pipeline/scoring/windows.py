"""Windows of a unit: read and encoded one ahead, rows that cannot be encoded taken out."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.tasks.task import Task

Groups = list[tuple[list[int], str | None]]
"""Rows that may share a batch, or rows that cannot be run at all, with the reason."""


class Ledger(Protocol):
    """Where a unit notes what it is about to do, and learns what killed it before."""

    def step(self, kind: str, key: str | None) -> None: ...

    def groups(self, kind: str, key: str, rows: list[int]) -> Groups: ...


class NoLedger:
    """Notes nothing: for tests and timing."""

    def step(self, kind: str, key: str | None) -> None: ...

    def groups(self, kind: str, key: str, rows: list[int]) -> Groups:
        return [(rows, None)]


@dataclass
class Window:
    """Consecutive rows of a unit: as read, and as encoded without those that cannot be."""

    number: int
    start: int
    raw: pa.Table
    encoded: pa.Table | None = None
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    errors: dict[int, str] = field(default_factory=dict)


def windows(work: Work, unit: Unit, task: Task | None, ledger: Ledger) -> Iterator[Window]:
    """Yield the unit's windows, encoded unless `task` is None; the next is made in a thread."""
    return _ahead(_windows(work, unit, task, ledger), work.threads)


def _windows(work: Work, unit: Unit, task: Task | None, ledger: Ledger) -> Iterator[Window]:
    raws = raw_windows(work, unit)
    rows = 0
    for number in itertools.count():
        ledger.step("encode", str(number))
        inside = list(range(rows, min(rows + work.plan.window_rows, unit.rows)))
        groups = ledger.groups("encode", str(number), inside) if task and inside else []
        window = next(raws, None)
        if window is None:
            break
        assert window.raw.num_rows == len(inside), "a window has as many rows as planned"
        if task is not None:
            encode_window(window, task, groups)
        ledger.step("encode", None)
        yield window
        rows += window.raw.num_rows
    ledger.step("encode", None)
    assert rows == unit.rows or not work.columns, "the corpus gave fewer rows than planned"


def encode_window(window: Window, task: Task, groups: Groups) -> None:
    """Encode the window's rows but those that are known to kill."""
    lethal = {p: reason for rows, reason in groups if reason is not None for p in rows}
    window.errors.update(lethal)
    n = window.raw.num_rows
    allowed = np.array([i for i in range(n) if window.start + i not in lethal], dtype=np.int64)
    rows = window.raw.take(pa.array(allowed)) if lethal else window.raw
    window.encoded, good, errors = encode_rows(task.encode, rows)
    window.positions = window.start + allowed[good]
    window.errors.update({window.start + int(allowed[i]): why for i, why in errors.items()})


def encode_rows(
    encode: Callable[[pa.Table], pa.Table], rows: pa.Table
) -> tuple[pa.Table | None, np.ndarray, dict[int, str]]:
    """Return the rows that can be encoded, which they are, and why the others cannot."""
    good: list[pa.Table] = []
    indices: list[np.ndarray] = []
    errors: dict[int, str] = {}

    def try_range(start: int, stop: int) -> None:
        try:
            encoded = encode(rows.slice(start, stop - start))
            assert encoded.num_rows == stop - start, "encode gives one row for each"
        except Exception as error:  # a row's fault until one row is left
            if stop - start == 1:
                errors[start] = said(error)
                return
            middle = (start + stop) // 2
            try_range(start, middle)
            try_range(middle, stop)
        else:
            good.append(encoded)
            indices.append(np.arange(start, stop))

    if rows.num_rows:
        try_range(0, rows.num_rows)
    if not good:
        return None, np.zeros(0, dtype=np.int64), errors
    table = pa.concat_tables(good, promote_options="default").combine_chunks()
    return table, np.concatenate(indices), errors


def raw_windows(work: Work, unit: Unit) -> Iterator[Window]:
    """Yield windows of `window_rows` rows, whatever blocks and shards they come from."""
    columns = work.columns
    if not columns:
        return
    start = 0
    for number, batches in enumerate(_chunks(work, unit, columns)):
        window = Window(number, start, pa.Table.from_batches(batches))
        yield window
        start += window.raw.num_rows


def _chunks(work: Work, unit: Unit, columns: list[str]) -> Iterator[list[pa.RecordBatch]]:
    size = work.plan.window_rows
    waiting: list[pa.RecordBatch] = []
    held = 0
    for span in unit.spans:
        for batch in work.corpus.read(span.shard, span.start, span.rows, columns, size):
            while held + batch.num_rows >= size:
                yield [*waiting, batch.slice(0, size - held)]
                batch, waiting, held = batch.slice(size - held), [], 0
            waiting.append(batch)
            held += batch.num_rows
    if held:
        yield waiting


def _ahead(made: Iterator[Window], threads: int) -> Iterator[Window]:
    """Yield the windows while the next one is made ready in a thread."""
    ready = partial(torch.set_num_threads, threads)
    with ThreadPoolExecutor(1, "curate-read", initializer=ready) as pool:
        coming = pool.submit(next, made, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, made, None)
            yield window


def said(error: Exception) -> str:
    """Return one line for the `error` column."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return "the row alone does not fit in memory"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
