"""GradMatch over a table: groups, filling, weights. The search itself: test_pursuit.py."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import nnls

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


def pursuit_by_hand(points, goal, k, penalty):
    """Algorithm 2 anew at every step: the best row joins, all weights by least squares, w >= 0."""
    support, weight = [], np.zeros(len(points))
    while len(support) < k:
        along = points @ (goal - weight @ points)
        along[support] = -np.inf
        best = int(np.argmax(along))
        if along[best] <= 1e-6 * np.linalg.norm(goal) * np.linalg.norm(points[best]):
            break
        support.append(best)
        stacked = np.vstack([points[support].T, np.sqrt(penalty) * np.eye(len(support))])
        solved = nnls(stacked, np.concatenate([goal, np.zeros(len(support))]))[0]
        support = [row for row, w in zip(support, solved, strict=True) if w > 0]
        weight[:] = 0
        weight[support] = solved[solved > 0]
    return weight


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("matched", ["rows", "target", "target_group"])
def test_each_class_is_matched_to_its_training_or_validation_gradient(table_of, seed, matched):
    """Paper, equation 1: L is the training loss or, where one is given, the validation loss."""
    draw = np.random.default_rng(seed)
    points = np.float64(np.float32(draw.normal(size=(24, 5)) + 0.4))
    goals = np.float64(np.float32(draw.normal(size=(11, 5)) + 0.4))
    label, theirs = np.arange(24) % 3 // 2, np.arange(11) % 2  # 16 and 8 rows; 6 and 5
    table = table_of(points, label=pa.array(label))
    settings = {"by_group": "label", "penalty": 0.3, "fill": "none"}
    if matched != "rows":
        table.target = ArrayVectors(np.float32(goals))
        table.target_values = {"kind": pa.array(theirs)}.__getitem__
    if matched == "target_group":
        settings["target_group"] = "kind"
    place, weight, params = run(table, 9, **settings)
    found = np.zeros(24)
    found[place] = weight
    for value, rows in ((0, 6), (1, 3)):
        mine = np.flatnonzero(label == value)
        goal = {
            "rows": points[mine].sum(axis=0),
            "target": goals.mean(axis=0) * len(mine),
            "target_group": goals[theirs == value].sum(axis=0) * 24 / 11,
        }[matched]
        # Weights are stored in float32, and the penalty is that of the unscaled goal either way.
        wanted = pursuit_by_hand(points[mine], goal, rows, 0.3)
        np.testing.assert_allclose(found[mine], wanted, rtol=1e-4, atol=1e-4)
    assert params["goal"] == ("rows" if matched == "rows" else "target")


def test_a_group_that_the_target_lacks_is_filled_at_random_or_left_empty(table_of, caplog):
    points = np.tile(np.eye(2), (10, 1))
    table = table_of(points, label=pa.array(np.arange(20) // 10))
    table.target = ArrayVectors(np.float32([[2.0, 4.0]]))
    table.target_values = {"label": pa.array([1])}.__getitem__
    settings = {"by_group": "label", "target_group": "label", "penalty": 0.0}
    place, weight, _ = run(table, 8, fill="none", **settings)
    assert place.tolist() == [10, 11] and weight.tolist() == [20.0, 40.0]  # ten rows for one
    place, weight, _ = run(table, 8, **settings)
    assert (place < 10).sum() == 4 and (weight[place < 10] == 1).all()
    assert "no row of the group '0'" in caplog.text
    with pytest.raises(ValueError, match="target_group needs groups of rows"):
        GradMatch(target_group="label")
    table.target = None
    with pytest.raises(ValueError, match="give --target-vectors"):
        run(table, 8, **settings)
