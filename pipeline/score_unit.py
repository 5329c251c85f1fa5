"""The unit function: read, encode, batch, score; the same on every engine.

`score_unit` is a pure function of the work and the unit. Rows fail alone: what raises or is not
finite is halved until single rows are left, and the rest is scored again without them.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from curate.pipeline.score_rows import ScoreRows
from curate.pipeline.signal_pass import OutOfMemory, Reading, SignalPass
from curate.pipeline.units import Unit
from curate.pipeline.work import Work
from curate.scorers.protocol import Batch

log = logging.getLogger("curate.score")

GROUP_BYTES = 256 << 20
"""Collated batches held at once while checkpoints are swapped under them."""
GROUP_BATCHES = 64

Groups = list[tuple[list[int], str | None]]
"""Rows that may share a batch, or rows that cannot be run at all, with the reason."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one sentence for its user."""


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
class Piece:
    """Rows of a window that are run together. `rows` are indices into its encoded table."""

    key: str
    rows: np.ndarray


@dataclass
class Window:
    """Consecutive rows of a unit: as read, and as encoded without those that cannot be."""

    number: int
    start: int
    raw: pa.Table
    encoded: pa.Table | None = None
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    errors: dict[int, str] = field(default_factory=dict)


def score_unit(
    work: Work,
    unit: Unit,
    signals: SignalPass,
    ledger: Ledger | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the unit's rows in corpus order, and the receipt that goes with them.

    `progress(rows)` is called after each window, and may raise to give the unit up.

    Raises:
        RunError: more rows than `work.max_bad_rows` cannot be scored.
        ValueError: a shard is damaged or changed.
    """
    ledger = ledger or NoLedger()
    scores = ScoreRows(work, unit)
    scoring = _Scoring(work, signals, scores, ledger)
    kept: list[pa.Table] = []
    if not work.columns:
        scores.fill(np.arange(unit.rows), {})
    for window in _ahead(_windows(work, unit, signals, ledger), work.threads):
        scoring.window(window)
        kept.append(window.raw.select(_kept_columns(work)))
        if progress is not None:
            progress(window.raw.num_rows)
    table = scores.table(pa.concat_tables(kept) if kept else None)
    return table, receipt(work, unit, len(scores.errors), scoring.splits)


class _Scoring:
    """Scores windows: plans batches, runs them, and takes troubled ones apart."""

    def __init__(self, work: Work, signals: SignalPass, scores: ScoreRows, ledger: Ledger) -> None:
        self.work, self.signals, self.scores, self.ledger = work, signals, scores, ledger
        self.splits: list[list[Any]] = []

    def window(self, window: Window) -> None:
        for row, reason in window.errors.items():
            self._fail(row, reason)
        if not self.signals.wanted:
            rows = np.arange(window.start, window.start + window.raw.num_rows)
            self.scores.fill(rows, {})
            return
        waiting = self._pieces(window)
        while waiting:
            group, batches = self._collated(window, waiting)
            waiting = waiting[len(group) :]
            outcomes = iter(self._run(group, [b for b in batches if isinstance(b, Batch)]))
            found = [b if isinstance(b, Exception) else next(outcomes) for b in batches]
            waiting = self._settle(window, group, found) + waiting
        self.ledger.step("batch", None)

    def _pieces(self, window: Window) -> list[Piece]:
        """Return the planned batches, without rows known to kill."""
        if window.encoded is None:
            return []
        costs = self.signals.task.cost(window.encoded)
        row_bytes = window.encoded.nbytes / max(1, window.encoded.num_rows)
        pieces = []
        for i, rows in enumerate(self.work.plan.batches(costs, row_bytes)):
            key = f"{window.number}.{i}"
            at = {int(p): int(r) for p, r in zip(window.positions[rows], rows, strict=True)}
            for group, reason in self.ledger.groups("batch", key, list(at)):
                if reason is None:
                    pieces.append(Piece(key, np.array([at[p] for p in group])))
                else:
                    for position in group:
                        self._fail(position, reason)
        return pieces

    def _collated(
        self, window: Window, waiting: Sequence[Piece]
    ) -> tuple[list[Piece], list[Batch | Exception]]:
        """Collate pieces from the front until a group is full."""
        group: list[Piece] = []
        batches: list[Batch | Exception] = []
        size = 0
        assert window.encoded is not None, "a window with pieces is encoded"
        for piece in waiting[:GROUP_BATCHES]:
            try:
                batch = self.signals.task.collate(window.encoded.take(pa.array(piece.rows)))
            except Exception as error:  # a row's fault: the piece is taken apart
                batches.append(OutOfMemory() if isinstance(error, MemoryError) else error)
            else:
                batches.append(batch)
                size += sum(t.numel() * t.element_size() for t in batch.inputs.values())
            group.append(piece)
            if size > GROUP_BYTES:
                break
        return group, batches

    def _run(self, group: list[Piece], batches: list[Batch]) -> list[Reading | Exception]:
        if not batches:
            return []
        keys = [piece.key for piece in group]
        return self.signals(batches, lambda i: self.ledger.step("batch", keys[i]))

    def _settle(
        self, window: Window, group: list[Piece], found: list[Reading | Exception]
    ) -> list[Piece]:
        """Store what went well; return the pieces to try again, smaller."""
        again: list[Piece] = []
        for piece, outcome in zip(group, found, strict=True):
            positions = window.positions[piece.rows]
            if isinstance(outcome, Exception):
                if len(piece.rows) == 1:
                    self._fail(positions[0], _said(outcome))
                    continue
                if isinstance(outcome, OutOfMemory):
                    self.splits.append([piece.key, len(piece.rows)])
                    log.warning("batch %s is split: %s", piece.key, outcome)
                again += _halves(piece)
                continue
            bad = self.scores.fill(positions, outcome)
            if bad.any() and len(piece.rows) == 1:
                self._fail(positions[0], self.scores.why_not_finite(outcome))
            elif bad.all():
                again += _halves(piece)
            elif bad.any():  # the rest again: what is not finite may have touched its neighbours
                again.append(Piece(piece.key, piece.rows[~bad]))
                again += [Piece(piece.key, row[None]) for row in piece.rows[bad]]
        return again

    def _fail(self, position: int, reason: str) -> None:
        self.scores.fail(position, reason)
        if len(self.scores.errors) > self.work.max_bad_rows:
            raise RunError(too_many(self.work, self.scores.unit, self.scores.errors))


def too_many(work: Work, unit: Unit, errors: dict[int, str]) -> str:
    """Return the sentence that stops a run."""
    position, reason = min(errors.items())
    shard, row = unit.locate(position)
    return (
        f"more than {work.max_bad_rows} rows cannot be scored, the first is row {row} of "
        f"{work.corpus.shards[shard].path}: {reason}; mend the data or allow more with "
        f"--max-bad-rows"
    )


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
                errors[start] = _said(error)
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


def _windows(work: Work, unit: Unit, signals: SignalPass, ledger: Ledger) -> Iterator[Window]:
    """Yield the unit's windows, encoded where a model will see them."""
    raws = _raw_windows(work, unit)
    start = 0
    for number in itertools.count():
        ledger.step("encode", str(number))
        raw = next(raws, None)
        if raw is None:
            break
        window = Window(number, start, raw)
        if signals.wanted:
            rows = list(range(start, start + raw.num_rows))
            encode_window(window, signals, ledger.groups("encode", str(number), rows))
        ledger.step("encode", None)
        yield window
        start += raw.num_rows
    ledger.step("encode", None)
    assert start == unit.rows or not work.columns, "the corpus gave fewer rows than planned"


def encode_window(window: Window, signals: SignalPass, groups: Groups) -> None:
    """Encode the window's rows but those that are known to kill."""
    lethal = {p: reason for rows, reason in groups if reason is not None for p in rows}
    window.errors.update(lethal)
    n = window.raw.num_rows
    allowed = np.array([i for i in range(n) if window.start + i not in lethal], dtype=np.int64)
    rows = window.raw.take(pa.array(allowed)) if lethal else window.raw
    window.encoded, good, errors = encode_rows(signals.task.encode, rows)
    window.positions = window.start + allowed[good]
    window.errors.update({window.start + int(allowed[i]): why for i, why in errors.items()})


def _raw_windows(work: Work, unit: Unit) -> Iterator[pa.Table]:
    """Yield tables of `window_rows` rows, whatever blocks and shards they come from."""
    columns = work.columns
    if not columns:
        return
    size = work.plan.window_rows
    waiting: list[pa.RecordBatch] = []
    held = 0
    for span in unit.spans:
        for batch in work.corpus.read(span.shard, span.start, span.rows, columns, size):
            while held + batch.num_rows >= size:
                yield pa.Table.from_batches([*waiting, batch.slice(0, size - held)])
                batch, waiting, held = batch.slice(size - held), [], 0
            waiting.append(batch)
            held += batch.num_rows
    if held:
        yield pa.Table.from_batches(waiting)


def _ahead(windows: Iterator[Window], threads: int) -> Iterator[Window]:
    """Yield the windows while the next one is made ready in a thread."""
    ready = partial(torch.set_num_threads, threads)
    with ThreadPoolExecutor(1, "curate-read", initializer=ready) as pool:
        coming = pool.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, windows, None)
            yield window


