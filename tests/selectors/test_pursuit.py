"""Matching pursuit against non-negative least squares, exact recovery and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from curate.selectors.pursuit import pursue

QUICK = settings(deadline=None, max_examples=40)


def run(vectors, target, amount, penalty, sizes=None):
    sizes = np.ones(len(vectors), dtype=np.int64) if sizes is None else np.asarray(sizes)
    return pursue(lambda v: vectors @ v, lambda i: vectors[i], target, sizes, amount, penalty)


def objective(vectors, target, rows, weights, penalty):
    return np.sum((weights @ vectors[rows] - target) ** 2) + penalty * np.sum(weights**2)


def best_weights(vectors, target, rows, penalty):
    """The optimum on a given support, by another route: least squares with rows appended."""
    stacked = np.vstack([vectors[rows].T, np.sqrt(penalty) * np.eye(len(rows))])
    return nnls(stacked, np.concatenate([target, np.zeros(len(rows))]))[0]


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 8), st.floats(1e-3, 3))
def test_without_a_budget_it_is_the_optimum_over_all_rows(seed, n, d, penalty):
    draw = np.random.default_rng(seed)
    vectors, target = draw.normal(size=(n, d)), draw.normal(size=d)
    rows, weights = run(vectors, target, n, penalty)
    everything = best_weights(vectors, target, np.arange(n), penalty)
    found = np.zeros(n)
    found[rows] = weights
    # Rows that point along the rest by less than 1e-6 of the norms are left out on purpose.
    np.testing.assert_allclose(found, everything, atol=1e-4)
    assert (weights > 0).all() and len(set(rows.tolist())) == len(rows)


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.01, 2))
def test_weights_are_the_best_on_their_support_and_more_budget_is_no_worse(seed, k, penalty):
    draw = np.random.default_rng(seed)
    vectors, target = draw.normal(size=(15, 6)), draw.normal(size=6)
    before = np.inf
    for amount in range(1, k + 1):
        rows, weights = run(vectors, target, amount, penalty)
        assert len(rows) <= amount
        np.testing.assert_allclose(weights, best_weights(vectors, target, rows, penalty), atol=1e-8)
        now = objective(vectors, target, rows, weights, penalty)
        assert now <= before + 1e-9
        before = now


def test_the_mean_of_a_subset_of_orthogonal_rows_is_recovered_exactly():
    """ALGORITHMS section 7: rows and weights come back when gradients are orthogonal."""
    draw = np.random.default_rng(0)
    vectors = np.linalg.qr(draw.normal(size=(20, 20)))[0] * draw.uniform(0.5, 3, (20, 1))
    wanted = [3, 7, 11, 18]
    rows, weights = run(vectors, vectors[wanted].mean(axis=0), 10, 0.0)
    assert sorted(rows.tolist()) == wanted
    np.testing.assert_allclose(weights, 0.25, rtol=1e-9)


def test_orthogonal_rows_are_the_best_of_all_subsets():
    draw = np.random.default_rng(4)
    vectors = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    target = draw.normal(size=8)
    rows, weights = run(vectors, target, 3, 0.5)
    least = min(
        objective(vectors, target, list(s), best_weights(vectors, target, list(s), 0.5), 0.5)
        for s in itertools.combinations(range(8), 3)
    )
    assert objective(vectors, target, rows, weights, 0.5) == pytest.approx(least, rel=1e-9)


def test_only_rows_that_point_along_the_target_are_chosen():
    vectors = np.array([[1.0, 0], [-1, 0.1], [0, 1], [0.5, -2]])
    rows, weights = run(vectors, np.array([1.0, 0]), 4, 0.0)
    assert rows.tolist() == [0] and weights.tolist() == [1.0]
    rows, weights = run(vectors, np.array([-3.0, -5.0]), 4, 0.0)
    assert 0 not in rows
    assert len(run(-np.eye(3), np.ones(3), 3, 1.0)[0]) == 0


def test_a_worked_case_with_a_penalty():
    # w = (a·b) / (a·a + penalty) for one row: 6 / (9 + 3).
    rows, weights = run(np.array([[3.0, 0]]), np.array([2.0, 1.0]), 1, 3.0)
    assert rows.tolist() == [0] and weights.tolist() == pytest.approx([0.5])


def test_a_row_that_became_useless_leaves_the_support():
    # (1, 1) points most along (2, 1) + noise until the axes explain it alone.
    vectors = np.array([[1.0, 1.0], [1.0, 0.0], [0.9, -0.3]])
    target = np.array([1.0, -0.2])
    rows, weights = run(np.vstack([vectors, [[1.0, -0.2]]]), target, 4, 0.0)
    assert objective(np.vstack([vectors, [[1.0, -0.2]]]), target, rows, weights, 0.0) < 1e-20


def test_sizes_bound_the_support():
    rows, _ = run(np.eye(4), np.array([4.0, 3, 2, 1]), 5, 0.0, sizes=[2, 2, 2, 1])
    assert rows.tolist() == [0, 1]


def test_more_rows_than_one_block_of_the_factor():
    draw = np.random.default_rng(2)
    vectors, target = draw.normal(size=(80, 60)), np.abs(draw.normal(size=60))
    rows, weights = run(vectors, target, 80, 0.1)
    found = np.zeros(80)
    found[rows] = weights
    np.testing.assert_allclose(found, best_weights(vectors, target, np.arange(80), 0.1), atol=1e-5)
    assert len(rows) > 16
