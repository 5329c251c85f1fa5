"""Spreading weights against the whole kernel matrix, its limits, and what may not carry weight."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.propagate import Propagate, spread
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

pytest.importorskip("faiss")


def some(seed=0, n=40, m=12):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, 3)).astype(np.float32)
    return points, np.sort(draw.choice(n, m, replace=False)), draw.gamma(1, size=m)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_weights_are_kernel_means_over_the_nearest(k):
    points, at, weights = some()
    found, sigma = spread(ArrayVectors(points), ArrayVectors(points[at]), weights, k, 0.7)
    assert sigma == 0.7
    away = np.linalg.norm(points[:, None].astype(np.float64) - points[None, at], axis=2)
    for i in range(40):
        near = np.argsort(away[i])[:k]
        kernel = np.exp(-(away[i, near] ** 2) / (2 * 0.7**2))
        # Distances of float32 vectors.
        assert found[i] == pytest.approx(kernel @ weights[near] / kernel.sum(), rel=1e-4)


def test_weights_stay_within_those_given_and_equal_ones_stay_equal():
    points, at, weights = some(1)
    found, _ = spread(ArrayVectors(points), ArrayVectors(points[at]), weights, 5)
    assert weights.min() - 1e-9 <= found.min() and found.max() <= weights.max() + 1e-9
    even, _ = spread(ArrayVectors(points), ArrayVectors(points[at]), np.full(12, 3.0), 5)
    np.testing.assert_allclose(even, 3.0)


def test_where_all_kernels_vanish_the_nearest_row_decides():
    points = np.array([[0.0], [10.0], [1000.0]], dtype=np.float32)
    found, _ = spread(ArrayVectors(points), ArrayVectors(points[:2]), np.array([1.0, 5.0]), 2, 0.01)
    assert found.tolist() == [1.0, 5.0, 5.0]


@pytest.fixture
def table(make_table):
    points, at, weights = some()
    column = np.full(40, np.nan)
    column[at] = weights
    made = make_table(column, errors=[int(at[0])])
    made.vectors, made.target = ArrayVectors(points), None
    return made


def run(table, **settings):
    settings = settings if "manifest" in settings else {"column": "score", **settings}
    method = Propagate(**settings)
    selection = method.select(table, Budget("fraction", 1.0), np.random.default_rng(0))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(), selection.params


def test_over_a_table_failed_rows_pass_nothing_on(table):
    points, at, weights = some()
    place, weight, params = run(table)
    assert place.tolist() == [i for i in range(40) if i != at[0]]
    assert params["weighted_rows"] == 11 and params["weight_kind"] == "loss"
    wanted, _ = spread(ArrayVectors(points), ArrayVectors(points[at[1:]]), weights[1:], 10)
    wanted[at[1:]] = weights[1:]
    np.testing.assert_allclose(weight, wanted[place], rtol=1e-5)
    smooth = run(table, smooth=True)[1]
    assert not np.allclose(smooth, weight)


def test_bad_weights_are_refused(table, make_table):
    none = make_table([None, None])
    none.vectors, none.target = ArrayVectors(np.eye(2)), None
    with pytest.raises(ValueError, match="no row that may be chosen has a weight"):
        run(none)
    below = make_table([1.0, -1.0])
    below.vectors, below.target = ArrayVectors(np.eye(2)), None
    with pytest.raises(ValueError, match="finite and not negative"):
        run(below)
    with pytest.raises(ValueError, match="neighbors must be"):
        Propagate(column="score", neighbors=0)
    with pytest.raises(ValueError, match="sigma must be"):
        Propagate(column="score", sigma=0.0)
    with pytest.raises(ValueError, match="by one of manifest"):
        Propagate()


def test_a_manifests_weights_are_those_of_a_column(table):
    _, at, weights = some()
    by_column = run(table)
    given = np.full(40, np.nan)
    given[at] = weights.astype(np.float32)
    table.manifest_weights = lambda: given
    by_manifest = run(table, manifest="a folder that the table reads")
    assert by_column[0].tolist() == by_manifest[0].tolist()
    np.testing.assert_allclose(by_column[1], by_manifest[1], rtol=1e-6)


def test_a_table_that_reads_no_manifest_is_named(table):
    with pytest.raises(ValueError, match="knows no manifest"):
        run(table, manifest="folder")
