"""A pool of scoring actors over units, on Ray core: who does what, and what to do when they die.

Ray restarts nothing here: a dead actor is replaced by us, after the ledger has been read, so a unit
that kills its workers is tried with care and then quarantined instead of looping. Only receipts
come back to the driver. An idle worker takes a second copy of the oldest unit; the first commit
wins. A unit past its deadline loses its worker.
"""

import logging
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import exceptions

from curate.pipeline.ray_cluster import Cluster, connected
from curate.pipeline.scoring.attempts import SUSPECT
from curate.pipeline.scoring.ngram_tasks import count_on_ray
from curate.pipeline.scoring.score_progress import Progress
from curate.pipeline.scoring.score_run import ScoringRun
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.scoring.scoring_worker import ScoringWorker
from curate.pipeline.scoring.signal_pass import DeviceLost
from curate.pipeline.scoring.sizing import Sizing
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.scorers.engine import EngineError

log = logging.getLogger("curate.score")

TICK_S = 1.0
STARTUP_S = 60.0
COPY_AFTER_S = 10.0
"""A unit younger than this, or than 1.5 times the median, gets no second copy."""
DEADLINE_S = 900.0
"""The shortest deadline of a unit; a long unit has 20 times the median, or 50 times the estimate
while there is no median."""
DEATHS_IN_A_ROW = 20
"""Workers that may die without any unit done or quarantined before the run stops."""

Ref = Any


class ScoringActor:
    """A scoring process on the cluster."""

    def prepare(self, work: Work, session: str, number: int) -> None:
        """Load the models. A method, so that its errors keep their type."""
        self.worker = ScoringWorker(work, session, number)

    def score(self, unit: Unit, number: int) -> dict[str, Any]:
        """Score and commit a unit."""
        return self.worker.score(unit, number)

    @ray.method(concurrency_group="watch")
    def rows_done(self) -> int:
        """Return how many rows of the current unit are done."""
        return self.worker.rows_done


@dataclass
class Hand:
    """A worker as the driver sees it. `task` is what it is doing now; none is idle."""

    actor: Any
    probe: int
    task: Ref | None
    unit: Unit | None = None
    number: int = 0
    since: float = 0.0
    watch: Ref | None = None
    rows_seen: int = 0

    @property
    def is_idle(self) -> bool:
        return self.task is None


def score_on_ray(
    run: ScoringRun,
    sizing: Sizing,
    workers: int | None,
    num_gpus: float | None,
    address: str | None,
    show: bool,
) -> None:
    """Score what is left of a run on a Ray cluster: the one at `address`, or one made here.

    Raises:
        ValueError: the input is wrong, or the cluster cannot be joined.
        RunError: workers keep dying, or too many rows are bad.
    """
    with connected(address, run.work.out):
        cluster = Cluster.split(run.work.threads, workers, num_gpus, len(run.todo))
        count_on_ray(run, cluster)
        with run.progress(show) as progress:
            Pool(run, cluster, progress, sizing.seconds_per_row).work()


