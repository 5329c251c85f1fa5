"""The state of a scoring run that engines share: what is left, what was tried, what came of it."""

import logging
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from curate.pipeline.scoring.attempts import (
    Record,
    attempts_at,
    close_attempt,
    deaths,
    read_attempts,
    read_trials,
)
from curate.pipeline.scoring.score_folder import committed, quarantine, why_lethal
from curate.pipeline.scoring.score_progress import Progress
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder, NoSpaceError

log = logging.getLogger("curate.score")

MAX_FAULTS = 3
"""Tries at a unit that the storage may spoil before the run stops."""


class ScoringRun:
    """Units to do, and the ledger of tries. One per run folder: its process holds the lock."""

    def __init__(self, work: Work, units: Sequence[Unit], lock: RunLock) -> None:
        self.work, self.lock = work, lock
        self.folder, self.parts = Folder(work.out), Folder(work.parts)
        self.session = uuid.uuid4().hex
        self.units = {unit.number: unit for unit in units}
        receipts = committed(self.parts, units)
        self.done = set(receipts)
        self.bad_rows = sum(r["bad_rows"] for r in receipts.values())
        self.rows_done = sum(r["rows"] for r in receipts.values())
        self.faults: dict[int, int] = defaultdict(int)
        self.numbers: dict[int, int] = {}
        self._bury_the_dead()

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units.values())

    @property
    def todo(self) -> list[Unit]:
        """Units without a part, in corpus order."""
        return [unit for number, unit in self.units.items() if number not in self.done]

    def progress(self, show: bool) -> Progress:
        """Return a progress display that knows what was done before."""
        return Progress(self.rows, self.rows_done, show=show)

    def number(self, unit: int) -> int:
        """Return the number of the next try at a unit; -1 is the probe."""
        self.numbers[unit] = self.numbers.get(unit, -1) + 1
        return self.numbers[unit]

    def is_lethal(self, unit: Unit) -> bool:
        """Tell whether the unit has killed too often; it is then quarantined for good."""
        tries = attempts_at(self.folder, unit.number, self.numbers.get(unit.number, -1) + 1)
        reason = why_lethal(deaths(tries, survived=read_trials(self.folder, unit.number)))
        if reason is None:
            return False
        paths = [shard.path for shard in self.work.corpus.shards]
        log.error("%s is quarantined: %s", unit.describe(paths), reason)
        quarantine(self.parts, self.work, unit, reason)
        self.done.add(unit.number)
        return True

    def finished(self, told: dict[str, Any]) -> None:
        """Take in what a worker told of a unit; stop the run when too much is bad.

        Raises:
            RunError: more rows than allowed could not be scored, or the lock is lost.
        """
        self.lock.check()
        self.done.add(told["unit"])
        if told["committed"]:
            self.bad_rows += told["bad_rows"]
            self.check_bad_rows()

    def check_bad_rows(self) -> None:
        """Raise RunError when more rows than allowed could not be scored."""
        if self.bad_rows > self.work.max_bad_rows:
            raise RunError(
                f"{self.bad_rows} rows cannot be scored, more than {self.work.max_bad_rows}: see "
                f"the error column of the parts in {self.parts.uri}, mend the data or allow more "
                f"with --max-bad-rows"
            )

    def died(self, unit: int, number: int, reason: str, state: Any = "died") -> None:
        """Note in the ledger how a try ended that could not say so itself."""
        for record in attempts_at(self.folder, unit, number + 1)[-1:]:
            if record.number == number:
                close_attempt(self.folder, record, state, reason)

    def fault(self, unit: int, error: OSError) -> None:
        """Count a fault of the storage; raise it when the disk is full or it goes on."""
        if isinstance(error, NoSpaceError):
            raise error
        self.faults[unit] += 1
        log.warning("unit %d: %s (try %d)", unit, error, self.faults[unit])
        if self.faults[unit] >= MAX_FAULTS:
            raise error

    def _bury_the_dead(self) -> None:
        """Close the tries of earlier processes: we hold the lock, so they are dead."""
        tries: dict[int, list[Record]] = read_attempts(self.folder)
        for unit, records in tries.items():
            self.numbers[unit] = max(record.number for record in records)
            for record in records:
                state: Any = "late" if unit in self.done else "gone"
                close_attempt(self.folder, record, state, "the process ended without a word")
