"""Nearest neighbours against the whole distance matrix."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors.lloyd import kmeans
from curate.selectors.neighbors import Metric, Neighbors, strongest

pytest.importorskip("faiss")


def index_of(blocks: list[np.ndarray], metric: Metric = "cosine") -> Neighbors:
    index = Neighbors(blocks[0].shape[1], metric)
    for block in blocks:
        index.add(block)
    return index


def brute_force(base: np.ndarray, queries: np.ndarray, metric: Metric) -> np.ndarray:
    """Every value [Q, N] in float64, larger is nearer."""
    base, queries = base.astype(np.float64), queries.astype(np.float64)
    if metric == "euclidean":
        return -np.linalg.norm(queries[:, None] - base[None], axis=2)
    if metric == "cosine":
        base = base / np.linalg.norm(base, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return queries @ base.T


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from(["cosine", "dot", "euclidean"]))
def test_the_nearest_are_those_of_the_whole_matrix(seed: int, n: int, metric: Metric) -> None:
    draw = np.random.default_rng(seed)
    base = draw.normal(size=(n, 7)).astype(np.float32)
    queries = draw.normal(size=(5, 7)).astype(np.float32)
    k = int(draw.integers(1, n + 1))
    values, numbers = index_of(np.array_split(base, 3), metric).search(queries, k)
    every = brute_force(base, queries, metric)
    signed = -values if metric == "euclidean" else values
    # float32 sums of 7 products of normal numbers; euclidean squares and takes the root again.
    np.testing.assert_allclose(signed, -np.sort(-every, axis=1)[:, :k], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(every, numbers, 1), signed, rtol=1e-4, atol=2e-5)


def test_a_zero_vector_is_orthogonal_to_all() -> None:
    index = index_of([np.eye(3, dtype=np.float32), np.zeros((1, 3), np.float32)])
    values, _ = index.search(np.zeros((1, 3), np.float32), 4)
    assert values.tolist() == [[0, 0, 0, 0]]


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Neighbors(3)
    with pytest.raises(ValueError, match=r"shape \(2, 4\); expected \[n, 3\]"):
        index.add(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="NaN or infinity"):
        index.add(np.full((1, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="k=1 neighbours of 0 vectors"):
        index.search(np.zeros((1, 3), np.float32), 1)
    with pytest.raises(ValueError, match="unknown metric 'l2'"):
        Neighbors(3, "l2")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError, match="pip install 'curate"):
        Neighbors(3)


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_strongest_in_blocks_are_those_of_a_full_sort(seed: int, k: int, step: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(-3, 4, size=(23, 3)).astype(np.float32)  # small integers: many ties
    queries = rng.integers(-3, 4, size=(4, 3)).astype(np.float32)
    base[rng.random(23) < 0.2] = np.nan
    blocks = [base[i : i + step] for i in range(0, 23, step)]
    values, numbers = strongest(queries, blocks, k)
    products = np.where(np.isnan(base).any(1), -np.inf, queries @ np.nan_to_num(base).T)
    want = -np.sort(-products, axis=1)[:, :k]
    np.testing.assert_array_equal(values, want)
    found = np.isfinite(values)
    assert (numbers[~found] == -1).all()
    for q in range(4):
        places = numbers[q][found[q]]
        assert len(set(places)) == len(places)
        np.testing.assert_array_equal(products[q][places], values[q][found[q]])


def test_the_number_of_threads_changes_no_digit() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(3)
    points = rng.standard_normal((5000, 96), dtype=np.float32)
    index = Neighbors(96, "euclidean")
    index.add(points[:150])
    threads = faiss.omp_get_max_threads()
    found = []
    try:
        for count in (1, 2, 3):
            faiss.omp_set_num_threads(count)
            found.append((*index.search(points, 5), kmeans(points, 20, 0)))
            assert faiss.omp_get_max_threads() == count  # searching leaves the setting as it is
    finally:
        faiss.omp_set_num_threads(threads)
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