class Pool:
    """The driver's loop: hire, assign, collect, watch the clock."""

    deadline_s = DEADLINE_S
    copy_after_s = COPY_AFTER_S

    def __init__(
        self, run: ScoringRun, cluster: Cluster, progress: Progress, seconds_per_row: float
    ) -> None:
        self.run, self.cluster, self.progress = run, cluster, progress
        self.seconds_per_row = seconds_per_row
        device = "cuda" if cluster.gpus else "cpu"
        self.work_ref = ray.put(replace(run.work, device=device))
        self.hands: list[Hand] = []
        self.rates: list[float] = []  # seconds per row of units done
        self.deaths = 0
        self.waits_since: float | None = time.monotonic()  # None once a worker has started

    def work(self) -> None:
        """Return when every unit is committed or quarantined."""
        try:
            while self.run.todo:
                self._hire()
                self._assign()
                self._collect()
                self._watch()
        finally:
            for hand in list(self.hands):
                self._dismiss(hand, "late", "the run ended")

    def _hire(self) -> None:
        wanted = min(self.cluster.workers, len(self.run.todo))
        while len(self.hands) < wanted:
            actor = self.cluster.actor_class(ScoringActor).remote()
            probe = self.run.number(-1)
            task = actor.prepare.remote(self.work_ref, self.run.session, probe)
            self.hands.append(Hand(actor, probe, task, since=time.monotonic()))

    def _assign(self) -> None:
        busy = {hand.unit.number for hand in self.hands if hand.unit is not None}
        queue = [unit for unit in self.run.todo if unit.number not in busy]
        for hand in (h for h in self.hands if h.is_idle):
            unit = self._next_safe(queue) or self._straggler()
            if unit is None:
                return
            hand.unit, hand.number = unit, self.run.number(unit.number)
            hand.since, hand.rows_seen, hand.watch = time.monotonic(), 0, None
            hand.task = hand.actor.score.remote(unit, hand.number)

    def _next_safe(self, queue: list[Unit]) -> Unit | None:
        while queue:
            unit = queue.pop(0)
            if not self.run.is_lethal(unit):
                return unit
            self.progress.add(unit.rows)
            self.deaths = 0
        return None

    def _straggler(self) -> Unit | None:
        """Return the oldest unit that only one worker is at, if it is slow."""
        holders: dict[int, list[Hand]] = {}
        for hand in self.hands:
            if hand.unit is not None:
                holders.setdefault(hand.unit.number, []).append(hand)
        alone = [h[0] for h in holders.values() if len(h) == 1]
        for hand in sorted(alone, key=lambda h: h.since):
            unit = hand.unit
            assert unit is not None
            usual = 1.5 * unit.rows * statistics.median(self.rates) if self.rates else 0.0
            if unit.number in {u.number for u in self.run.todo}:
                if time.monotonic() - hand.since > max(self.copy_after_s, usual):
                    log.info("unit %d is slow: a second worker tries it", unit.number)
                    return unit
        return None

    def _collect(self) -> None:
        tasks = {h.task: h for h in self.hands if h.task is not None}
        if not tasks:
            return
        ready, _ = ray.wait(list(tasks), num_returns=1, timeout=TICK_S)
        for ref in ready:
            hand = tasks[ref]
            try:
                told = ray.get(ref)
            except exceptions.RayTaskError as error:
                self._failed(hand, error.cause)
            except exceptions.RayError as error:
                self._died(hand, type(error).__name__)
            else:
                self._done(hand, told)

    def _done(self, hand: Hand, told: dict[str, Any] | None) -> None:
        hand.task = None
        if told is None:
            self.waits_since = None
            return  # prepared
        unit = hand.unit
        assert unit is not None
        hand.unit = None
        if unit.number in self.run.done or not told["committed"]:
            self.progress.add(-hand.rows_seen)
        else:
            self.progress.add(unit.rows - hand.rows_seen)
            self.rates.append((time.monotonic() - hand.since) / unit.rows)
            self.deaths = 0
        self.run.finished(told)

    def _failed(self, hand: Hand, error: BaseException) -> None:
        """Decide what an error in a worker means; most are the run's."""
        unit = hand.unit
        if isinstance(error, DeviceLost):
            self._died(hand, str(error))
        elif unit is not None and isinstance(error, OSError):
            self.progress.add(-hand.rows_seen)
            hand.task = hand.unit = None
            self.run.fault(unit.number, error)
        elif isinstance(error, ValueError | RunError | EngineError | OSError):
            raise error from None
        else:
            where = "a worker" if unit is None else f"unit {unit.number}"
            raise RunError(f"{where} failed: {type(error).__name__}: {error}") from error

    def _died(self, hand: Hand, reason: str) -> None:
        self.deaths += 1
        what = "while loading the model" if hand.unit is None else f"in unit {hand.unit.number}"
        log.warning("a worker died %s (%s)", what, reason)
        self.progress.add(-hand.rows_seen)
        self._dismiss(hand, "died", reason)
        if self.deaths >= DEATHS_IN_A_ROW:
            raise RunError(
                f"{self.deaths} workers died one after the other, the last {what} ({reason}): see "
                f"their logs with `ray logs`, and the memory that a worker needs"
            )

    def _dismiss(self, hand: Hand, state: str, reason: str) -> None:
        """Let a worker go and write down how its try ended."""
        self.hands.remove(hand)
        ray.kill(hand.actor)
        self.run.died(-1, hand.probe, reason, state)
        if hand.unit is not None:
            self.run.died(hand.unit.number, hand.number, reason, state)

    def _watch(self) -> None:
        """Count rows inside units, and stop units past their deadline."""
        if self.waits_since is not None and time.monotonic() - self.waits_since > STARTUP_S:
            log.warning("no worker has started yet: the cluster may be busy, or lack what one asks")
            self.waits_since = time.monotonic()
        for hand in list(self.hands):
            if hand.unit is None or hand.task is None:
                continue
            if time.monotonic() - hand.since > self._deadline(hand.unit, hand.number):
                self._died(hand, "past its deadline")
                continue
            if hand.watch is None:
                hand.watch = hand.actor.rows_done.remote()
            elif ray.wait([hand.watch], timeout=0)[0]:
                try:
                    told: Any = ray.get(hand.watch)
                    rows = min(told, hand.unit.rows)
                    self.progress.add(rows - hand.rows_seen)
                    hand.rows_seen = rows
                except exceptions.RayError:
                    log.debug("a worker does not answer; its task will tell why")
                hand.watch = None

    def _deadline(self, unit: Unit, number: int) -> float:
        usual = 50 * unit.rows * self.seconds_per_row
        if len(self.rates) >= 3:
            usual = 20 * unit.rows * statistics.median(self.rates)
        patience = 10 if number >= SUSPECT else 1  # time to try suspect rows one by one
        return patience * max(self.deadline_s, usual)
