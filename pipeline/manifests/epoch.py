"""Which positions an epoch visits, how often, and in what order."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.order import order
from curate.pipeline.manifests.places import Places, Recent
from curate.pipeline.manifests.visits import Drawn, OnceEach, Repeated, Visits
from curate.selectors.keyed import stream_key

if TYPE_CHECKING:
    from curate.pipeline.manifests.schedules import Schedule

_STAGE = 5  # what a key is for (1 and 2 are the order's, 3 and 4 the draws')


@dataclass(frozen=True)
class EpochPlan:
    """The epoch's places 0..length-1 and the position that each visits.

    Weights of kind `none` and `loss`: every position once. `repeat`: as often as its weight says.
    `sampling`: K draws with replacement, each position with probability weight / sum of weights;
    the draws are independent and a function of (seed, epoch). A schedule says by itself what this
    epoch shows; that depends on the schedule's seed alone, so all trainings see the same rows.
    The visits, sorted by position, are then put in `order`, stage by stage where a schedule has
    stages. Memory: a few groups of 262 144 positions; nothing per row is held.
    """

    places: Places
    weight_kind: str
    seed: int
    epoch: int
    block: int = 4096
    schedule: "Schedule | None" = None
    _expanded: "Recent[tuple[int, int], Int64[ndarray, ' n']]" = field(
        default_factory=lambda: Recent(64, lambda _: 1), init=False, repr=False, compare=False
    )

    @property
    def length(self) -> int:
        """Visits in this epoch."""
        return int(self._begins[-1])

    def positions(self, start: int, stop: int) -> Int64[ndarray, " n"]:
        """Return the positions that places [start, stop) of the epoch visit."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, places: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """Return the positions that these places of the epoch visit."""
        found = np.empty(len(places), dtype=np.int64)
        stages = np.searchsorted(self._begins, places, side="right") - 1
        for stage in np.unique(stages):
            mine = np.flatnonzero(stages == stage)
            visits = self._ordered(int(stage), places[mine] - self._begins[stage])
            found[mine] = self._positions(int(stage), visits)
        return found

    def _ordered(self, stage: int, places: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        pieces = [np.empty(0, dtype=np.int64)]
        length = int(self._begins[stage + 1] - self._begins[stage])
        seed = stream_key(self.seed, _STAGE, stage) if stage else self.seed
        # Padding wraps round to the start of the epoch: read each ascending stretch by itself.
        for stretch in np.split(places, np.flatnonzero(np.diff(places) < 0) + 1):
            if len(stretch):
                low, high = int(stretch[0]), int(stretch[-1]) + 1
                visits = order(length, seed, self.epoch, low, high, self.block)
                pieces.append(visits[stretch - low])
        return np.concatenate(pieces)

    def _positions(self, stage: int, visits: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        if isinstance(self._visits, OnceEach):
            return visits
        ends = self._ends[stage]
        group = np.searchsorted(ends, visits, side="right") - 1
        positions = np.empty_like(visits)
        for index in np.unique(group):
            mine = group == index
            expanded = self._expanded.get((stage, int(index)), self._expand)
            positions[mine] = expanded[visits[mine] - ends[index]]
        return positions

    def _expand(self, stage_and_group: tuple[int, int]) -> Int64[ndarray, " n"]:
        return self._visits.expand(*stage_and_group)

    @cached_property
    def _visits(self) -> Visits:
        if self.schedule is not None:
            return self.schedule.visits(self.places, self.epoch)
        if self.weight_kind in ("none", "loss"):
            return OnceEach(self.places)
        if self.weight_kind == "repeat":
            return Repeated(self.places)
        return Drawn(self.places, self.seed, self.epoch)

    @cached_property
    def _ends(self) -> list[Int64[ndarray, " g"]]:
        """For each stage, the first visit of each group of positions, and the number of visits."""
        counts = [self._visits.counts(stage) for stage in range(self._visits.stages)]
        return [np.concatenate([[0], np.cumsum(c)]).astype(np.int64) for c in counts]

    @cached_property
    def _begins(self) -> Int64[ndarray, " s"]:
        """The first place of each stage, and the number of places."""
        return np.concatenate([[0], np.cumsum([ends[-1] for ends in self._ends])]).astype(np.int64)
