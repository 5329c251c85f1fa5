"""A scoring process: loads the models once, checks the engine on real rows, scores units."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import torch

from curate.pipeline.scoring.attempts import (
    ON_TRIAL,
    SUSPECT,
    Attempt,
    State,
    attempts_at,
    deaths,
    read_trials,
    trials_name,
)
from curate.pipeline.scoring.score_table import part_name, write_part
from curate.pipeline.scoring.score_unit import score_unit
from curate.pipeline.scoring.signal_pass import DeviceLost, SignalPass
from curate.pipeline.scoring.store_target import store_target
from curate.pipeline.scoring.store_unit import UnitStores
from curate.pipeline.scoring.trial import isolate, kills
from curate.pipeline.scoring.units import Span, Unit
from curate.pipeline.scoring.windows import Groups, encode_rows, raw_windows
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.storage import Folder
from curate.scorers.protocol import Batch

log = logging.getLogger("curate.score")

PROBE_ROWS = 8
PROBES = 8
"""Sets of rows tried before the run is called hopeless."""


class Superseded(Exception):
    """Another worker has committed this unit."""


class ScoringWorker:
    """Scores units of one run.

    Threads are set here from the work alone, so that results do not depend on the number of
    workers or on the engine. `number` is that of the probe in the ledger; None writes nothing.
    `probed` are the rows that the engine was checked on, None where no model runs.
    """

    def __init__(self, work: Work, session: str, number: int | None) -> None:
        self.work, self.session = work, session
        self.folder, self.parts = Folder(work.out), Folder(work.parts)
        self.rows_done = 0
        torch.set_num_threads(work.threads)
        self.signals = SignalPass(work, keeps=number is not None)
        self.probed: Batch | None = None
        if self.signals.wanted:
            self.probed = self._probe(number)

    def score(
        self, unit: Unit, number: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Score a unit and commit its part; return {unit, rows, bad_rows, splits, committed}."""
        torch.set_num_threads(self.work.threads)  # OpenMP counts per thread
        self.rows_done = 0

        def note(rows: int) -> None:
            self.rows_done += rows
            if progress is not None:
                progress(rows)
            if self.parts.exists(part_name(unit.number)):
                raise Superseded

        stores = self._stores(unit)
        if stores is not None and self.work.target is not None:
            store_target(self.work, self.signals)
        ledger = UnitLedger(self.work, unit, number, self.session)
        try:
            table, receipt = score_unit(self.work, unit, self.signals, ledger, note, stores)
            if stores is not None:  # before the part, which stands for them too
                receipt["stores"] = stores.commit()
            is_first = write_part(self.parts, unit.number, table, receipt)
            ledger.attempt.end("committed" if is_first else "late")
        except Superseded:
            ledger.attempt.end("late")
            return _told(unit, 0, [], is_first=False)
        except DeviceLost as lost:
            ledger.attempt.end("died", str(lost))  # with its steps: the next try takes care
            raise
        except BaseException as error:
            state: State = "failed" if isinstance(error, Exception) else "interrupted"
            with contextlib.suppress(OSError):  # a full disk: what matters is the first error
                ledger.attempt.end(state, f"{type(error).__name__}: {error}"[:300])
            raise
        finally:
            if stores is not None:
                stores.close()
        return _told(unit, receipt["bad_rows"], receipt["splits"], is_first)

    def _stores(self, unit: Unit) -> UnitStores | None:
        """Return where the unit's vectors go, if any are kept."""
        if self.signals.stores is None:
            return None
        return UnitStores(self.work, unit, self.signals.stores.layouts)

    def _probe(self, number: int | None) -> Batch:
        """Verify the engine on the first rows of the corpus that a model accepts; return them.

        Raises:
            ValueError: none of the rows tried can be scored.
        """
        if number is None:
            return self._verified(0)
        start = self._first_safe(deaths(attempts_at(self.folder, -1, number)))
        attempt = Attempt(self.folder, -1, number, self.session)
        state: State = "failed"
        try:
            attempt.step("probe", str(start))
            batch = self._verified(start)
            state = "committed"
        finally:
            attempt.end(state)
        return batch

    def _first_safe(self, died: Mapping[str, int]) -> int:
        """Return the first row of a probe that does not kill: where one died, a child tells.

        Kills from outside must not move it: the plan of units is made from the probe.
        """
        start = 0
        while died.get(f"probe:{start}") and start < self.work.corpus.rows:
            unit = Unit(-1, (_span_at(self.work, start),))
            if not kills(self.work, unit, "probe"):
                break
            start += PROBE_ROWS
        return start

    def _verified(self, start: int) -> Batch:
        batch = probe_batch(self.work, self.signals, start)
        self.signals.verify(batch)
        return batch


