"""How similar each row is to the rows of its cluster that come before it: what SemDeDup compares.

Shapes: N rows, B rows of a block.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from curate.selectors.vectors import Vectors

BLOCK_ROWS = 2048


def similar_before(
    vectors: Vectors, clusters: Sequence[Int64[ndarray, " _"]]
) -> Float32[ndarray, " n"]:
    """Return the largest cosine of each row with a row before it in its cluster; -1 for the first.

    Each cluster lists its rows in the order that says which comes before which; together they hold
    all rows once. Cosines are of float64 products, rounded to float32; a zero vector has cosine 0
    with all but other zero vectors, which equal it.

    Rows with equal vectors are looked at once, so that many copies of one row cost no more than
    the row. Time: the sum of squares of the clusters' different rows, times D; memory: one
    cluster's vectors.
    """
    found = np.full(vectors.rows, -1.0, dtype=np.float32)
    for rows in clusters:
        units = _units(vectors.take(rows))
        first, copies = _distinct(units)
        found[rows[first]] = _highest_before(units[first])
        found[rows[copies]] = 1.0
    return found


def _highest_before(units: Float64[ndarray, "n d"]) -> Float32[ndarray, " n"]:
    highest = np.full(len(units), -1.0)
    for start in range(0, len(units), BLOCK_ROWS):
        block = units[start : start + BLOCK_ROWS]
        for other in range(0, start + 1, BLOCK_ROWS):
            cos = block @ units[other : other + BLOCK_ROWS].T
            if other == start:
                cos[np.triu_indices(len(block))] = -1.0  # not with itself, nor with later rows
            best = cos.max(axis=1)
            highest[start : start + len(block)] = np.maximum(
                highest[start : start + len(block)], best
            )
    return np.asarray(np.clip(highest, -1, 1), dtype=np.float32)


def _distinct(units: Float64[ndarray, "n d"]) -> tuple[Int64[ndarray, " k"], Int64[ndarray, " c"]]:
    """Return the places of the first of each set of equal rows, ascending, and of all others."""
    as_bytes: ndarray = np.ascontiguousarray(units + 0.0).view(
        np.dtype((np.void, units[:1].nbytes))
    )
    first = np.sort(np.unique(as_bytes[:, 0], return_index=True)[1])
    return first, np.setdiff1d(np.arange(len(units)), first)


def _units(block: Float32[ndarray, "b d"]) -> Float64[ndarray, "b d"]:
    wide = block.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.where(lengths > 0, lengths, 1))
