"""Group-robust reweighting: autograd, influence by retraining, groups, a spurious bit."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from curate.selectors.gsr import Goal, Gsr
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors
from curate.selectors.weighted_head import fit_head

C, D = 3, 4


@pytest.fixture
def rows():
    draw = np.random.default_rng(0)
    features = np.hstack([draw.normal(size=(30, D - 1)), np.ones((30, 1))])
    weights = draw.random(30)
    return features, draw.integers(0, C, 30), weights / weights.sum()


def loss_of(flat, features, labels, weights, decay):
    logits = torch.tensor(features) @ flat.reshape(C, D).T
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    return (torch.tensor(weights) * each).sum() + decay * flat.square().sum()


def test_the_head_is_a_minimum_with_the_hessian_of_autograd(rows):
    features, labels, weights = rows
    head = fit_head(features, labels, weights, C, 0.1)
    flat = torch.tensor(head.theta.ravel(), requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(flat, features, labels, weights, 0.1), flat)
    assert slope.abs().max() < 1e-7
    curved = torch.autograd.functional.hessian(
        lambda x: loss_of(x, features, labels, weights, 0.1), flat
    )
    np.testing.assert_allclose(head.hessian(features, weights), curved.numpy(), atol=1e-10)


def test_helpfulness_is_the_derivative_by_retraining(rows):
    """The exact influence of a weight against the head fit anew with the weight moved."""
    features, labels, weights = rows
    goal = np.random.default_rng(1).normal(size=(C, D))
    head = fit_head(features, labels, weights, C, 0.05)
    found = head.helpfulness(features, labels, weights, goal, 0.0)
    for i in (0, 7, 29):
        moved = []
        for step in (1e-3, -1e-3):
            other = weights.copy()
            other[i] += step
            theta = fit_head(features, labels, other / other.sum(), C, 0.05).theta
            moved.append(np.sum(goal * theta))
        # Weights are scaled to sum 1, so the derivative includes what the others lose.
        slope = (moved[0] - moved[1]) / 2e-3
        assert found[i] == pytest.approx(-slope, rel=2e-3, abs=1e-6)


def test_leaving_a_row_out_is_foreseen(rows):
    """ALGORITHMS 5.2: influence with the exact Hessian against leave-one-out retraining."""
    features, labels, _ = rows
    features, labels = np.vstack([features] * 10), np.tile(labels, 10)
    features[:, :-1] += 0.1 * np.random.default_rng(2).normal(size=(300, D - 1))
    goal = np.random.default_rng(1).normal(size=(C, D))
    equal = np.full(300, 1 / 300)
    head = fit_head(features, labels, equal, C, 0.1)
    foreseen = head.helpfulness(features, labels, equal, goal, 0.0) / 300
    for i in (3, 50, 222):
        without = np.full(300, 1 / 299)
        without[i] = 0
        theta = fit_head(features, labels, without, C, 0.1).theta
        seen = np.sum(goal * (theta - head.theta))
        assert seen == pytest.approx(foreseen[i], rel=0.05, abs=1e-7)  # one in 300 is not nothing


def test_group_losses_accuracies_and_their_gradient(rows):
    features, labels, weights = rows
    head = fit_head(features, labels, weights, C, 0.1)
    group = np.arange(30) % 2
    goal = Goal(features, labels, group)
    losses, accuracies = goal.of(head)
    each, guess = head.losses(features, labels), head.log_probabilities(features).argmax(axis=1)
    for g in (0, 1):
        assert losses[g] == pytest.approx(each[group == g].mean())
        assert accuracies[g] == pytest.approx((guess == labels)[group == g].mean())
    flat = torch.tensor(head.theta.ravel(), requires_grad=True)
    per_row = np.where(group == 0, 0.3, 0.7) / 15
    (slope,) = torch.autograd.grad(loss_of(flat, features, labels, per_row, 0.0), flat)
    found = goal.gradient(head, np.array([0.3, 0.7]))
    np.testing.assert_allclose(found.ravel(), slope.numpy(), atol=1e-12)
    # A group with no weight contributes nothing.
    alone = goal.gradient(head, np.array([1.0, 0.0]))
    np.testing.assert_allclose(
        alone, Goal(features[::2], labels[::2], np.zeros(15, int)).gradient(head, np.ones(1))
    )


def with_bias(features):
    return np.hstack([features, np.ones((len(features), 1))])


def spurious(n, agree, seed):
    """A class bit that is hard to see and a background bit that is easy to see."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 2, n)
    background = np.where(draw.random(n) < agree, label, 1 - label)
    core = (2 * label - 1) * 0.8 + draw.normal(size=n)
    easy = (2 * background - 1) * 1.5 + 0.3 * draw.normal(size=n)
    return np.c_[core, easy], label, 2 * label + background


