"""Curricula: the selection from easy to hard or from hard to easy, by the manifest's ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.rounds import FreshRounds
from curate.pipeline.manifests.schedules import Settled
from curate.pipeline.manifests.visits import InRounds, Visits
from curate.selectors.keyed import stream_key

ORDERS = ("easy_to_hard", "hard_to_easy")
MAX_STAGES = 256
_CURRICULUM = 22  # what a key is for


@dataclass(frozen=True)
class Curriculum(Settled):
    """Rows by difficulty: a pool that grows from epoch to epoch, and stages within an epoch.

    Epoch e of E draws on the first share min(1, start + (1 - start) e / min(full E, E - 1)) of the
    rows in the curriculum's order (the linear pacing of Wu, Dyer and Neyshabur, ICLR 2021, section
    2, complete in the last epoch at the latest).
    Every epoch has K presentations, as without a curriculum, so that steps and rate schedule stay:
    rows of a small pool are shown more often, all equally often up to one. The pool is cut into
    `stages` of equal size by difficulty, shown one after the other; within a stage the order is
    random. One epoch sorted by difficulty is epochs=1, start=1, stages=256.

    `hard` says which end of the ranks is hard: `first` (rank 0, as `keep` by EL2N gives) or `last`.
    With one epoch, `start` is 1. Ranks with gaps (after set algebra) cost 4 bytes a row.
    """

    order: str = "easy_to_hard"
    hard: str = "first"
    start: float = 0.2
    full: float = 0.8
    stages: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("rank",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ValueError(f"order must be easy_to_hard or hard_to_easy, not {self.order!r}")
        if self.hard not in ("first", "last"):
            raise ValueError(f"hard must be first or last (of the ranks), not {self.hard!r}")
        for name, value in (("start", self.start), ("full", self.full)):
            if isinstance(value, bool) or not 0 < value <= 1:
                raise ValueError(f"{name} of a curriculum must be in (0, 1], not {value!r}")
        if self.epochs is None:
            raise ValueError("a curriculum needs its length: say the number of epochs, --epochs")
        if self.epochs == 1 and self.start != 1:
            raise ValueError("a curriculum of one epoch needs start=1, or rows are never shown")
        if not isinstance(self.stages, int) or not 1 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages must be 1 to {MAX_STAGES}, not {self.stages!r}")

    def visits(self, places: Places, epoch: int) -> Visits:
        rows = int(places.starts[-1])
        pool = max(1, floor(self.share(epoch) * rows + 0.5))
        stages = min(self.stages, pool)
        bounds = np.array([pool * i // stages for i in range(stages + 1)])
        shown = np.diff([rows * int(b) // pool for b in bounds])
        rounds = [
            FreshRounds(int(n), int(m), stream_key(self.seed, _CURRICULUM, i))
            for i, (n, m) in enumerate(zip(np.diff(bounds), shown, strict=True))
        ]
        place = self._place(places)

        def stage_of(group: int) -> Int64[ndarray, " n"]:
            at = place(group)
            return np.where(at < pool, np.searchsorted(bounds, at, side="right") - 1, -1)

        return InRounds(places, epoch, rounds, stage_of, is_staged=True)

    def share(self, epoch: int) -> float:
        """Return which share of the rows, from the curriculum's start, the epoch draws on."""
        assert self.epochs is not None, "checked at the start"
        # Complete in the last epoch at the latest, so that no row is never shown.
        length = max(1.0, min(self.full * self.epochs, self.epochs - 1))
        return min(1.0, self.start + (1 - self.start) * epoch / length)

    def _place(self, places: Places) -> Callable[[int], Int64[ndarray, " n"]]:
        """Return the function that gives each position of a group its place in the curriculum."""
        rows = int(places.starts[-1])
        is_reversed = (self.hard == "first") == (self.order == "easy_to_hard")
        ranks = _dense_ranks(places)

        def place(group: int) -> Int64[ndarray, " n"]:
            at = ranks(group)
            return rows - 1 - at if is_reversed else at

        return place


def _dense_ranks(places: Places) -> Callable[[int], Int64[ndarray, " n"]]:
    """Return the function that gives a group's ranks, counted without gaps."""

    def as_written(group: int) -> Int64[ndarray, " n"]:
        return places.column(group, "rank").astype(np.int64)

    groups = range(len(places.starts) - 1)
    if max(int(as_written(g).max()) for g in groups) == int(places.starts[-1]) - 1:
        return as_written
    known = np.sort(np.concatenate([places.column(g, "rank") for g in groups]))
    return lambda group: np.searchsorted(known, as_written(group)).astype(np.int64)


def hard_end(selection: dict[str, Any], high_means: str | None) -> str | None:
    """Return which end of a selection's ranks is hard, None where that is not known.

    `high_means` is what the scorer says of high values, such as "hard, then noisy".
    """
    said = (high_means or "").split(",")[0].split()
    if not said or said[0] not in ("hard", "easy") or not selection.get("direction"):
        return None
    return "first" if (said[0] == "hard") == (selection["direction"] == "high") else "last"
