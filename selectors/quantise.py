"""Clusters in place of rows: k-means on a sample, then every row to its nearest centroid.

Vectors are read in blocks and never held: memory is the sample (SAMPLE rows for each cluster, D
numbers of 4 bytes each), the centroids, one block and 8 bytes for each row. Vectors are moved by
the sample's mean first, so that far from the origin distances keep their digits.

Shapes: N rows, K clusters, D dimensions, B rows of a block, S rows of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy import ndarray

from curate.selectors.keyed import keyed64, stream_key
from curate.selectors.lloyd import kmeans
from curate.selectors.neighbors import Neighbors
from curate.selectors.vectors import Vectors, matrix

SAMPLE = 128
"""Rows for each cluster that k-means sees; FAISS asks for 39 at least and uses 256 at most."""
ITERATIONS = 20
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Clusters:
    """Centroids, and of each row the number of its own and the distance to it.

    Every cluster has a row. Where rows are not more than clusters each is its own centroid.
    """

    centroids: Float64[ndarray, "k d"]
    cluster: Int32[ndarray, " n"]
    distance: Float32[ndarray, " n"]
    sample_rows: int

    @property
    def rows(self) -> Int64[ndarray, " k"]:
        """How many rows each cluster has."""
        return np.bincount(self.cluster, minlength=len(self.centroids))


def quantise(vectors: Vectors, clusters: int, seed: int, sample: int = SAMPLE) -> Clusters:
    """Return at most `clusters` clusters of the vectors, which must be finite; 0: every row alone.

    k-means starts from rows drawn by `seed` and sees `sample` rows for each cluster, a function of
    (seed, place of the row). Rows do not depend on how the vectors come in blocks.

    Raises:
        ValueError: there are no vectors, or numbers that are no counts.
        RuntimeError: FAISS is not installed.
    """
    if clusters < 0 or sample < 1:
        raise ValueError(f"{clusters} clusters of {sample} sampled rows each; give counts")
    n = vectors.rows
    if not n:
        raise ValueError("there is no vector to make clusters of")
    if clusters == 0 or n <= clusters:
        own = np.arange(n, dtype=np.int32)
        return Clusters(matrix(vectors).astype(np.float64), own, np.zeros(n, np.float32), n)
    seen = vectors.take(_sampled(n, min(n, clusters * sample), seed))
    center = seen.mean(axis=0, dtype=np.float64).astype(np.float32)
    seen = seen if seen.flags.owndata else seen.copy()  # may be a view of the vectors themselves
    seen -= center
    centroids = kmeans(seen, clusters, seed, ITERATIONS)
    sample_rows = len(seen)
    del seen
    cluster, distance = _assigned(vectors, centroids, center)
    filled, cluster = np.unique(cluster, return_inverse=True)
    places = centroids[filled] + center.astype(np.float64)
    return Clusters(places, cluster.astype(np.int32), distance, sample_rows)


def _sampled(n: int, count: int, seed: int) -> Int64[ndarray, " s"]:
    """Return the places of `count` rows, ascending."""
    draws = np.empty(n, dtype=np.uint32)
    key = stream_key(seed)
    for start in range(0, n, 1 << 20):
        at = np.arange(start, min(start + (1 << 20), n))
        draws[at] = keyed64(key, at) >> np.uint64(32)
    cut = np.partition(draws, count - 1)[count - 1]
    below = np.flatnonzero(draws < cut)
    return np.sort(np.concatenate([below, np.flatnonzero(draws == cut)[: count - len(below)]]))


def _assigned(
    vectors: Vectors, centroids: Float32[ndarray, "k d"], center: Float32[ndarray, " d"]
) -> tuple[Int32[ndarray, " n"], Float32[ndarray, " n"]]:
    """Return the number of each row's nearest centroid and the distance to it."""
    index = Neighbors(centroids.shape[1], "euclidean")
    index.add(centroids)
    cluster = np.empty(vectors.rows, dtype=np.int32)
    distance = np.empty(vectors.rows, dtype=np.float32)
    at = 0
    for block in _even_blocks(vectors):
        moved = block - center
        nearest = index.search(moved, 1)[1][:, 0]
        moved -= centroids[nearest]
        stop = at + len(block)
        cluster[at:stop] = nearest
        distance[at:stop] = np.sqrt(np.einsum("nd,nd->n", moved, moved))
        at = stop
    return cluster, distance


def _even_blocks(vectors: Vectors) -> Iterator[Float32[ndarray, "b d"]]:
    """Yield the vectors BLOCK_ROWS at a time, so that rounding is the same however they come."""
    held = np.empty((BLOCK_ROWS, vectors.dimension), dtype=np.float32)
    filled = 0
    for block in vectors.blocks():
        at = 0
        while at < len(block):
            taken = min(BLOCK_ROWS - filled, len(block) - at)
            held[filled : filled + taken] = block[at : at + taken]
            filled, at = filled + taken, at + taken
            if filled == BLOCK_ROWS:
                yield held
                filled = 0
    if filled:
        yield held[:filled]
