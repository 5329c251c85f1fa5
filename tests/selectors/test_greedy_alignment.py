"""The greedy search of SELECT: exact recovery, brute force, groups, a target of 0."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors.greedy_alignment import GreedyAlignment, align
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

RNG = np.random.default_rng(0)


def run(points, target, k):
    ones = np.ones(len(points), dtype=np.int64)
    return align(ArrayVectors(np.float32(points)), np.asarray(target, float), ones, k).tolist()


def cosine(total, target):
    return total @ target / (np.linalg.norm(total) * np.linalg.norm(target))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 25), st.integers(2, 6))
def test_every_pick_has_the_largest_cosine_of_the_running_sum(seed, n, d):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32).astype(np.float64)
    target = draw.normal(size=d)
    picks = run(points, target, n)
    assert sorted(picks) == list(range(n))
    total = np.zeros(d)
    for at, pick in enumerate(picks):
        left = [j for j in range(n) if j not in picks[:at]]
        best = max(cosine(total + points[j], target) for j in left)
        # Sums of up to 25 float32 vectors, whose inner products are known to about 1e-6.
        assert cosine(total + points[pick], target) >= best - 1e-5
        total += points[pick]


def test_one_gradient_step_on_orthogonal_rows_is_recovered():
    """ALGORITHMS 2.9: with delta = eta * sum over S*, S* comes back exactly, and first."""
    draw = np.random.default_rng(0)
    points = np.linalg.qr(draw.normal(size=(30, 30)))[0]
    wanted = [2, 9, 17, 28]
    target = 0.01 * points[wanted].sum(axis=0)
    picks = run(points, target, 4)
    assert sorted(picks) == wanted
    reached = cosine(points[picks].sum(axis=0), target)
    others = itertools.combinations(range(0, 30, 3), 4)
    assert all(reached >= cosine(points[list(s)].sum(axis=0), target) - 1e-6 for s in others)


def test_cosines_do_not_depend_on_the_lengths_of_the_target_and_of_all_rows():
    draw = np.random.default_rng(3)
    points, target = draw.normal(size=(20, 4)), draw.normal(size=4)
    assert run(points, target, 9) == run(points, 1e-6 * target, 9) == run(8 * points, target, 9)


def test_tiny_gradients_are_compared_as_long_ones_are():
    points = np.random.default_rng(4).normal(size=(40, 6)).astype(np.float32)
    tiny = points * np.float32(2.0**-75)  # exact, and a product of two is 0 in float32
    target = np.random.default_rng(5).normal(size=6)
    assert run(tiny, target, 15) == run(points, target, 15)


def test_the_second_row_balances_the_first():
    # Alone (1, 1) beats (0, 1) by cosine; after (1, 0.2) the row (0, 1) is worse than (0.1, 0.8).
    points = np.array([[1.0, 0.2], [0.0, 1.0], [0.1, 0.8], [-1, -1]])
    assert run(points, [1.0, 1.0], 4) == [0, 2, 1, 3]


@pytest.fixture
def table_of(make_table):
    def make(points, target, **columns):
        table = make_table(np.zeros(len(points)), **columns)
        table.vectors = ArrayVectors(np.float32(points))
        table.target = None if target is None else ArrayVectors(np.float32(target))
        return table

    return make


def test_the_target_is_the_mean_of_its_rows(table_of, ranked):
    points = np.random.default_rng(4).normal(size=(20, 3))
    target = np.random.default_rng(5).normal(size=(7, 3))
    table = table_of(points, np.vstack([target, np.full(3, np.nan)]))
    found = ranked(GreedyAlignment().select(table, Budget("rows", 8), RNG)).tolist()
    assert found == run(points, np.float32(target).mean(axis=0), 8)


def test_groups_get_equal_shares_and_a_sum_each(table_of, kept):
    points = np.random.default_rng(6).normal(size=(30, 3))
    label = np.array([0] * 22 + [1] * 8)
    table = table_of(points, np.ones((1, 3)), label=pa.array(label))
    method = GreedyAlignment(by_group="label", group_shares="equal")
    chosen = kept(method.select(table, Budget("rows", 10), RNG)).tolist()
    wanted = run(points[:22], np.ones(3), 5) + [22 + j for j in run(points[22:], np.ones(3), 5)]
    assert chosen == sorted(wanted)


def test_a_target_without_direction_is_refused(table_of):
    points = np.eye(3)
    for target, said in (
        (np.array([[1.0, 0, 0], [-1, 0, 0]]), "points nowhere"),
        (np.full((1, 3), np.nan), "no row of the target"),
        (np.ones((1, 2)), "2 dimensions, the corpus's 3"),
        (None, "give --target-vectors"),
    ):
        with pytest.raises(ValueError, match=said):
            GreedyAlignment().select(table_of(points, target), Budget("rows", 1), RNG)
