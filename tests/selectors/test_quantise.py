"""Clusters: as tight as scikit-learn's, every row at its nearest centroid, however blocks come."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.cluster import KMeans

from curate.selectors.lloyd import kmeans
from curate.selectors.quantise import _sampled, quantise
from curate.selectors.vectors import ArrayVectors, UnitVectors

pytest.importorskip("faiss")


class Blocks(ArrayVectors):
    """Vectors in blocks of another size."""

    def __init__(self, array: np.ndarray, rows: int) -> None:
        super().__init__(array)
        self._rows = rows

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.rows, self._rows):
            yield self.array[start : start + self._rows].astype(np.float32)


def clouds(seed: int = 0, rows: int = 3000) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centers = draw.normal(size=(12, 5)) * 6
    return centers[draw.integers(0, 12, rows)] + draw.normal(size=(rows, 5))


def test_every_row_is_in_the_cluster_of_its_nearest_centroid() -> None:
    rows = clouds()
    found = quantise(ArrayVectors(rows), 40, 3)
    every = np.linalg.norm(rows[:, None] - found.centroids, axis=2)
    own = every[np.arange(len(rows)), found.cluster]
    # float32 against float64: rows as near to two centroids may be in either.
    np.testing.assert_allclose(own, every.min(axis=1), atol=1e-4)
    np.testing.assert_allclose(found.distance, own, atol=1e-4)
    assert found.rows.sum() == len(rows) and (found.rows > 0).all()
    assert len(found.centroids) <= 40


def test_clusters_are_as_tight_as_those_of_scikit_learn() -> None:
    rows = clouds()
    ours = (quantise(ArrayVectors(rows), 40, 3).distance.astype(float) ** 2).sum()
    theirs = KMeans(40, n_init=1, init="random", max_iter=20, random_state=0).fit(rows).inertia_
    # Different random starts of the same algorithm: within a few per cent of each other.
    assert ours < 1.1 * theirs


def test_far_from_the_origin_nothing_is_lost() -> None:
    rows = clouds()
    near, far = (quantise(ArrayVectors(rows + shift), 20, 1) for shift in (0.0, 3e4))
    assert (near.distance**2).mean() == pytest.approx((far.distance**2).mean(), rel=0.05)


def test_blocks_change_nothing_and_seeds_do() -> None:
    rows = clouds(rows=40_000)[:, :3]
    one, other = (quantise(Blocks(rows, size), 30, 5, sample=50) for size in (999, 40_000))
    assert one.sample_rows == 1500
    assert np.array_equal(one.cluster, other.cluster)
    assert np.array_equal(one.distance, other.distance)
    assert not np.array_equal(one.centroids, quantise(Blocks(rows, 999), 30, 6).centroids)


def test_few_rows_are_their_own_centroids() -> None:
    rows = clouds(rows=9)
    for clusters in (0, 9, 20):
        found = quantise(ArrayVectors(rows), clusters, 0)
        np.testing.assert_allclose(found.centroids, rows.astype(np.float32))
        assert found.cluster.tolist() == list(range(9)) and not found.distance.any()


def test_equal_rows_make_fewer_clusters() -> None:
    rows = np.repeat(clouds(rows=3), 50, axis=0)
    found = quantise(ArrayVectors(rows), 8, 0)
    assert (found.rows > 0).all() and found.rows.sum() == 150
    assert found.distance.max() < 1e-2  # FAISS splits empty clusters by one part in a thousand


def test_samples_are_as_many_as_asked_and_spread_out() -> None:
    drawn = _sampled(10_000, 2_000, 7)
    assert len(set(drawn.tolist())) == 2_000 and (np.diff(drawn) > 0).all()
    # Uniform: the mean of 2000 of 10000 places has a deviation of 58.
    assert abs(drawn.mean() - 5000) < 5 * 58
    assert _sampled(10, 10, 0).tolist() == list(range(10))


def test_bad_input_is_said() -> None:
    with pytest.raises(ValueError, match="no vector to make clusters of"):
        quantise(ArrayVectors(np.empty((0, 3))), 4, 0)
    with pytest.raises(ValueError, match="give counts"):
        quantise(ArrayVectors(clouds(rows=9)), -1, 0)
    with pytest.raises(ValueError, match="9 clusters of 4 points"):
        kmeans(np.zeros((4, 2), np.float32), 9, 0)


def test_the_sample_is_held_about_once_at_length_one_too() -> None:
    rows = np.random.default_rng(0).normal(size=(60_000, 64)).astype(np.float32)
    tracemalloc.start()
    found = UnitVectors(ArrayVectors(rows)).take(np.arange(1, 60_000, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert peak < 2 * found.nbytes  # in one piece, with float64 in between, it was five times that
