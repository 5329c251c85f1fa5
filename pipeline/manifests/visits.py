"""How often an epoch visits each position, group of positions by group, in bounded memory.

Visits come in stages, which follow one another in the epoch; within a stage `EpochPlan` shuffles
them. Shapes: G groups of positions, C classes of rows.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.rounds import Rounds
from curate.selectors.keyed import keyed64, stream_key

_DRAWS, _WITHIN = 3, 4  # what a key is for (1 and 2 are the order's)
CHUNK = 1 << 20

Positions = Int64[ndarray, " n"]


class Visits(Protocol):
    """What one epoch shows."""

    @property
    def stages(self) -> int: ...

    def counts(self, stage: int) -> Int64[ndarray, " g"]:
        """Return how many visits of the stage go to each group of positions."""
        ...

    def expand(self, stage: int, group: int) -> Positions:
        """Return the group's positions, sorted, each as often as the stage visits it."""
        ...


class OnceEach:
    """Every position once: weights of kind `none` and `loss`."""

    stages = 1

    def __init__(self, places: Places) -> None:
        self._starts = places.starts

    def counts(self, stage: int) -> Int64[ndarray, " g"]:
        return np.diff(self._starts)

    def expand(self, stage: int, group: int) -> Positions:
        return np.arange(self._starts[group], self._starts[group + 1], dtype=np.int64)


class Repeated:
    """Every position as often as its weight says."""

    stages = 1

    def __init__(self, places: Places) -> None:
        self._places = places

    def counts(self, stage: int) -> Int64[ndarray, " g"]:
        groups = range(len(self._places.starts) - 1)
        return np.array([_weights(self._places, g).sum() for g in groups]).astype(np.int64)

    def expand(self, stage: int, group: int) -> Positions:
        weights = _weights(self._places, group).astype(np.int64)
        return _from(self._places, group, np.repeat(np.arange(len(weights)), weights))


class Drawn:
    """K independent draws with replacement, each position with probability weight / sum."""

    stages = 1

    def __init__(self, places: Places, seed: int, epoch: int) -> None:
        self._places, self._seed, self._epoch = places, seed, epoch

    def counts(self, stage: int) -> Int64[ndarray, " g"]:
        return self._counts

    def expand(self, stage: int, group: int) -> Positions:
        key = stream_key(self._seed, self._epoch, _WITHIN, group)
        uniform = _uniform(key, 0, int(self._counts[group]))
        edges = np.cumsum(_weights(self._places, group))
        return _from(self._places, group, np.sort(_drawn(edges, uniform)))

    @cached_property
    def _counts(self) -> Int64[ndarray, " g"]:
        groups = range(len(self._places.starts) - 1)
        sums = np.array([_weights(self._places, g).sum() for g in groups], dtype=np.float64)
        edges = np.cumsum(sums)
        counts = np.zeros(len(sums), dtype=np.int64)
        total = int(self._places.starts[-1])
        key = stream_key(self._seed, self._epoch, _DRAWS)
        for start in range(0, total, CHUNK):
            uniform = _uniform(key, start, min(start + CHUNK, total))
            counts += np.bincount(_drawn(edges, uniform), minlength=len(sums))
        return counts


class InRounds:
    """Rows of C classes, each class in rounds of its own; one stage, or a stage per class.

    `codes(group)` gives the class of each of the group's positions, -1 for rows that are not shown.
    """

    def __init__(
        self,
        places: Places,
        epoch: int,
        rounds: Sequence[Rounds],
        codes: Callable[[int], Int64[ndarray, " n"]],
        is_staged: bool = False,
    ) -> None:
        self._places, self._epoch, self._rounds, self._codes = places, epoch, rounds, codes
        self._is_staged = is_staged
        self.stages = len(rounds) if is_staged else 1

    def counts(self, stage: int) -> Int64[ndarray, " g"]:
        shown = self._shown
        return shown[:, stage] if self._is_staged else shown.sum(1)

    def expand(self, stage: int, group: int) -> Positions:
        codes, times = self._times(group)
        if self._is_staged:
            times = np.where(codes == stage, times, 0)
        return _from(self._places, group, np.repeat(np.arange(len(times)), times))

    def _times(self, group: int) -> tuple[Positions, Positions]:
        codes = self._codes(group)
        times = np.zeros(len(codes), dtype=np.int64)
        by_code = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[by_code], np.arange(len(self._rounds) + 1))
        for code in np.flatnonzero(np.diff(edges)).tolist():
            mine = by_code[edges[code] : edges[code + 1]]
            rows = self._before[group, code] + np.arange(len(mine))
            times[mine] = self._rounds[code].times(self._epoch, rows)
        return codes, times

    @cached_property
    def _before(self) -> Int64[ndarray, "g c"]:
        """Rows of each class in the groups before."""
        groups = range(len(self._places.starts) - 1)
        width = len(self._rounds)
        found = [np.bincount(c[c >= 0], minlength=width) for c in map(self._codes, groups)]
        counts = np.array(found, dtype=np.int64).reshape(len(found), width)
        return np.asarray(counts.cumsum(0) - counts)

    @cached_property
    def _shown(self) -> Int64[ndarray, "g c"]:
        """Visits of each class in each group."""
        rows = []
        for group in range(len(self._places.starts) - 1):
            codes, times = self._times(group)
            shown = codes >= 0
            rows.append(np.bincount(codes[shown], times[shown], minlength=len(self._rounds)))
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self._rounds))


def _from(places: Places, group: int, offsets: Positions) -> Positions:
    return np.asarray(places.starts[group] + offsets, dtype=np.int64)


def _weights(places: Places, group: int) -> Float64[ndarray, " n"]:
    return places.group(group).weight.astype(np.float64)


def _uniform(key: int, start: int, stop: int) -> Float64[ndarray, " n"]:
    """Return draws start..stop-1, uniform in [0, 1)."""
    bits = keyed64(key, np.arange(start, stop, dtype=np.int64))
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _drawn(edges: Float64[ndarray, " g"], uniform: Float64[ndarray, " n"]) -> Positions:
    """Return the index that each draw hits, in proportion to the steps of `edges`."""
    last = np.searchsorted(edges, edges[-1])  # never land on zero weights at the end
    hit = np.searchsorted(edges, uniform * edges[-1], side="right")
    return np.asarray(np.minimum(hit, last), dtype=np.int64)