@pytest.fixture
def table(make_table):
    features, label, _ = spurious(300, 0.95, 0)
    goal, goal_label, goal_group = spurious(240, 0.5, 1)
    made = make_table(np.zeros(300), errors=[4], label=pa.array(label))
    features[9] = np.nan
    made.vectors, made.target = ArrayVectors(features), ArrayVectors(goal)
    columns = {
        "label": pa.array(goal_label),
        "group": pa.array(goal_group),
        "odd": pa.array(["?"] * 240),
    }
    made.target_values = columns.__getitem__
    return made


def run(table, **settings):
    method = Gsr("label", **{"group": "group", "decay": 0.01, **settings})
    selection = method.select(table, Budget("fraction", 1.0), np.random.default_rng(0))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(), selection.params


def test_rows_against_a_spurious_bit_gain_weight_and_the_worst_group_with_them(table):
    place, weight, params = run(table, steps=40)
    assert place.tolist() == [i for i in range(300) if i not in (4, 9)]
    _, _, group = spurious(300, 0.95, 0)
    against = np.isin(group[place], (1, 2))
    assert weight[against].mean() > 2 * weight[~against].mean()
    accuracy = params["worst_group_accuracy"]
    assert accuracy["best"] > accuracy["equal_weights"] + 0.1 and params["best_step"] > 0
    assert weight.mean() == pytest.approx(1, rel=1e-5) and (weight >= 0).all()
    # The head that these weights make serves the worst group of fresh rows better, too.
    features, label, _ = spurious(300, 0.95, 0)
    new, new_label, new_group = spurious(2000, 0.5, 2)
    fresh = Goal(with_bias(new), new_label, new_group)
    equal = np.full(len(place), 1 / len(place))
    plain, robust = (
        fresh.of(fit_head(with_bias(features[place]), label[place], w / w.sum(), 2, 0.01))[1].min()
        for w in (equal, weight.astype(np.float64))
    )
    assert robust > plain + 0.1


def test_one_group_is_ascent_along_plain_influence():
    """With a single group its weight is 1; one step moves weights by influence, clipped."""
    method = Gsr("label", "group", steps=2, decay=0.1, clip=1e9, pgd=False)
    draw = np.random.default_rng(7)
    features = np.hstack([draw.normal(size=(40, 2)), np.ones((40, 1))])
    labels = draw.integers(0, 2, 40)
    goal = Goal(features[:20] + 0.5, labels[:20], np.zeros(20, dtype=np.int64))
    equal = np.full(40, 1 / 40)
    head = fit_head(features, labels, equal, 2, 0.1)
    score = head.helpfulness(features, labels, equal, goal.gradient(head, np.ones(1)), 0.0) / 40
    wanted = (equal + score) / (equal + score).sum()
    found = method.search(features, labels, goal)
    assert found.step == 1 and found.accuracy > found.first
    np.testing.assert_allclose(found.weights, wanted, atol=1e-8)


def test_one_step_keeps_equal_weights(table):
    _, weight, params = run(table, steps=1)
    np.testing.assert_allclose(weight, 1.0, rtol=1e-6)
    assert params["best_step"] == 0


def test_what_is_missing_is_said(table):
    with pytest.raises(ValueError, match="holds '\\?', which no row of the corpus has"):
        run(table, target_label="odd")
    with pytest.raises(ValueError, match="steps must be"):
        run(table, steps=0)
    table.vectors = ArrayVectors(np.zeros((300, 5000)))
    table.target = ArrayVectors(np.zeros((240, 5000)))
    with pytest.raises(ValueError, match="vectors of fewer dimensions"):
        run(table)
    del table.target_values
    with pytest.raises(ValueError, match="has vectors only"):
        run(table)
