"""k-means whose result does not depend on the number of threads.

FAISS finds the nearest centroids (`Neighbors.search`, blocks of one thread each); the means are
summed here, in float64 and in the order of the points. Shapes: N points, K clusters, D dimensions.
"""

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray
from scipy.sparse import csr_array

from curate.selectors.neighbors import Neighbors

BLOCK_ROWS = 16_384


def kmeans(
    points: Float32[ndarray, "n d"], clusters: int, seed: int, iterations: int = 20
) -> Float32[ndarray, "k d"]:
    """Return the centroids of Lloyd's k-means from random points.

    It ends early when no point changes its cluster. A cluster that loses its last point begins
    again at the point farthest from its centroid (the second such cluster at the second farthest,
    and so on). The same for the same points and seed, however many threads there are; other builds
    of FAISS and other processors round otherwise.

    Raises:
        ValueError: fewer points than clusters.
        RuntimeError: FAISS is not installed.
    """
    n = len(points)
    if not 1 <= clusters <= n:
        raise ValueError(f"{clusters} clusters of {n} points; choose 1 to {n}")
    start = np.sort(np.random.default_rng(seed).choice(n, clusters, replace=False))
    centroids = points[start]
    before = np.full(n, -1, dtype=np.int64)
    for _ in range(iterations):
        index = Neighbors(points.shape[1], "euclidean")
        index.add(centroids)
        distance, number = index.search(points, 1)
        cluster = number[:, 0]
        if np.array_equal(cluster, before):
            break
        before = cluster
        centroids, empty = _means(points, cluster, clusters)
        farthest = np.argsort(-distance[:, 0], kind="stable")[: len(empty)]
        centroids[empty] = points[farthest]
    return centroids


def _means(
    points: Float32[ndarray, "n d"], cluster: Int64[ndarray, " n"], clusters: int
) -> tuple[Float32[ndarray, "k d"], Int64[ndarray, " e"]]:
    """Return the mean of each cluster, 0 of one without points, and which these are."""
    sums = np.zeros((clusters, points.shape[1]))
    for at in range(0, len(points), BLOCK_ROWS):
        block, theirs = points[at : at + BLOCK_ROWS], cluster[at : at + BLOCK_ROWS]
        ones = (np.ones(len(block)), (theirs, np.arange(len(block))))
        sums += csr_array(ones, shape=(clusters, len(block))) @ block
    counts = np.bincount(cluster, minlength=clusters)
    means = sums / np.maximum(counts, 1)[:, None]
    return means.astype(np.float32), np.flatnonzero(counts == 0)
