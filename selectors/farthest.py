"""Farthest-first traversal: each row is the farthest from all before it.

What k-center is made of and, with a worth beside the distance, diverse_top.

Shapes: N rows, D dimensions, B rows of a block, M centres that a block has not seen yet.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from curate.selectors.vectors import Vectors

Metric = Literal["cosine", "euclidean", "angle"]
BLOCK_ROWS = 1024
CENTRES = 1024  # compared with a block at once
EQUAL = 1e-14
"""Squared distance, over the squared length, of rows that float32 hardly tells apart."""
_PICKED = -np.inf  # in the place of the squared distance of a row that is a centre


class FarthestFirst:
    """The rows in farthest-first order (Gonzalez 1985), as far as somebody asks.

    The next row is the one with the largest distance to its nearest centre, the earliest of equal
    ones. With `metric="cosine"` distances are Euclidean between vectors scaled to length 1,
    sqrt(2 - 2 cos), a zero vector staying zero; that is a metric, which 1 - cos is not. With
    `"angle"` they are the same but that a zero vector has the cosine 0 with all. `starts` are the
    first centres; rows of `base` are centres that are no rows, and may stand for them.

    With `cells` (row numbers that cover all rows, a start in each) a row is compared with centres
    of its own cell alone, and the next centre is the farthest row of all cells.

    Exact, at less than one pass for a centre: distances only fall, so the largest distance in a
    block of rows when it was last looked at is an upper bound, and only the block whose bound is
    the highest needs to see the centres that came meanwhile, many in one matrix product. Products
    are taken in float64 and distances compared in float32, so that no rounding decides between
    equal rows. Time: at most N·k·D multiplications; memory: 12 bytes a row and D·8 a centre.
    """

    def __init__(
        self,
        vectors: Vectors,
        metric: Metric = "cosine",
        *,
        starts: Sequence[int] = (),
        base: Vectors | None = None,
        cells: Sequence[Int64[ndarray, " _"]] | None = None,
    ) -> None:
        self._vectors, self._metric = vectors, metric
        self._starts = list(enumerate(starts))
        self._order = None if cells is None else np.concatenate(list(cells))
        sizes = [vectors.rows] if cells is None else [len(cell) for cell in cells]
        assert sum(sizes) == vectors.rows, "cells cover the rows"
        assert len(self._starts) == len(sizes) or base is not None, "a start in each cell"
        widest = 4 if metric == "angle" else np.inf
        self._squares = np.full(vectors.rows, widest, dtype=np.float32)
        self._own = np.zeros(vectors.rows)  # squared lengths, known once a block was looked at
        self._centres = [_Growing(vectors.dimension) for _ in sizes]
        for block in [] if base is None else base.blocks():
            for centres in self._centres:
                centres.extend(_scaled(block, metric))
        edges = np.cumsum([0, *sizes])
        self._blocks = [
            (cell, start, min(start + BLOCK_ROWS, int(edges[cell + 1])))
            for cell in range(len(sizes))
            for start in range(int(edges[cell]), int(edges[cell + 1]), BLOCK_ROWS)
        ]
        self._seen = [0] * len(self._blocks)
        self._bounds = [self._bound(block) for block in range(len(self._blocks))]
        heapq.heapify(self._bounds)

    def values(self, rows: Int64[ndarray, " b"]) -> Float32[ndarray, " b"] | Float64[ndarray, " b"]:
        """Return what the next row has most of: the squared distances to the nearest centres.

        Another order overrides this with any value that falls where these distances fall.
        """
        return np.asarray(self._squares[rows])

    def fill(self, sizes: Int64[ndarray, " n"], amount: int) -> Int64[ndarray, " k"]:
        """Return the next rows, as many as fit: it ends before the row that would exceed `amount`.

        `sizes` is what a row takes of the amount.
        """
        order: list[int] = []
        while (found := self._next()) is not None and sizes[found[1]] <= amount:
            cell, row = found
            self._add(cell, row)
            order.append(row)
            amount -= int(sizes[row])
        return np.array(order, dtype=np.int64)

    def radius(self) -> float:
        """Return the largest distance of a row from its nearest centre so far."""
        square, _ = self._farthest()
        return float(np.sqrt(max(0.0, square)))

    def _next(self) -> tuple[int, int] | None:
        """Return the cell and the number of the next centre, None where all rows are centres."""
        if self._starts:
            return self._starts[0]
        value, block = self._farthest()
        if value == _PICKED:
            return None
        rows = self._rows(block)
        return self._blocks[block][0], int(rows[np.argmax(self.values(rows))])

    def _farthest(self) -> tuple[float, int]:
        """Return the largest value (-inf: no row is left) and the block it is in."""
        while True:
            bound, block = self._bounds[0]
            if self._seen[block] == len(self._centres[self._blocks[block][0]]):
                return -bound, block
            self._look(block)
            heapq.heapreplace(self._bounds, self._bound(block))

    def _bound(self, block: int) -> tuple[float, int]:
        return -float(self.values(self._rows(block)).max()), block

    def _look(self, block: int) -> None:
        """Compare a block with the centres that it has not seen."""
        rows, centres = self._rows(block), self._centres[self._blocks[block][0]]
        x_bd = self._vectors.take(rows).astype(np.float64)
        if not self._seen[block]:
            self._own[rows] = np.einsum("bd,bd->b", x_bd, x_bd)
        own_b, scale_b = self._own[rows], None
        if self._metric != "euclidean":
            scale_b = 1 / np.sqrt(np.where(own_b > 0, own_b, 1))
            own_b = (own_b > 0).astype(np.float64)
        if self._metric == "angle":
            own_b = np.ones(len(rows))
        nearest_b = self._squares[rows]
        for start in range(self._seen[block], len(centres), CENTRES):
            c_md = centres.rows(start, start + CENTRES)
            squares_mb = c_md @ x_bd.T
            squares_mb *= -2 if scale_b is None else -2 * scale_b
            if self._metric == "angle":
                squares_mb += 1
            else:
                squares_mb += np.einsum("md,md->m", c_md, c_md)[:, None]
            closest_b = squares_mb.min(axis=0) + own_b
            closest_b[closest_b <= EQUAL * own_b] = 0
            nearest_b = np.minimum(nearest_b, closest_b.astype(np.float32))
        self._squares[rows] = nearest_b
        self._seen[block] = len(centres)

    def _add(self, cell: int, row: int) -> None:
        if self._starts:
            self._starts.pop(0)
        self._squares[row] = _PICKED
        vector = self._vectors.take(np.array([row]))
        self._centres[cell].extend(_scaled(vector, self._metric))

    def _rows(self, block: int) -> Int64[ndarray, " b"]:
        _, start, stop = self._blocks[block]
        return np.arange(start, stop) if self._order is None else self._order[start:stop]


def nearest_to_mean(vectors: Vectors, metric: Metric) -> int:
    """Return the row closest to the mean of all (at length 1 for cosine); two passes."""
    mean = sum(_scaled(block, metric).sum(axis=0) for block in vectors.blocks()) / vectors.rows
    parts = [np.square(_scaled(b, metric) - mean).sum(axis=1) for b in vectors.blocks()]
    return int(np.argmin(np.concatenate(parts).astype(np.float32)))


def _scaled(block: Float32[ndarray, "b d"], metric: Metric) -> Float64[ndarray, "b d"]:
    """Return the block in float64, but for euclidean at length 1."""
    wide = block.astype(np.float64)
    if metric != "euclidean":
        lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        wide /= np.where(lengths > 0, lengths, 1)
    return wide


class _Growing:
    """Rows that are appended to one array."""

    def __init__(self, dimension: int) -> None:
        self._array = np.empty((16, dimension))
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def extend(self, rows: Float64[ndarray, "m d"]) -> None:
        need = self._used + len(rows)
        if need > len(self._array):
            larger = np.empty((max(need, 2 * len(self._array)), self._array.shape[1]))
            larger[: self._used] = self._array[: self._used]
            self._array = larger
        self._array[self._used : need] = rows
        self._used = need

    def rows(self, start: int, stop: int) -> Float64[ndarray, "m d"]:
        return self._array[start : min(stop, self._used)]
