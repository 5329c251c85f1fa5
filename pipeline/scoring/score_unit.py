"""The unit function: read, encode, batch, score; the same on every engine.

`score_unit` is a pure function of the work and the unit. Rows fail alone: what raises or is not
finite is halved until single rows are left, and the rest is scored again without them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from curate.pipeline.scoring.score_rows import ScoreRows
from curate.pipeline.scoring.signal_pass import DeviceLost, OutOfMemory, Reading, SignalPass
from curate.pipeline.scoring.store_unit import UnitStores
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.windows import (
    Ledger,
    NoLedger,
    Window,
    encode_rows,
    raw_windows,
    said,
    windows,
)
from curate.pipeline.scoring.work import Work
from curate.scorers.protocol import Batch

log = logging.getLogger("curate.score")

GROUP_BYTES = 256 << 20
"""Collated batches held at once while checkpoints are swapped under them."""
STATE_BYTES = 1 << 30
"""What they keep from one checkpoint to the next, on the device. One batch may be larger."""
GROUP_BATCHES = 64


Way = Literal["read", "run", "probe"]
"""How rows are tried: only read, scored too, or also compared with autograd."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one sentence for its user."""


@dataclass
class Piece:
    """Rows of a window that are run together. `rows` are indices into its encoded table."""

    key: str
    rows: np.ndarray


def score_unit(
    work: Work,
    unit: Unit,
    signals: SignalPass,
    ledger: Ledger | None = None,
    progress: Callable[[int], None] | None = None,
    stores: UnitStores | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the unit's rows in corpus order, and the receipt that goes with them.

    `progress(rows)` is called after each window, and may raise to give the unit up. `stores` take
    the vectors that are kept beside the scores; nothing of them is committed here.

    Raises:
        RunError: more rows than `work.max_bad_rows` cannot be scored.
        ValueError: a shard is damaged or changed.
    """
    ledger = ledger or NoLedger()
    scores = ScoreRows(work, unit)
    scoring = _Scoring(work, signals, scores, ledger, stores)
    kept: list[pa.Table] = []
    if not work.columns:
        scores.fill(np.arange(unit.rows), {})
    task = signals.task if signals.wanted else None
    for window in windows(work, unit, task, ledger):
        if stores is not None:
            stores.begin(window.start, window.raw.num_rows)
        scoring.window(window)
        if stores is not None:
            stores.end(scores.errors)
        kept.append(window.raw.select(_kept_columns(work)))
        if progress is not None:
            progress(window.raw.num_rows)
    table = scores.table(pa.concat_tables(kept) if kept else None)
    return table, receipt(work, unit, len(scores.errors), scoring.splits) | scores.moments()


def try_rows(work: Work, unit: Unit, signals: SignalPass, rows: list[int], way: Way) -> None:
    """Read these rows (positions in one window) and, unless that is all, score them in one batch.

    Nothing is returned: the question is whether the process survives. What rows raise is no
    answer to it, a lost device is.
    """
    wanted = np.array(rows, dtype=np.int64)
    for window in raw_windows(work, unit):
        inside = wanted - window.start
        if inside[0] >= window.raw.num_rows:
            continue
        if way == "read":
            return
        encoded, _, _ = encode_rows(signals.task.encode, window.raw.take(pa.array(inside)))
        if encoded is not None:
            try:
                batch = signals.task.collate(encoded)
                signals([batch], lambda _: None)
                if way == "probe":
                    signals.verify(batch)
            except DeviceLost:
                raise
            except Exception as error:
                log.debug("trial of %d rows raised %s", len(rows), error)
        return


class _Scoring:
    """Scores windows: plans batches, runs them, and takes troubled ones apart."""

    def __init__(
        self,
        work: Work,
        signals: SignalPass,
        scores: ScoreRows,
        ledger: Ledger,
        stores: UnitStores | None,
    ) -> None:
        self.work, self.signals, self.scores, self.ledger = work, signals, scores, ledger
        self.stores = stores
        self.splits: list[list[Any]] = []

    def window(self, window: Window) -> None:
        for row, reason in window.errors.items():
            self._fail(row, reason)
        if self.signals.texts is not None:
            values, errors = self.signals.texts.of(window.raw)
            self.scores.put_texts(window.start, values)
            for row, reason in errors.items():
                self._fail(window.start + row, reason)
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
        size, state = 0, 0.0
        assert window.encoded is not None, "a window with pieces is encoded"
        for piece in waiting[:GROUP_BATCHES]:
            try:
                batch = self.signals.task.collate(window.encoded.take(pa.array(piece.rows)))
            except Exception as error:  # a row's fault: the piece is taken apart
                batches.append(OutOfMemory() if isinstance(error, MemoryError) else error)
            else:
                batches.append(batch)
                size += sum(t.numel() * t.element_size() for t in batch.inputs.values())
                state += self.signals.state_bytes(batch)
            group.append(piece)
            if size > GROUP_BYTES or state > STATE_BYTES:
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
        good: list[tuple[Piece, Reading]] = []
        for piece, outcome in zip(group, found, strict=True):
            if not isinstance(outcome, Exception):
                good.append((piece, outcome))
            elif len(piece.rows) == 1:
                self._fail(window.positions[piece.rows[0]], said(outcome))
            else:
                if isinstance(outcome, OutOfMemory):
                    self.splits.append([piece.key, len(piece.rows)])
                    log.warning("batch %s is split: %s", piece.key, outcome)
                again += _halves(piece)
        return again + self._store(window, good)

    def _store(self, window: Window, good: list[tuple[Piece, Reading]]) -> list[Piece]:
        """Store finite scores; return pieces that set rows apart whose scores are not."""
        if not good:
            return []
        again: list[Piece] = []
        rows = np.concatenate([window.positions[piece.rows] for piece, _ in good])
        together = {s: torch.cat([reading[s] for _, reading in good], 1) for s in good[0][1]}
        bad_rows = self.scores.fill(rows, together) | _unstorable(good)
        edges = np.cumsum([len(piece.rows) for piece, _ in good])[:-1]
        for (piece, reading), bad in zip(good, np.split(bad_rows, edges), strict=True):
            if self.stores is not None:
                self.stores.put(window.positions[piece.rows], reading.vectors)
            if not bad.any():
                continue
            if len(piece.rows) == 1:
                position = window.positions[piece.rows[0]]
                self._fail(position, self.scores.why_not_finite(reading))
            elif bad.all():
                again += _halves(piece)
            else:  # the rest again: what is not finite may have touched its neighbours
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


def _unstorable(good: Sequence[tuple[Piece, Reading]]) -> np.ndarray:
    """Return which rows (bool [B]) have a vector that is not finite."""
    bad = [np.zeros(len(piece.rows), dtype=bool) for piece, _ in good]
    for of_piece, (_, reading) in zip(bad, good, strict=True):
        for stored in reading.vectors.values():
            of_piece |= ~stored.is_finite()
    return np.concatenate(bad)


def _kept_columns(work: Work) -> list[str]:
    return list(dict.fromkeys([*work.keep, *([work.id_column] if work.id_column else [])]))


def _halves(piece: Piece) -> list[Piece]:
    middle = len(piece.rows) // 2
    return [Piece(piece.key, piece.rows[:middle]), Piece(piece.key, piece.rows[middle:])]


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
