"""GLISTER: every pick against a validation gradient computed anew, by autograd where exact."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from curate.selectors import glister as glister_module
from curate.selectors.glister import Glister, descend, fisher_update, head_update
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

RNG = np.random.default_rng(0)
C, D = 3, 4


def head_gradients(features, labels, weight, bias):
    """Per-row gradients [biases, weights] of cross-entropy by autograd, one row at a time."""
    rows = []
    for h, y in zip(features, labels, strict=True):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy((w @ h + b)[None], y[None])
        gw, gb = torch.autograd.grad(loss, (w, b))
        rows.append(torch.cat([gb, gw.ravel()]))
    return torch.stack(rows).numpy()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    kind = {"dtype": torch.float64}
    weight, bias = torch.randn(C, D, **kind), torch.randn(C, **kind)
    train = torch.randn(25, D, **kind), torch.randint(0, C, (25,))
    held = torch.randn(9, D, **kind), torch.randint(0, C, (9,))
    return weight, bias, train, held


def test_the_heads_gradient_after_a_step_is_that_of_autograd(problem):
    weight, bias, train, held = problem
    rows = head_gradients(*train, weight, bias)
    target = ArrayVectors(head_gradients(*held, weight, bias))
    after = head_update(target, C, eta=0.3)
    total = rows[:6].sum(axis=0)
    step = torch.tensor(0.3 * total)
    moved = head_gradients(*held, weight - step[C:].reshape(C, D), bias - step[:C])
    # The target is read as float32: about 1e-7 of numbers of order 1, divided by small errors.
    np.testing.assert_allclose(after(total), moved.mean(axis=0), atol=2e-5)


@pytest.mark.parametrize("eta", [0.02, 0.5])
def test_every_pick_helps_most_where_the_chosen_rows_led(problem, eta):
    weight, bias, train, held = problem
    rows = head_gradients(*train, weight, bias)
    vectors, target = ArrayVectors(rows), ArrayVectors(head_gradients(*held, weight, bias))
    ones = np.ones(len(rows), dtype=np.int64)
    picks = descend(vectors, head_update(target, C, eta), ones, 10).tolist()
    total = np.zeros(rows.shape[1])
    for at, pick in enumerate(picks):
        step = torch.tensor(eta * total)
        moved = head_gradients(*held, weight - step[C:].reshape(C, D), bias - step[:C])
        gains = rows @ moved.mean(axis=0)
        gains[picks[:at]] = -np.inf
        assert gains[pick] >= gains.max() - 1e-4
        total += rows[pick]
    # The update really happens: DeepCore's misspelt argument leaves the first order of all.
    frozen = np.argsort(-(rows @ head_gradients(*held, weight, bias).mean(axis=0)))[:10]
    assert eta < 0.1 or picks != frozen.tolist()


def test_a_still_model_takes_the_best_of_one_inner_product(problem):
    weight, bias, train, held = problem
    rows = head_gradients(*train, weight, bias)
    goal = head_gradients(*held, weight, bias)
    for after in (
        fisher_update(ArrayVectors(goal), 0.0),
        head_update(ArrayVectors(goal), C, 0.0),
    ):
        picks = descend(ArrayVectors(rows), after, np.ones(25, dtype=np.int64), 8)
        assert picks.tolist() == np.argsort(-(rows @ goal.mean(axis=0)), kind="stable")[:8].tolist()


def test_the_fisher_form_is_one_taylor_term():
    draw = np.random.default_rng(1)
    goal, total = draw.normal(size=(6, 5)).astype(np.float32), draw.normal(size=5)
    wide = goal.astype(np.float64)
    fisher = wide.T @ wide / 6
    found = fisher_update(ArrayVectors(goal), 0.2)(total)
    np.testing.assert_allclose(found, wide.mean(axis=0) - 0.2 * fisher @ total, rtol=1e-6)


def test_a_copy_of_a_chosen_row_is_worth_less_once_its_direction_is_spent():
    # Two directions are wanted equally; the longer one first, then the other, not its copy.
    rows = np.array([[1.0, 0], [1, 0], [0, 0.9]])
    goal = np.array([[1.0, 0], [0, 1]])
    ones = np.ones(3, dtype=np.int64)
    picks = descend(ArrayVectors(rows), fisher_update(ArrayVectors(goal), 0.5), ones, 3)
    assert picks.tolist() == [0, 2, 1]


def test_rounds_take_several_rows_between_updates():
    draw = np.random.default_rng(2)
    rows, goal = draw.normal(size=(40, 5)), draw.normal(size=(8, 5))
    ones = np.ones(40, dtype=np.int64)
    after = fisher_update(ArrayVectors(goal), 0.05)
    one_by_one = descend(ArrayVectors(rows), after, ones, 12).tolist()
    assert descend(ArrayVectors(rows), after, ones, 12, rounds=12).tolist() == one_by_one
    at_once = descend(ArrayVectors(rows), after, ones, 12, rounds=1)
    first = np.float32(rows) @ goal.mean(axis=0)
    assert at_once.tolist() == np.argsort(-first, kind="stable")[:12].tolist()
    assert len(set(descend(ArrayVectors(rows), after, ones, 13, rounds=5).tolist())) == 13


def test_over_a_table(make_table, ranked, problem):
    weight, bias, train, held = problem
    rows, goal = head_gradients(*train, weight, bias), head_gradients(*held, weight, bias)
    table = make_table(np.zeros(25), errors=[4])
    table.vectors, table.target = ArrayVectors(rows), ArrayVectors(goal)
    selection = Glister(classes=C, eta=0.1).select(table, Budget("rows", 9), RNG)
    assert selection.params["update"] == "head"
    found = ranked(selection).tolist()
    able = [j for j in range(25) if j != 4]
    after = head_update(ArrayVectors(goal), C, 0.1)
    picks = descend(ArrayVectors(rows[able]), after, np.ones(24, dtype=np.int64), 9)
    assert found == [able[j] for j in picks]


def test_what_is_no_gradient_of_a_head_is_refused(make_table, problem):
    with pytest.raises(ValueError, match="no gradients of a head"):
        head_update(ArrayVectors(np.ones((2, C * (D + 1)))), C, 0.1)
    with pytest.raises(ValueError, match="3 x \\(features \\+ 1\\)"):
        head_update(ArrayVectors(np.ones((2, 16))), C, 0.1)
    with pytest.raises(ValueError, match="eta must be"):
        Glister(eta=-1.0)
    with pytest.raises(ValueError, match="classes must be"):
        Glister(classes=1)


@pytest.mark.parametrize("classes", [None, C])
def test_without_a_target_each_group_validates_itself(make_table, kept, problem, classes):
    """Every pick by brute force, on the loss of the rows that may be chosen in its group."""
    weight, bias, train, _ = problem
    rows = head_gradients(*train, weight, bias)
    able = np.flatnonzero(np.arange(25) != 4)
    group = np.arange(25) // 15
    table = make_table(np.zeros(25), errors=[4], part=pa.array(group))
    table.vectors, table.target = ArrayVectors(rows), None
    method = Glister(classes=classes, eta=0.2, by_group="part")
    selection = method.select(table, Budget("rows", 12), RNG)
    expected = []
    for value, count in ((0, 7), (1, 5)):
        mine = able[group[able] == value]
        total, picks = np.zeros(rows.shape[1]), []
        for _ in range(count):
            if classes is None:
                fisher = rows[mine].T @ rows[mine] / len(mine)
                now = rows[mine].mean(axis=0) - 0.2 * fisher @ total
            else:
                step, own = torch.tensor(0.2 * total), (train[0][mine], train[1][mine])
                moved = weight - step[C:].reshape(C, D)
                now = head_gradients(*own, moved, bias - step[:C]).mean(axis=0)
            gains = rows[mine] @ now
            gains[np.isin(mine, picks)] = -np.inf
            picks.append(int(mine[np.argmax(gains)]))
            total += rows[picks[-1]]
        expected += picks
    assert selection.params["validation"] == "rows"
    assert kept(selection).tolist() == sorted(expected)


def test_groups_of_the_target_validate_those_of_the_rows(make_table, kept):
    rows = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    table = make_table(np.zeros(4), label=pa.array(["a", "a", "b", "b"]))
    table.vectors, table.target = ArrayVectors(rows), ArrayVectors(np.array([[3.0, 0], [0, 2]]))
    table.target_values = {"kind": pa.array(["b", "a"])}.__getitem__

    def chosen(**more):
        selection = Glister(by_group="label", **more).select(table, Budget("rows", 2), RNG)
        return kept(selection).tolist()

    assert chosen(target_group="kind") == [1, 2]
    assert chosen() == [0, 2]  # the whole target: its mean points along the first axis
    table.target_values = {"kind": pa.array(["b", "b"])}.__getitem__
    with pytest.raises(ValueError, match="the group 'a' to validate it"):
        chosen(target_group="kind")


@pytest.mark.parametrize("classes", [None, C])
def test_a_validation_set_too_large_to_hold_is_found_again(monkeypatch, problem, classes):
    weight, bias, train, held = problem
    target = ArrayVectors(head_gradients(*train, weight, bias))
    total = head_gradients(*held, weight, bias).sum(axis=0)
    method = Glister(classes=classes, eta=0.3)
    before = method._after(target)(total)
    monkeypatch.setattr(glister_module, "HELD_BYTES", 0)
    np.testing.assert_allclose(method._after(target)(total), before, rtol=1e-12, atol=1e-14)