class UnitLedger:
    """One try at a unit: its steps in the ledger, and what earlier tries tell of its rows."""

    def __init__(self, work: Work, unit: Unit, number: int, session: str) -> None:
        self.work, self.unit = work, unit
        self.folder = Folder(work.out)
        self.deaths = deaths(attempts_at(self.folder, unit.number, number))
        self.trials = read_trials(self.folder, unit.number)
        self.attempt = Attempt(self.folder, unit.number, number, session)

    def step(self, kind: str, key: str | None) -> None:
        self.attempt.step(kind, key)

    def groups(self, kind: str, key: str, rows: list[int]) -> Groups:
        """Return how to run these rows: together, unless that has killed the process before."""
        step = f"{kind}:{key}"
        if step not in self.trials:
            if self.deaths[step] < SUSPECT:
                return [(rows, None)]
            self.attempt.step(kind, key + ON_TRIAL)
            found = isolate(self.work, self.unit, rows)
            self.attempt.step(kind, key)
            if found is None:
                return [(rows, None)]  # reading kills: no row can be blamed
            self.trials[step] = found
            self.folder.write_json(trials_name(self.unit.number), self.trials)
        return [(list(group), reason) for group, reason in self.trials[step]]


def probe_batch(work: Work, signals: SignalPass, start: int = 0) -> Batch:
    """Return a batch of the first rows, from row `start` of the corpus on, with a finite loss.

    Raises:
        ValueError: none of the rows tried can be scored; says why the first cannot.
    """
    first_error = unreadable = ""
    for attempt in range(PROBES):
        at = (start + attempt * PROBE_ROWS) % max(1, work.corpus.rows)
        table = _rows_at(work, at)
        encoded, _, errors = encode_rows(signals.task.encode, table)
        unreadable = unreadable or next(iter(errors.values()), "")
        for rows in _together_then_alone(encoded):
            try:
                batch = signals.task.collate(rows)
                finite = torch.isfinite(signals.loss(batch)).nonzero().flatten().tolist()
            except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
                first_error = first_error or f"{error}"
                continue
            if finite:
                return batch.select_rows(finite)
            first_error = first_error or "the loss is not finite"
    rows_tried = min(PROBES * PROBE_ROWS, work.corpus.rows)
    # What the model says of rows that could be read is the reason; a bad row among them is not.
    raise ValueError(
        f"none of {rows_tried} rows can be scored; the first says: {first_error or unreadable}"
    )


def _together_then_alone(encoded: pa.Table | None) -> list[pa.Table]:
    if encoded is None:
        return []
    return [encoded, *(encoded.slice(i, 1) for i in range(encoded.num_rows))]


def _rows_at(work: Work, start: int) -> pa.Table:
    return next(raw_windows(work, Unit(-1, (_span_at(work, start),)))).raw


def _span_at(work: Work, start: int) -> Span:
    """Return up to PROBE_ROWS rows of the corpus from row `start` on, in one shard."""
    for index, shard in enumerate(work.corpus.shards):
        if start < shard.rows:
            return Span(index, start, min(PROBE_ROWS, shard.rows - start))
        start -= shard.rows
    raise AssertionError("the corpus has fewer rows than it says")


def _told(unit: Unit, bad_rows: int, splits: list[Any], is_first: bool) -> dict[str, Any]:
    return {
        "unit": unit.number,
        "rows": unit.rows,
        "bad_rows": bad_rows,
        "splits": splits,
        "committed": is_first,
    }
