"""Many rows as a few centres with shares, and what that does to their mean in a kernel's space.

Shapes: n rows, k centres, d coordinates.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.spatial.distance import pdist

from curate.selectors.keyed import keyed64
from curate.selectors.lloyd import kmeans
from curate.selectors.neighbors import Neighbors
from curate.selectors.vectors import Vectors, matrix

PER_CENTRE = 256  # rows for each centre that k-means looks at, as FAISS does
PAIRED = 500  # rows of each set whose distances are looked at for a median


@dataclass(frozen=True)
class Clustered:
    """Rows as centres: `cluster` is the centre of each row, `away` how far from it the row is.

    `shares` are the parts of the rows at each centre. Few rows are their own centres.
    """

    centres: Float64[ndarray, "k d"]
    shares: Float64[ndarray, " k"]
    cluster: Int64[ndarray, " n"]
    away: Float64[ndarray, " n"]

    @property
    def rows(self) -> int:
        return len(self.cluster)

    def moved(self, weights: Float64[ndarray, " k"], sigma: float | int) -> float:
        """Return the mean over rows of weight · |phi(x) - phi(centre)| for a Gaussian kernel.

        |phi(x) - phi(c)|² = 2 - 2 exp(-|x - c|² / (2 sigma²)). By the triangle inequality the
        weighted mean of phi moves by at most this when rows are put at their centres.
        """
        steps = np.sqrt(-2 * np.expm1(-np.square(self.away) / (2 * sigma**2)))
        return float((weights[self.cluster] * steps).mean())


def clustered(vectors: Vectors, points: int, seed: int) -> Clustered:
    """Return the rows themselves up to `points` of them, else as many centres of k-means.

    k-means looks at 256 rows for each centre, drawn by `seed`; then every row goes to its nearest
    centre. Memory: these rows, and 16 bytes for each row.
    """
    n = vectors.rows
    if n <= points:
        centres = matrix(vectors).astype(np.float64)
        return Clustered(centres, np.full(n, 1 / n), np.arange(n), np.zeros(n))
    looked_at = some_places(n, points * PER_CENTRE, seed)
    narrow = kmeans(vectors.take(looked_at), points, seed % (1 << 31))
    index = Neighbors(vectors.dimension, "euclidean")
    index.add(narrow)
    found = [index.search(block, 1) for block in vectors.blocks()]
    cluster = np.concatenate([number[:, 0] for _, number in found])
    away = np.concatenate([distance[:, 0] for distance, _ in found]).astype(np.float64)
    # Centres without rows have no part in any mean.
    used, cluster = np.unique(cluster, return_inverse=True)
    shares = np.bincount(cluster) / n
    return Clustered(narrow[used].astype(np.float64), shares, cluster.astype(np.int64), away)


def median_distance(source: Float64[ndarray, "n d"], target: Float64[ndarray, "t d"]) -> float:
    """Return the median Euclidean distance between points of the two sets, 1 where all are one.

    Of each set up to 500 points are looked at, evenly spaced.
    """
    some = [points[:: max(1, -(-len(points) // PAIRED))] for points in (source, target)]
    distances = pdist(np.vstack(some)) if len(some[0]) + len(some[1]) > 1 else np.zeros(1)
    return float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0


def some_places(n: int, most: int, seed: int) -> Int64[ndarray, " m"]:
    """Return up to `most` of n places at random, ascending."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.argsort(keyed64(seed, np.arange(n)), kind="stable")[:most])
