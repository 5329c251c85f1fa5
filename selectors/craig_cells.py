"""CRAIG in cells of near rows, for more rows than can be compared with each other.

Shapes: n rows, d coordinates, k picks.
"""

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.craig_search import HELD_BYTES, represent
from curate.selectors.inner_products import mean_of
from curate.selectors.vectors import Vectors, part_of

CELL_ROWS = 5792  # the square of which, in float64, takes HELD_BYTES
assert CELL_ROWS**2 * 8 <= HELD_BYTES
BLOCK = 1024  # rows, and picks, compared at once


def in_cells(
    vectors: Vectors,
    cells: list[Int64[ndarray, " _"]],
    sizes: Int64[ndarray, " n"],
    amount: int,
) -> tuple[Int64[ndarray, " k"], Int64[ndarray, " k"]]:
    """Return greedy's picks where no row serves rows of another cell, and the rows each counts.

    What greedy's rows save only falls, in each cell, so greedy over all cells takes the largest of
    what the cells' own orders save: each cell is searched once. What a row must save at least to be
    among the picks is known better with every cell, and ends the later ones early.
    """
    far = _farthest(vectors)
    rows, saved, home = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)
    least = -np.inf
    for number, cell in enumerate(cells):
        found = represent(part_of(vectors, cell), sizes[cell], amount, far, least, with_last=True)
        rows = np.concatenate([rows, cell[found.picks]])
        # Equal up to the table's tolerance, a later row may seem to save a little more.
        saved = np.concatenate([saved, np.minimum.accumulate(found.saved)])
        home = np.concatenate([home, np.full(len(found.picks), number)])
        order = np.argsort(-saved, kind="stable")
        full = np.flatnonzero(np.cumsum(sizes[rows[order]]) > amount)
        if len(full):  # the row that ends the search; what saves less comes after it
            order = order[: full[0] + 1]
            least = float(saved[order[-1]])
        rows, saved, home = rows[order], saved[order], home[order]
    fits = np.cumsum(sizes[rows]) <= amount
    rows, home = rows[fits], home[fits]
    return rows, _counts(vectors, cells, rows, home)


def _farthest(vectors: Vectors) -> float:
    """Return twice the largest distance from the mean: no two rows are farther apart."""
    mean, most = mean_of(vectors), 0.0
    for block in vectors.blocks():
        most = max(most, float(np.square(block - mean).sum(axis=1).max()))
    return 2 * float(np.sqrt(most))


def _counts(
    vectors: Vectors,
    cells: list[Int64[ndarray, " _"]],
    picks: Int64[ndarray, " k"],
    home: Int64[ndarray, " k"],
) -> Int64[ndarray, " k"]:
    """Return how many rows each pick is the nearest of: in its cell, else of all picks."""
    counts = np.zeros(len(picks), dtype=np.int64)
    everything = np.arange(len(picks))
    for number, cell in enumerate(cells):
        mine = np.flatnonzero(home == number)
        among = mine if len(mine) else everything
        for start in range(0, len(cell) if len(picks) else 0, BLOCK):
            some = cell[start : start + BLOCK]
            owner = among[_nearest(vectors, some, picks[among])]
            place = np.searchsorted(some, picks[mine])  # a pick counts itself, copies or not
            inside = (place < len(some)) & (some[np.minimum(place, len(some) - 1)] == picks[mine])
            owner[place[inside]] = mine[inside]
            counts += np.bincount(owner, minlength=len(picks))
    return counts


def _nearest(
    vectors: Vectors, rows: Int64[ndarray, " b"], picks: Int64[ndarray, " k"]
) -> Int64[ndarray, " b"]:
    """Return which pick is nearest to each row, the earliest of equals."""
    x_bd = vectors.take(rows).astype(np.float64)
    best_b: Float64[ndarray, " b"] = np.full(len(rows), np.inf)
    which_b = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(picks), BLOCK):
        p_kd = vectors.take(picks[start : start + BLOCK]).astype(np.float64)
        square_bk = np.square(p_kd).sum(axis=1) - 2 * x_bd @ p_kd.T
        first_b = square_bk.argmin(axis=1)
        found_b = square_bk[np.arange(len(rows)), first_b]
        closer = found_b < best_b
        best_b[closer], which_b[closer] = found_b[closer], start + first_b[closer]
    return which_b
