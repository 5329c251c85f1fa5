"""Nearest neighbours: the one place that imports FAISS, on GPUs where there are any.

Shapes: N base vectors, Q queries, D dimensions, K neighbours.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

Metric = Literal["cosine", "dot", "euclidean"]
QUERY_ROWS = 2048
"""Queries that one thread searches together."""


class Neighbors:
    """An exact index to which vectors are added in blocks, numbered in the order they came.

    `cosine` and `dot` rank the largest first, `euclidean` the smallest distance. Cosine
    normalises both sides; a zero vector is as near to everything as an orthogonal one. Memory: N·D
    float32 on the device.

    Raises:
        ValueError: an unknown metric, or vectors of another dimension or with NaN or infinity.
        RuntimeError: FAISS is not installed.
    """

    def __init__(self, dimension: int, metric: Metric = "cosine") -> None:
        if metric not in ("cosine", "dot", "euclidean"):
            raise ValueError(f"unknown metric {metric!r}; choose cosine, dot or euclidean")
        faiss = _faiss()
        self.dimension, self.metric = dimension, metric
        flat = faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP
        self._index = _on_device(faiss, flat(dimension))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: Float32[np.ndarray, "n d"]) -> None:
        """Append vectors; they get the next numbers."""
        self._index.add(self._ready(vectors))

    def search(
        self, queries: Float32[np.ndarray, "q d"], k: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Return similarities (or distances, not squared) and numbers of the k nearest, best first.

        Raises:
            ValueError: `k` is not between 1 and the number of vectors added.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} neighbours of {len(self)} vectors; choose 1 to {len(self)}")
        values, numbers = _searched(_faiss(), self._index, self._ready(queries), k)
        if self.metric == "euclidean":
            values = np.sqrt(np.maximum(values, 0))
        return values, numbers

    def _ready(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"vectors of shape {vectors.shape}; expected [n, {self.dimension}]")
        if not np.isfinite(vectors).all():
            raise ValueError("vectors hold NaN or infinity; leave such rows out first")
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.metric != "cosine":
            return vectors
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(norms > 0, norms, 1))


class VectorIndex:
    """An index of many vectors with numbers of their own, which is kept in a file.

    `flat` is exact and takes 4·D bytes a vector. `ivfpq` keeps codes of a few bytes in lists of
    neighbouring vectors and looks into some of the lists: similarities are estimates, and near
    vectors may be missed. It is trained on a sample first; the same sample, seed and machine give
    the same index. `dot` ranks the largest first, `euclidean` the smallest distance.

    Raises:
        ValueError: vectors of another dimension.
        RuntimeError: FAISS is not installed.
    """

    def __init__(self, index: Any, metric: Metric) -> None:
        self._index, self.metric = index, metric

    @classmethod
    def flat(cls, dimension: int, metric: Metric) -> "VectorIndex":
        """Return an empty exact index."""
        faiss = _faiss()
        kind = faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP
        return cls(faiss.IndexIDMap2(kind(dimension)), metric)

    @classmethod
    def ivfpq(
        cls,
        sample: Float32[np.ndarray, "n d"],
        metric: Metric,
        *,
        lists: int,
        codes: int,
        seed: int,
    ) -> "VectorIndex":
        """Return an empty index trained on a sample: `lists` cells, `codes` bytes a vector.

        A sixteenth of the cells is searched, 8 at least.
        """
        faiss = _faiss()
        is_l2 = metric == "euclidean"
        dimension = sample.shape[1]
        cells = (faiss.IndexFlatL2 if is_l2 else faiss.IndexFlatIP)(dimension)
        bits = min(8, int(np.log2(len(sample))))  # as many codewords as there are samples, at most
        kind = faiss.METRIC_L2 if is_l2 else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFPQ(cells, dimension, lists, codes, bits, kind)
        index.cp.seed = index.pq.cp.seed = seed % (1 << 31)
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
        index.train(np.ascontiguousarray(sample, dtype=np.float32))
        index.nprobe = min(lists, max(8, lists // 16))
        return cls(index, metric)

    @classmethod
    def read(cls, path: str, metric: Metric) -> "VectorIndex":
        """Return the index in a file.

        Raises:
            ValueError: the file is no index, or damaged.
        """
        try:
            return cls(_faiss().read_index(path), metric)
        except RuntimeError as damaged:
            said = str(damaged).partition("\n")[0][:120]
            raise ValueError(f"{path} is no index, or damaged ({said})") from None

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    def add(self, vectors: Float32[np.ndarray, "n d"], numbers: Int64[np.ndarray, " n"]) -> None:
        """Add vectors under these numbers."""
        self._index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), numbers)

    def write(self, path: str) -> None:
        """Write the index to a file."""
        _faiss().write_index(self._index, path)

    def search(
        self, queries: Float32[np.ndarray, "q d"], k: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Return similarities (or distances, not squared) and numbers of the k nearest, best first.

        Where fewer were found (`ivfpq`) the rest has the number -1.

        Raises:
            ValueError: queries of another dimension or with NaN, or `k` below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise ValueError(f"queries of shape {queries.shape}; expected [n, {self.dimension}]")
        if k < 1:
            raise ValueError(f"k={k} neighbours; choose 1 or more")
        if not np.isfinite(queries).all():
            raise ValueError("queries hold NaN or infinity; leave such rows out first")
        values, numbers = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        if self.metric == "euclidean":
            values = np.sqrt(np.maximum(values, 0))
        return values, numbers


def strongest(
    queries: Float32[np.ndarray, "q d"], blocks: Iterable[np.ndarray], k: int
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """Return the k largest inner products of each query with rows of the blocks [n, d], and which.

    Exact, in one pass over the blocks: memory is one block's and the answer's. Rows count through
    the blocks; those with NaN are passed over. Equal products come in the order of the rows, and
    where k cuts through them any of them may be named; where there are fewer than k rows the rest
    is -inf, of row -1.

    Raises:
        RuntimeError: FAISS is not installed.
    """
    faiss = _faiss()
    index = _on_device(faiss, faiss.IndexFlatIP(queries.shape[1]))
    values = np.full((len(queries), k), -np.inf, np.float32)
    numbers = np.full((len(queries), k), -1, np.int64)
    start = 0
    for block in blocks:
        rows = np.flatnonzero(np.isfinite(block).all(1))
        if len(rows):
            index.add(np.ascontiguousarray(block[rows], dtype=np.float32))
            found, places = _searched(faiss, index, queries, min(k, len(rows)))
            index.reset()
            values = np.concatenate([values, found], 1)
            numbers = np.concatenate([numbers, start + rows[places]], 1)
            best = np.lexsort((numbers, -values), axis=1)[:, :k]
            values = np.take_along_axis(values, best, 1)
            numbers = np.take_along_axis(numbers, best, 1)
        start += len(block)
    return values, numbers


def _searched(faiss: Any, index: Any, queries: np.ndarray, k: int) -> tuple[ndarray, ndarray]:
    """Search fixed blocks of queries, each by one thread: sums do not depend on how many there are.

    FAISS has BLAS divide products among its threads, and the last digits change with the division.
    """
    if _has_gpus(faiss) or not len(queries):
        return index.search(queries, k)  # type: ignore[no-any-return]

    def alone(start: int) -> tuple[ndarray, ndarray]:
        faiss.omp_set_num_threads(1)  # of the thread that calls, not of the process
        return index.search(queries[start : start + QUERY_ROWS], k)  # type: ignore[no-any-return]

    starts = range(0, len(queries), QUERY_ROWS)
    with ThreadPoolExecutor(min(len(starts), faiss.omp_get_max_threads())) as pool:
        values, numbers = zip(*pool.map(alone, starts), strict=True)
    return np.concatenate(values), np.concatenate(numbers)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise RuntimeError(
            "FAISS is not installed: pip install 'curate[cpu]', or 'curate[gpu]' where CUDA is"
        ) from None
    return faiss


def _on_device(faiss: Any, index: Any) -> Any:
    """Return the index on the GPUs, where this build of FAISS sees any."""
    return faiss.index_cpu_to_all_gpus(index) if _has_gpus(faiss) else index


def _has_gpus(faiss: Any) -> bool:
    return bool(getattr(faiss, "get_num_gpus", lambda: 0)() > 0)
