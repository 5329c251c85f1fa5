"""GradMatch over a table: groups, filling, weights. The search itself: test_pursuit.py."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.gradmatch import GradMatch
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


@pytest.fixture
def table_of(make_table):
    def make(points, **columns):
        table = make_table(np.zeros(len(points)), **columns)
        table.vectors, table.target = ArrayVectors(np.float32(points)), None
        return table

    return make


def run(table, rows, **settings):
    rng = np.random.default_rng(0)
    selection = GradMatch(**settings).select(table, Budget("rows", rows), rng)
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(), selection.params


def test_the_weighted_sum_is_the_sum_of_all_rows(table_of):
    """With as many rows as coordinates and no penalty the match is exact."""
    points = np.abs(np.random.default_rng(0).normal(size=(60, 5)))
    place, weight, params = run(table_of(points), 30, penalty=0.0, fill="none")
    np.testing.assert_allclose(weight @ points[place], points.sum(axis=0), rtol=1e-4)
    assert params["matched"] == len(place) <= 5 and params["filled"] == 0


def test_classes_are_matched_apart(table_of):
    points = np.abs(np.random.default_rng(1).normal(size=(40, 3)))
    label = np.arange(40) % 2
    table = table_of(points, label=pa.array(label))
    place, weight, _ = run(table, 20, penalty=0.0, fill="none", by_group="label")
    for value in (0, 1):
        mine = label[place] == value
        np.testing.assert_allclose(
            weight[mine] @ points[place[mine]], points[label == value].sum(axis=0), rtol=1e-4
        )


def test_the_rest_of_the_budget_is_random_rows_of_weight_one(table_of, caplog):
    points = np.tile(np.eye(3), (10, 1))
    place, weight, params = run(table_of(points), 12, penalty=0.0)
    assert len(place) == 12 and params["matched"] == 3 and params["filled"] == 9
    assert sorted(weight.tolist()) == [1.0] * 9 + [10.0] * 3
    assert "3 rows match the gradients; 9 more are random" in caplog.text
    place, weight, _ = run(table_of(points), 12, penalty=0.0, fill="none")
    assert place.tolist() == [0, 1, 2] and weight.tolist() == [10.0] * 3
    assert "fewer than the budget allows" in caplog.text


def test_failed_rows_and_rows_without_a_vector_are_left_out_of_the_sum(table_of):
    points = np.array([[1.0, 0], [0, 1], [np.nan, 1], [1, 1]])
    place, weight, _ = run(table_of(points, errors=[3]), 2, penalty=0.0)
    assert place.tolist() == [0, 1] and weight.tolist() == [1.0, 1.0]


def test_wrong_settings_and_vectors_that_cancel_are_refused(table_of):
    with pytest.raises(ValueError, match="penalty must be"):
        GradMatch(penalty=-1)
    with pytest.raises(ValueError, match="fill must be"):
        GradMatch(fill="zeros")
    opposite = np.array([[1.0, 0], [-1, 0]])
    with pytest.raises(ValueError, match="no row points along"):
        run(table_of(opposite), 2, fill="none")
