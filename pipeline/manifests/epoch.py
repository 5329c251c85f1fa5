"""Which positions an epoch visits, how often, and in what order."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.pipeline.manifests.order import order
from curate.pipeline.manifests.places import Places, Recent
from curate.selectors.keyed import keyed64, stream_key

_DRAWS, _WITHIN = 3, 4  # what a key is for (1 and 2 are the order's)
CHUNK = 1 << 20


@dataclass(frozen=True)
class EpochPlan:
    """The epoch's places 0..length-1 and the position that each visits.

    Weights of kind `none` and `loss`: every position once. `repeat`: as often as its weight says.
    `sampling`: K draws with replacement, each position with probability weight / sum of weights;
    the draws are independent and a function of (seed, epoch). The visits, sorted by position, are
    then put in `order`. Memory: a few groups of 262 144 positions; nothing per row is held.
    """

    places: Places
    weight_kind: str
    seed: int
    epoch: int
    block: int = 4096
    _visits: "Recent[int, Int64[ndarray, ' n']]" = field(
        default_factory=lambda: Recent(64, lambda _: 1), repr=False, compare=False
    )

    @property
    def length(self) -> int:
        """Visits in this epoch."""
        return int(self._ends[-1])

    def positions(self, start: int, stop: int) -> Int64[ndarray, " n"]:
        """Return the positions that places [start, stop) of the epoch visit."""
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, places: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """Return the positions that these places of the epoch visit."""
        visits = self._ordered(places)
        if self.weight_kind in ("none", "loss"):
            return visits
        group = np.searchsorted(self._ends, visits, side="right") - 1
        positions = np.empty_like(visits)
        for index in np.unique(group):
            mine = group == index
            expanded = self._visits.get(int(index), self._expand)
            positions[mine] = expanded[visits[mine] - self._ends[index]]
        return positions

    def _ordered(self, places: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        pieces = [np.empty(0, dtype=np.int64)]
        # Padding wraps round to the start of the epoch: read each ascending stretch by itself.
        for stretch in np.split(places, np.flatnonzero(np.diff(places) < 0) + 1):
            if len(stretch):
                low, high = int(stretch[0]), int(stretch[-1]) + 1
                visits = order(self.length, self.seed, self.epoch, low, high, self.block)
                pieces.append(visits[stretch - low])
        return np.concatenate(pieces)

    @cached_property
    def _ends(self) -> Int64[ndarray, " g"]:
        """The first visit of each group of positions, and the number of visits."""
        if self.weight_kind in ("none", "loss"):
            return self.places.starts
        return np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)

    @cached_property
    def _counts(self) -> Int64[ndarray, " g"]:
        """How many visits go to each group."""
        groups = range(len(self.places.starts) - 1)
        sums = np.array([self._weights(g).sum() for g in groups], dtype=np.float64)
        if self.weight_kind == "repeat":
            return sums.astype(np.int64)
        edges = np.cumsum(sums)
        counts = np.zeros(len(sums), dtype=np.int64)
        total = int(self.places.starts[-1])
        key = stream_key(self.seed, self.epoch, _DRAWS)
        for start in range(0, total, CHUNK):
            uniform = _uniform(key, start, min(start + CHUNK, total))
            counts += np.bincount(_drawn(edges, uniform), minlength=len(sums))
        return counts

    def _expand(self, group: int) -> Int64[ndarray, " n"]:
        """Return the group's positions, sorted, each as often as it is visited."""
        weights = self._weights(group)
        first = int(self.places.starts[group])
        if self.weight_kind == "repeat":
            return first + np.repeat(np.arange(len(weights)), weights.astype(np.int64))
        key = stream_key(self.seed, self.epoch, _WITHIN, group)
        uniform = _uniform(key, 0, int(self._counts[group]))
        return first + np.sort(_drawn(np.cumsum(weights), uniform))

    def _weights(self, group: int) -> Float64[ndarray, " n"]:
        return self.places.group(group).weight.astype(np.float64)


def _uniform(key: int, start: int, stop: int) -> Float64[ndarray, " n"]:
    """Return draws start..stop-1, uniform in [0, 1)."""
    bits = keyed64(key, np.arange(start, stop, dtype=np.int64))
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _drawn(edges: Float64[ndarray, " g"], uniform: Float64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """Return the index that each draw hits, in proportion to the steps of `edges`."""
    last = np.searchsorted(edges, edges[-1])  # never land on zero weights at the end
    hit = np.searchsorted(edges, uniform * edges[-1], side="right")
    return np.asarray(np.minimum(hit, last), dtype=np.int64)
