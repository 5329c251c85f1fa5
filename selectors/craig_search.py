"""CRAIG's greedy search in one set of rows: facility location on Euclidean distances.

Shapes: n rows, d coordinates, k picks or rows looked at together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from curate.selectors.farthest import EQUAL
from curate.selectors.vectors import Vectors, square_norms

BATCH = 32  # stale gains computed at once
HELD_BYTES = 1 << 28  # distances up to this many bytes are computed once and held
TIED = 1e-9  # gains that differ by less, relatively, are equal

Columns = Callable[["Int64[ndarray, ' k']"], "Float64[ndarray, 'k n']"]


@dataclass(frozen=True)
class Represented:
    """Picks in the order of the search.

    `counts` is how many rows each is the nearest pick of, `saved` how much the sum of all rows'
    distances fell when it came; the first saves what `unserved` for each row leaves over its sum.
    """

    picks: Int64[ndarray, " k"]
    counts: Int64[ndarray, " k"]
    saved: Float64[ndarray, " k"]


def represent(
    vectors: Vectors,
    sizes: Int64[ndarray, " n"],
    amount: int,
    unserved: float | int = np.inf,
    least: float | int = -np.inf,
    with_last: bool = False,
) -> Represented:
    """Return the rows of greedy facility location.

    It ends before the row that would take the sum of `sizes` over `amount`, and before one that
    saves less than `least`; `with_last` has the row that exceeds the amount as well, at the end.
    Rows that leave no distance to be saved come in the order of the table.
    """
    columns = distances_from(vectors)
    n = vectors.rows
    nearest, owner = np.full(n, float(unserved)), np.zeros(n, dtype=np.int64)
    gain = np.full(n, np.inf)  # at least what a row would save; exact where it is fresh
    picks: list[int] = []
    saved: list[float] = []
    left = amount
    while len(picks) < n and left >= 0:
        if picks:
            best, saves = _best(gain, nearest, columns)
        else:
            sums = _sums(columns, n)
            best = int(np.argmax(sums <= sums.min() * (1 + TIED)))
            saves = n * float(unserved) - float(sums[best])
        if saves < least or (sizes[best] > left and not with_last):
            break
        left -= int(sizes[best])
        away = columns(np.array([best]))[0]
        closer = away < nearest
        closer[best] = True
        nearest = np.where(closer, away, nearest)
        owner[closer] = len(picks)
        picks.append(best)
        saved.append(saves)
        gain[best] = -np.inf
    counts = np.bincount(owner, minlength=len(picks))[: len(picks)]
    return Represented(np.array(picks, dtype=np.int64), counts, np.array(saved))


def distances_from(vectors: Vectors) -> Columns:
    """Return the function from rows to the Euclidean distances of all rows from them.

    Computed in float64 as the root of a² + b² - 2ab, and 0 below 1e-7 of the row's length, where
    rounding would tell copies apart. Held where all take no more than HELD_BYTES.
    """
    squares = square_norms(vectors)
    n = vectors.rows

    def computed(rows: Int64[ndarray, " k"]) -> Float64[ndarray, "k n"]:
        theirs = vectors.take(rows).astype(np.float64)
        found = np.empty((len(rows), n))
        at = 0
        for block in vectors.blocks():
            products = theirs @ block.astype(np.float64).T
            products *= -2
            products += squares[rows, None]
            products += squares[at : at + len(block)]
            products[products <= EQUAL * squares[rows, None]] = 0
            np.sqrt(products, out=found[:, at : at + len(block)])
            at += len(block)
        return found

    if n * n * 8 > HELD_BYTES:
        return computed
    held = np.empty((n, n))
    for start in range(0, n, 256):
        stop = min(start + 256, n)
        held[start:stop] = computed(np.arange(start, stop))
    return lambda rows: held[rows]


def _sums(columns: Columns, n: int) -> Float64[ndarray, " n"]:
    rows = np.arange(n)
    batches = [rows[at : at + BATCH] for at in range(0, n, BATCH)]
    return np.concatenate([columns(batch).sum(axis=1) for batch in batches])


def _best(
    gain: Float64[ndarray, " n"], nearest: Float64[ndarray, " n"], columns: Columns
) -> tuple[int, float]:
    """Return the row that saves most, the first of equals, and how much it does.

    `gain` is brought up to date in place. Gains only fall as rows are picked, so those below the
    best fresh one need no new look. Two rows that only save each other's distance save the same,
    whatever rounding says: see TIED.
    """
    fresh: Bool[ndarray, " n"] = np.isneginf(gain)
    highest = -np.inf
    while True:
        least = highest * (1 - TIED) if highest > -np.inf else highest
        stale = np.flatnonzero(~fresh & (gain >= least))
        if not len(stale):
            return int(np.argmax(fresh & (gain >= least))), highest
        if len(stale) > BATCH:
            stale = np.sort(stale[np.argsort(-gain[stale], kind="stable")[:BATCH]])
        saves = np.maximum(nearest - columns(stale), 0).sum(axis=1)
        gain[stale], fresh[stale] = saves, True
        highest = max(highest, float(saves.max()))
