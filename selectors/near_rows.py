"""Each row's nearest other rows by Euclidean distance: among all rows, or those of near cells.

Shapes: N rows, D dimensions, K neighbours, C cells, P cells that a row looks in, Q rows that look,
M rows that they look among.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32, Int64
from numpy import ndarray

from curate.selectors.keyed import keyed64, stream_key
from curate.selectors.neighbors import Neighbors
from curate.selectors.quantise import quantise
from curate.selectors.scaled import ScaledVectors, exponent_of
from curate.selectors.vectors import Vectors

TOGETHER = 16_384
"""Rows that are compared with others at once; fixed, as rounding follows the shape of a product."""
SAMPLE = 64
"""Rows of each cell that k-means sees."""
LARGEST = 2
"""A cell of more than as many times the mean is cut, so that time is bounded."""
VISITS = 1 << 22
"""Looks into cells that are sorted at once."""
CHECKED = 256
"""Rows whose true neighbours are looked for."""


@dataclass(frozen=True)
class NearRows:
    """Of each row the numbers of K others, nearest first, and how far they are.

    A row for which fewer were found is a neighbour of its own at float32's largest number. `recall`
    is the share of true nearest rows among those found (of equally far ones any), `stretch` the sum
    of the distances to those found over that to the true ones: both of 256 rows drawn by the seed,
    for which all rows are looked through, and 1 where that was done for every row.
    """

    near: Int[ndarray, "n k"]
    away: Float32[ndarray, "n k"]
    used_cells: int
    recall: float
    stretch: float


def near_rows(vectors: Vectors, k: int, cells: int = 1, probes: int = 8, seed: int = 0) -> NearRows:
    """Return each row's k nearest other rows; all others where there are no more than k.

    Exact with one cell, in time N²·D. With more the rows are cut by k-means, which sees 64 rows of
    each, and a row looks in those `probes` cells alone whose centroids are nearest. A cell of more
    than twice the mean is cut at random by the seed, and each part counts as a cell. Time at most
    2·N²·D·probes / cells, and half of that where cells are even. The vectors, which must be finite,
    may be of any scale: they are looked through once more.

    Memory: a run of 16 384 rows or a cell, three times, and its products; the sample of k-means;
    8 bytes for each neighbour of a row, 4 for each cell it looks in, and some 30 more.

    Raises:
        RuntimeError: FAISS is not installed.
    """
    exponent = exponent_of(vectors)
    vectors = ScaledVectors(vectors, exponent)
    k, cells = min(k, vectors.rows - 1), min(cells, vectors.rows)
    recall = stretch = 1.0
    if cells == 1:
        found, used = _among_all(vectors, np.arange(vectors.rows), k), 1
    else:
        found, used = _among_near(vectors, k, cells, probes, seed)
        if k:
            recall, stretch = _checked(vectors, found.near, seed)
    with np.errstate(over="ignore"):
        np.ldexp(found.away, -exponent, out=found.away)
    np.minimum(found.away, np.finfo(np.float32).max, out=found.away)
    return NearRows(found.near, found.away, used, recall, stretch)


class _Nearest:
    """The nearest that some rows have found so far: itself, infinitely far, where there is none."""

    def __init__(self, vectors: Vectors, rows: Int64[ndarray, " q"], k: int) -> None:
        self._vectors, self._rows = vectors, rows
        kind = np.int32 if vectors.rows <= np.iinfo(np.int32).max else np.int64
        self.near = np.repeat(rows.astype(kind)[:, None], k, axis=1)
        self.away = np.full((len(rows), k), np.inf, dtype=np.float32)

    def look(self, places: Int64[ndarray, " q"], among: Int64[ndarray, " m"]) -> None:
        """Have the rows at these places look among rows that they have not looked among before.

        Equal distances come in the order of the rows; where k cuts through those of one call, any
        may be taken. All are moved by the mean of `among` first: FAISS takes distances from
        float32 products, which far from the origin lose their digits.
        """
        k = self.near.shape[1]
        if not k or not len(among):
            return
        base = self._vectors.take(among)
        mean = base.mean(axis=0, dtype=np.float64).astype(np.float32)
        index = Neighbors(self._vectors.dimension, "euclidean")
        index.add(base - mean)
        del base
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            rows = self._rows[some]
            queries = self._vectors.take(rows) - mean
            away, found = index.search(queries, min(k + 1, len(among)))
            near = among[found]
            away[near == rows[:, None]] = np.inf  # of copies a row may not find itself
            nearer = np.flatnonzero(away.min(axis=1) <= self.away[some, -1])
            some, away, near = some[nearer], away[nearer], near[nearer]
            away = np.concatenate([self.away[some], away], axis=1)
            near = np.concatenate([self.near[some], near], axis=1)
            best = np.lexsort((near, away), axis=1)[:, :k]
            self.away[some] = np.take_along_axis(away, best, 1)
            self.near[some] = np.take_along_axis(near, best, 1)


def _among_all(vectors: Vectors, rows: Int64[ndarray, " q"], k: int) -> _Nearest:
    """Return the nearest of all rows to each of these."""
    found = _Nearest(vectors, rows, k)
    places = np.arange(len(rows))
    for start in range(0, vectors.rows, TOGETHER):
        found.look(places, np.arange(start, min(start + TOGETHER, vectors.rows)))
    return found


def _among_near(
    vectors: Vectors, k: int, cells: int, probes: int, seed: int
) -> tuple[_Nearest, int]:
    """Return the nearest rows in the cells each row looks in, and the number of cells."""
    clusters = quantise(vectors, cells, seed, SAMPLE)
    parts = np.maximum(1, -(-clusters.rows // (LARGEST * -(-vectors.rows // cells))))
    looked, used = _looked_in(vectors, clusters.centroids, parts, probes, seed), int(parts.sum())
    del clusters
    found = _Nearest(vectors, np.arange(vectors.rows), k)
    for members, visitors in _visits(looked, used):
        found.look(visitors, members)
    return found, used


def _looked_in(
    vectors: Vectors,
    centroids: Float64[ndarray, "c d"],
    parts: Int64[ndarray, " c"],
    probes: int,
    seed: int,
) -> Int32[ndarray, "p n"]:
    """Return the cells each row looks in, its own first, where clusters are in so many `parts`.

    A row's draw says to which of its cluster's cells it belongs. It looks in all cells of one
    cluster before those of the next.
    """
    first = np.cumsum(parts) - parts
    mean = centroids.mean(axis=0)
    index = Neighbors(vectors.dimension, "euclidean")
    index.add((centroids - mean).astype(np.float32))
    looked = np.empty((min(probes, int(parts.sum())), vectors.rows), dtype=np.int32)
    key = stream_key(seed)
    for start in range(0, vectors.rows, TOGETHER):
        rows = np.arange(start, min(start + TOGETHER, vectors.rows))
        moved = vectors.take(rows) - mean.astype(np.float32)
        nearest = index.search(moved, min(probes, len(centroids)))[1]
        draw = (keyed64(key, rows) >> np.uint64(1)).astype(np.int64)
        rank, turn = np.zeros_like(rows), np.zeros_like(rows)
        for p in range(len(looked)):
            cluster = nearest[rows - start, rank]
            looked[p, start : start + len(rows)] = first[cluster] + (draw + turn) % parts[cluster]
            turn += 1
            is_through = turn == parts[cluster]
            rank[is_through] += 1
            turn[is_through] = 0
    return looked


def _visits(
    looked: Int32[ndarray, "p n"], cells: int
) -> Iterator[tuple[Int64[ndarray, " m"], Int64[ndarray, " q"]]]:
    """Yield each cell's rows and the rows that look in it, its own among them, both ascending."""
    n = looked.shape[1]
    ends = np.cumsum(sum(np.bincount(cell, minlength=cells) for cell in looked))
    first = done = 0
    while first < cells:
        last = max(first + 1, int(np.searchsorted(ends, done + VISITS, side="right")))
        hits = np.concatenate(
            [p * n + np.flatnonzero((c >= first) & (c < last)) for p, c in enumerate(looked)]
        )
        ordered = hits[np.argsort(looked.reshape(-1)[hits], kind="stable")]
        for some in np.split(ordered, ends[first : last - 1] - done):
            yield some[some < n], np.sort(some % n)
        first, done = last, int(ends[last - 1])


def _checked(vectors: Vectors, near: Int[ndarray, "n k"], seed: int) -> tuple[float, float]:
    """Return the recall and the stretch of a sample of rows."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(vectors.rows, min(CHECKED, vectors.rows), replace=False))
    true = _lengths(vectors, rows, _among_all(vectors, rows, near.shape[1]).near)
    found = _lengths(vectors, rows, near[rows])
    # The k-th true one is told from the next in float32: room for the rounding of their order.
    recall = float((found <= true[:, -1:] * (1 + 1e-6)).mean())
    is_found = np.isfinite(found)
    total = float(true[is_found].sum())
    return recall, float(found[is_found].sum()) / total if total else 1.0


def _lengths(
    vectors: Vectors, rows: Int64[ndarray, " q"], near: Int[ndarray, "q k"]
) -> Float64[ndarray, "q k"]:
    """Return how far these are, in float64, ascending; infinity where a row stands for itself."""
    here = vectors.take(rows).astype(np.float64)
    others = near.T.astype(np.int64)
    apart = [np.linalg.norm(vectors.take(column) - here, axis=1) for column in others]
    away = np.where(near == rows[:, None], np.inf, np.stack(apart, axis=1))
    return np.sort(away, axis=1)
