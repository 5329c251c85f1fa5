"""Nearest rows against the whole distance matrix: all compared, or in cells, and what is missed."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import near_rows as module
from curate.selectors.near_rows import near_rows
from curate.selectors.vectors import ArrayVectors

faiss = pytest.importorskip("faiss")


def matrix_of(points):
    away = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    np.fill_diagonal(away, np.inf)
    return away


def clouds(rows, parts, dimension, seed):
    draw = np.random.default_rng(seed)
    centres = 20 * draw.normal(size=(parts, dimension))
    return (centres[draw.integers(parts, size=rows)] + draw.normal(size=(rows, dimension))).astype(
        np.float32
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.3, 20.0]),
    st.sampled_from([3, 7, 16_384]),
)
def test_all_cells_are_all_rows(seed, n, k, cells, spread, together):
    """Runs of rows, cells, and cells that were cut: whoever looks in all finds the true ones."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, 3)).astype(np.float32)
    points[draw.random(n) < 0.3] += np.float32(spread)
    away = matrix_of(points)
    want = np.argsort(away, axis=1, kind="stable")[:, : min(k, n - 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOGETHER", together)
        patch.setattr(module, "VISITS", 10)
        found = near_rows(ArrayVectors(points), k, cells, probes=50, seed=seed)
    np.testing.assert_array_equal(found.near, want)
    # float32 products of numbers of about 20: squares of distances are right to some 1e-4
    np.testing.assert_allclose(
        found.away.astype(float) ** 2, np.take_along_axis(away, want, 1) ** 2, atol=1e-3
    )
    assert found.recall == 1 and found.stretch == pytest.approx(1, abs=1e-12)
    assert found.used_cells >= min(cells, 2)


def test_a_large_cell_is_cut_and_all_its_parts_are_looked_in_first():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(600, 2)).astype(np.float32)
    points[500:] += np.float32(50) * np.repeat(np.arange(1, 11), 10)[:, None].astype(np.float32)
    found = near_rows(ArrayVectors(points), 3, cells=11, probes=1)
    assert found.used_cells > 11 and found.recall < 1
    parts = found.used_cells - 10  # k-means may put its centroids in another way; not fewer parts
    found = near_rows(ArrayVectors(points), 3, cells=11, probes=max(8, parts))
    away = matrix_of(points)
    np.testing.assert_array_equal(found.near, np.argsort(away, axis=1)[:, :3])


@pytest.mark.parametrize("probes", [1, 2])
def test_recall_and_stretch_are_those_of_all_rows(probes):
    points = np.random.default_rng(1).normal(size=(200, 4)).astype(np.float32)
    found = near_rows(ArrayVectors(points), 5, cells=8, probes=probes, seed=3)
    away = matrix_of(points)
    true = np.sort(away, axis=1)[:, :5]
    theirs = np.take_along_axis(away, found.near, 1)
    assert found.recall == (theirs <= true[:, -1:]).mean() < 1
    assert found.stretch == pytest.approx(theirs.sum() / true.sum(), rel=1e-12) and theirs.min() > 0
    np.testing.assert_allclose(found.away, theirs, rtol=1e-4)


def test_few_cells_find_nearly_all_where_rows_lie_in_clouds():
    vectors = ArrayVectors(clouds(3000, 30, 16, seed=2))
    assert near_rows(vectors, 5, cells=30, probes=4).recall > 0.99
    assert near_rows(vectors, 5, cells=30, probes=1).recall < 0.99


def test_a_row_that_finds_too_few_stands_for_itself():
    points = np.concatenate([np.zeros((8, 2)), [[100.0, 0.0]], [[0.0, 100.0]]]).astype(np.float32)
    found = near_rows(ArrayVectors(points), 4, cells=3, probes=1)
    assert (found.near[8] == 8).all() and (found.away[8] == np.finfo(np.float32).max).all()
    assert not found.away[:8].any()  # copies, which do not find themselves
    assert not (found.near[:8] == np.arange(8)[:, None]).any()
    assert found.recall == 0.8  # of four places of each of 10 rows; the lone ones found nothing
    assert found.stretch == 1
    assert near_rows(ArrayVectors(points[:1]), 4).near.shape == (1, 0)
    assert near_rows(ArrayVectors(points[:1]), 4, cells=3).recall == 1


@pytest.mark.parametrize("cells", [1, 5])
def test_scale_and_place_change_nothing(cells):
    # 1/1024ths stay exact when 1000 is added, and powers of two are exact anyway.
    points = np.round(np.random.default_rng(1).standard_normal((200, 48)) * 1024) / 1024
    here = near_rows(ArrayVectors(np.float32(points)), 4, cells, probes=2)
    for exponent in (-100, 90, 125):
        scaled = near_rows(ArrayVectors(np.float32(np.ldexp(points, exponent))), 4, cells, probes=2)
        np.testing.assert_array_equal(scaled.near, here.near)
        want = np.minimum(np.ldexp(here.away.astype(float), exponent), np.finfo(np.float32).max)
        np.testing.assert_array_equal(scaled.away, want.astype(np.float32))
    far = near_rows(ArrayVectors(np.float32(points + 1000)), 4)
    near = near_rows(ArrayVectors(np.float32(points)), 4)
    np.testing.assert_array_equal(far.near, near.near)
    np.testing.assert_allclose(far.away, near.away, rtol=1e-4)  # the mean is rounded at 1000


def test_threads_change_no_digit():
    vectors = ArrayVectors(clouds(6000, 5, 24, seed=4))
    threads, found = faiss.omp_get_max_threads(), []
    try:
        for count in (1, 3):
            faiss.omp_set_num_threads(count)
            found.append(near_rows(vectors, 5, cells=6, probes=2))
    finally:
        faiss.omp_set_num_threads(threads)
    assert found[0].near.tobytes() == found[1].near.tobytes()
    assert found[0].away.tobytes() == found[1].away.tobytes()
    assert found[0].recall == found[1].recall


@pytest.mark.parametrize(("rows", "cells"), [(8000, 1), (40_000, 40)])
def test_vectors_are_held_a_few_cells_at_a_time(tmp_path, monkeypatch, rows, cells):
    path = tmp_path / "v.npy"
    np.save(path, clouds(rows, 40, 96, seed=5))
    vectors = ArrayVectors(np.load(path, mmap_mode="r"))
    sizes = []
    add = module.Neighbors.add

    def spied(self, block):
        sizes.append(len(block))
        add(self, block)

    monkeypatch.setattr(module.Neighbors, "add", spied)
    monkeypatch.setattr(module, "TOGETHER", rows // 40)
    monkeypatch.setattr(module, "VISITS", rows // 4)
    for place in ("vectors", "quantise"):
        monkeypatch.setattr(f"curate.selectors.{place}.BLOCK_ROWS", rows // 40)
    tracemalloc.start()
    near_rows(vectors, 3, cells, probes=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What FAISS holds is not traced: a cell of at most about twice the mean, or a run.
    assert max(sizes) < 2.3 * rows / 40
    assert peak < vectors.array.nbytes / 3
