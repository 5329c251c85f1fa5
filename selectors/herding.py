"""Rows whose mean follows the mean of all: herding.

Shapes: N rows, D dimensions, K picks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from curate.selectors.apportion import apportion
from curate.selectors.cells import cells_of
from curate.selectors.divided import Divided, Part
from curate.selectors.inner_products import inner_products, mean_of
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import (
    BLOCK_ROWS,
    SMALL_BYTES,
    ArrayVectors,
    PartOfVectors,
    UnitVectors,
    Vectors,
    VectorTable,
    matrix,
    square_norms,
    usable_target,
)

FAR = 4
"""The largest length over the largest distance from the mean up to which rows are not moved."""
EXACT_PICKS = 10_000
"""Above as many picks the rows are cut into cells, unless `cells` says otherwise."""


@dataclass(frozen=True)
class Herding(Divided):
    """After t picks x_1 ... x_t the row x with the smallest ||(t + 1) mu - sum_s x_s - x||.

    Welling 2009; Rebuffi et al. 2017 (arXiv:1611.07725, algorithm 4), mu the mean of the vectors
    of the group's rows that may be chosen, or of the target's where they are given. Each row at
    most once. (DeepCore takes the largest, which runs away from the mean.) `metric="euclidean"`
    takes the vectors as they are, `"cosine"` at length 1. `mean_gap`, recorded, is the distance of
    the picks' mean from mu, the largest of all groups. Ranked without groups.

    Time n·D and one pass over the vectors for each pick. Memory: some 100 bytes a row, and the
    vectors once more in float32 where they take no more than 256 MiB; above that they are read
    again block by block, and nothing of their size is held.

    Exact up to 10 000 picks, and with a target. Above that, or with `cells`, the rows are cut into
    cells by k-means (that many; by default as many as picks need, 10 000 for each, and as make
    each take 256 MiB at most). Each cell's picks, in proportion to its rows, follow its own mean:
    the picks' mean is off by no more than the cells' own gaps, averaged, and what rounding their
    shares to whole rows moves it by. Time k·n·D / cells multiplications. Ranks take the cells'
    picks in turn, each in its proportion.
    """

    metric: Literal["cosine", "euclidean"] = "euclidean"
    cells: int | None = None
    uses_vectors: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("cosine", "euclidean"):
            raise ValueError(f"metric must be cosine or euclidean, not {self.metric!r}")
        if isinstance(self.cells, int) and self.cells < 1:
            raise ValueError(f"cells must be a count of at least 1, not {self.cells!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, gaps, most = [], [0.0], 1
        target = usable_target(table)
        if target is not None and (self.cells or 1) > 1:
            raise ValueError("cells follow the means of their own rows, no target's; leave one out")
        for part in self.parts(table, budget):
            vectors = self._seen(part.vectors)
            mean = mean_of(vectors if target is None else self._seen(target))
            cells = [] if target is not None else self._cells(part, int(rng.integers(1 << 31)))
            if len(cells) > 1:
                order, total = _in_cells(vectors, mean, part, cells)
            else:
                order, total = herd(vectors, mean, part.sizes, part.amount)
            places.append(part.places[order])
            gaps.append(float(np.linalg.norm(total)) / max(1, len(order)))
            most = max(most, len(cells))
        chosen = np.concatenate(places)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        params: dict[str, object] = {"mean_gap": max(gaps), "used_cells": most}
        return picked(table, chosen, ranks=ranks, params=params)

    def _cells(self, part: Part, seed: int) -> list[Int64[ndarray, " _"]]:
        """Return the cells to cut a part into, none where it is to stay whole."""
        rows, row_bytes = len(part.sizes), 4 * part.vectors.dimension
        if self.cells is not None:
            count, largest = min(self.cells, rows), None
        else:
            picks = part.amount * rows // max(1, int(part.sizes.sum()))
            count = -(-picks // EXACT_PICKS)
            if count > 1:
                count = max(count, -(-rows * row_bytes // SMALL_BYTES))
            largest = max(1, SMALL_BYTES // row_bytes)
        return cells_of(part.vectors, count, self.metric, seed, largest) if count > 1 else []

    def _seen(self, vectors: Vectors) -> Vectors:
        return UnitVectors(vectors) if self.metric == "cosine" else vectors


def _in_cells(
    vectors: Vectors, mean: Float64[ndarray, " d"], part: Part, cells: list[Int64[ndarray, " _"]]
) -> tuple[Int64[ndarray, " k"], Float64[ndarray, " d"]]:
    """Return what `herd` does, each cell following its own mean; the picks of cells in turn."""
    shares = [int(part.sizes[cell].sum()) for cell in cells]
    total, orders, turns = np.zeros(len(mean)), [], []
    for cell, amount in zip(cells, apportion(part.amount, shares, shares), strict=True):
        inside = PartOfVectors(vectors, cell)
        own_mean = mean_of(inside)
        order, moved = herd(inside, own_mean, part.sizes[cell], amount)
        total += moved + len(order) * (own_mean - mean)
        orders.append(cell[order])
        turns.append((np.arange(len(order)) + 0.5) / len(cell))
    in_turn = np.argsort(np.concatenate(turns), kind="stable")
    return np.concatenate(orders)[in_turn], total


def herd(
    vectors: Vectors, mean: Float64[ndarray, " d"], sizes: Int64[ndarray, " n"], amount: int
) -> tuple[Int64[ndarray, " k"], Float64[ndarray, " d"]]:
    """Return rows in the order of herding, and the sum of what each is off `mean`.

    It ends before the row that would take the sum of `sizes` over `amount`. With z = x - mean the
    next row minimises ||z + sum_s z_s||. Products in float32 find the rows that may be it, and
    float64 decides among them, equal ones in order.
    """
    rest = _Moved(vectors, mean)
    own = square_norms(rest)
    near, lengths = _near(vectors, rest, own)
    # What a float32 product of D terms may be off, over both lengths (Higham 2002, section 3.1).
    slack = 2 * lengths * (vectors.dimension + 2) * 2.0**-23
    exponent = int(np.frexp(own.max(initial=0))[1])
    order: list[int] = []
    total, is_open = np.zeros(len(mean)), np.ones(vectors.rows, dtype=bool)
    while len(order) < vectors.rows:
        # Of rows as they are all products are off by the same, which changes no order.
        away = np.where(is_open, own + 2 * inner_products(near, total), np.inf)
        off = slack * np.linalg.norm(total)
        close = np.flatnonzero(away - off <= (away + off).min())
        row = int(close[np.argmin(_exactly(rest, close, own[close], total, exponent))])
        if sizes[row] > amount:
            break
        amount -= int(sizes[row])
        is_open[row] = False
        order.append(row)
        total += rest.take(np.array([row]))[0]
        if amount == 0:
            break
    return np.array(order, dtype=np.int64), total


def _near(
    vectors: Vectors, rest: "_Moved", own: Float64[ndarray, " n"]
) -> tuple[Vectors, Float64[ndarray, " n"]]:
    """Return what products are taken of in each pass, and the rows' lengths there.

    Rows as they are where that is cheaper than moving them again, unless they are so far from the
    origin, for their distances from the mean, that float32 would leave many in doubt.
    """
    if not rest.is_held:
        squares = square_norms(vectors)
        if squares.max(initial=0) <= FAR**2 * own.max(initial=0):
            return vectors, np.sqrt(squares)
    return rest, np.sqrt(own)


def _exactly(
    rest: "_Moved",
    rows: Int64[ndarray, " c"],
    own: Float64[ndarray, " c"],
    total: Float64[ndarray, " d"],
    exponent: int,
) -> Float32[ndarray, " c"]:
    """Return |z|² + 2 <z, total> of these rows, over 2^exponent, which float32 then has room for.

    From float64, some rows at a time: of copies there may be very many.
    """
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        wide = rest.take(rows[part]).astype(np.float64)
        square = own[part] + 2 * np.einsum("nd,d->n", wide, total)
        found[part] = np.ldexp(square, -exponent)
    return found


class _Moved:
    """Other vectors less their mean, in float32; few are held, others made again when read.

    The mean is taken off in two steps of float32, what it is there and what that leaves of it: as
    near as in float64, and without a wider copy of each block.
    """

    def __init__(self, whole: Vectors, mean: Float64[ndarray, " d"]) -> None:
        self.rows, self.dimension = whole.rows, whole.dimension
        self._whole, self._mean = whole, mean.astype(np.float32)
        self._rest = (mean - self._mean).astype(np.float32)
        self._held: Vectors | None = None
        if self.rows * self.dimension * 4 <= SMALL_BYTES:
            self._held = ArrayVectors(matrix(self))

    @property
    def is_held(self) -> bool:
        return self._held is not None

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        if self._held is not None:
            return self._held.blocks()
        return (self._moved(block) for block in self._whole.blocks())

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        if self._held is not None:
            return self._held.take(numbers)
        return self._moved(self._whole.take(numbers))

    def _moved(self, block: Float32[ndarray, "b d"]) -> Float32[ndarray, "b d"]:
        found = block - self._mean
        found -= self._rest
        return np.asarray(found)