def _kept_columns(work: Work) -> list[str]:
    return list(dict.fromkeys([*work.keep, *([work.id_column] if work.id_column else [])]))


def _halves(piece: Piece) -> list[Piece]:
    middle = len(piece.rows) // 2
    return [Piece(piece.key, piece.rows[:middle]), Piece(piece.key, piece.rows[middle:])]


def _said(error: Exception) -> str:
    """Return one line for the `error` column."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OutOfMemory | MemoryError):
        return "the row alone does not fit in memory"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def receipt(
    work: Work, unit: Unit, bad_rows: int, splits: list[list[Any]], quarantined: str | None = None
) -> dict[str, Any]:
    """Return what a part's footer tells of it."""
    shards = {}
    for span in unit.spans:
        shard = work.corpus.shards[span.shard]
        entry = {"path": shard.path, "fingerprint": shard.fingerprint}
        kind, _, digest = shard.fingerprint.partition(":")
        if kind == "sha256":
            entry["sha256"] = digest
        elif span.rows == shard.rows and quarantined is None:
            entry["sha256"] = work.corpus.sha256(span.shard)
        shards[str(span.shard)] = entry
    return {
        "format": "curate.part",
        "version": 1,
        "run": work.run,
        "unit": unit.number,
        "spans": [[s.shard, s.start, s.rows] for s in unit.spans],
        "rows": unit.rows,
        "bad_rows": bad_rows,
        "shards": shards,
        "splits": splits,
        "quarantined": quarantined,
    }
