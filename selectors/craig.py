"""Rows that stand for all others, weighted by how many they stand for: CRAIG."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from curate.selectors.divided import Divided
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable, square_norms

BATCH = 32  # stale gains computed at once
HELD_BYTES = 1 << 28  # distances up to this many bytes are computed once and held

TIED = 1e-9  # gains that differ by less, relatively, are equal

Columns = Callable[["Int64[ndarray, ' k']"], "Float64[ndarray, 'n k']"]


@dataclass(frozen=True)
class Craig(Divided):
    """Rows that minimise sum_i min_{j in S} d_ij greedily; the weight counts the rows nearest to j.

    Mirzasoleiman, Bilmes and Leskovec 2020 (arXiv:1906.01827, algorithm 1): facility location on
    max d - d of Euclidean distances between gradients of the last layer, in each group (class) by
    itself, by exact lazy greedy. After the first row (that with the least sum of distances) the
    order does not depend on what stands for max d. Weights of a group add up to its rows; DeepCore
    counts from 1, so that its weights add up to the rows and the picks together. Of equally
    near picks the earlier one counts the row, a pick always itself. Ranked without groups.

    Time n²d for each group, twice, and some n·d for each pick; above 5792 rows in a group
    distances are computed again when they are needed. Memory: 256 MiB and some 40 bytes a row.
    """

    uses_vectors: ClassVar[bool] = True

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, weights = [], []
        for part in self.parts(table, budget):
            picks, counts = represent(part.vectors, part.sizes, part.amount)
            places.append(part.places[picks])
            weights.append(counts.astype(np.float64))
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        weight = np.concatenate(weights) if weights else np.empty(0)
        return picked(table, chosen, weight, ranks, params={"weight_kind": "loss"})


def represent(
    vectors: Vectors, sizes: Int64[ndarray, " n"], amount: int
) -> tuple[Int64[ndarray, " k"], Int64[ndarray, " k"]]:
    """Return rows in the order of greedy facility location, and how many rows each is nearest to.

    It ends before the row that would take the sum of `sizes` over `amount`. Rows that leave no
    distance to be saved come in the order of the table.
    """
    columns = distances_from(vectors)
    n = vectors.rows
    nearest, owner = np.zeros(0), np.zeros(n, dtype=np.int64)
    gain = np.full(n, np.inf)  # at least what a row would save; exact where it is fresh
    picks: list[int] = []
    left = amount
    while len(picks) < n:
        if not picks:
            best = int(np.argmin(_sums(columns, n)))
        else:
            best = _best(gain, nearest, columns)
        if sizes[best] > left:
            break
        left -= int(sizes[best])
        away = columns(np.array([best]))[:, 0]
        closer = away < nearest if picks else np.ones(n, dtype=bool)
        closer[best] = True
        nearest = np.where(closer, away, nearest) if picks else away
        owner[closer] = len(picks)
        picks.append(best)
        gain[best] = -np.inf
    return np.array(picks, dtype=np.int64), np.bincount(owner, minlength=len(picks))[: len(picks)]


def distances_from(vectors: Vectors) -> Columns:
    """Return the function from rows to the Euclidean distances of all rows from them.

    Computed in float64 as the root of a² + b² - 2ab: near 0 to about 1e-8 of the norms.
    """
    squares = square_norms(vectors)

    def computed(rows: Int64[ndarray, " k"]) -> Float64[ndarray, "n k"]:
        theirs = vectors.take(rows).astype(np.float64)
        found = np.empty((vectors.rows, len(rows)))
        at = 0
        for block in vectors.blocks():
            products = block.astype(np.float64) @ theirs.T
            mine = squares[at : at + len(block), None]
            found[at : at + len(block)] = mine + squares[rows] - 2 * products
            at += len(block)
        return np.asarray(np.sqrt(np.maximum(found, 0)))

    if vectors.rows**2 * 8 > HELD_BYTES:
        return computed
    held = computed(np.arange(vectors.rows))
    return lambda rows: held[:, rows]


def _sums(columns: Columns, n: int) -> Float64[ndarray, " n"]:
    rows = np.arange(n)
    batches = [rows[at : at + BATCH] for at in range(0, n, BATCH)]
    return np.concatenate([columns(batch).sum(axis=0) for batch in batches])


def _best(gain: Float64[ndarray, " n"], nearest: Float64[ndarray, " n"], columns: Columns) -> int:
    """Return the row that saves most, the first of equals; `gain` is brought up to date in place.

    Gains only fall as rows are picked, so those below the best fresh one need no new look. Two rows
    that only save each other's distance save the same, whatever rounding says: see TIED.
    """
    fresh: Bool[ndarray, " n"] = np.isneginf(gain)
    highest = -np.inf
    while True:
        least = highest * (1 - TIED) if highest > -np.inf else highest
        stale = np.flatnonzero(~fresh & (gain >= least))
        if not len(stale):
            return int(np.argmax(fresh & (gain >= least)))
        if len(stale) > BATCH:
            stale = np.sort(stale[np.argsort(-gain[stale], kind="stable")[:BATCH]])
        saved = np.maximum(nearest[:, None] - columns(stale), 0).sum(axis=0)
        gain[stale], fresh[stale] = saved, True
        highest = max(highest, float(saved.max()))
