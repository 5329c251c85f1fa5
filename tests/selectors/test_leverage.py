"""Leverage and Lewis weights: closed forms, invariances, and sums that stay unbiased."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors.leverage import Leverage, leverage, lewis_weights
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


def matrix(seed=0, n=50, d=4):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6), st.integers(1, 6))
def test_leverage_is_the_diagonal_of_the_projection_and_sums_to_the_rank(seed, n, d, rank):
    draw = np.random.default_rng(seed)
    rank = min(rank, n, d)
    # Whole numbers, so that float32 holds the rank exactly.
    a = draw.integers(-3, 4, (n, rank)) @ draw.integers(-3, 4, (rank, d))
    if not a.any():
        return
    found = leverage(ArrayVectors(a.astype(np.float32)))
    wide = a.astype(np.float64)
    np.testing.assert_allclose(found, np.diag(wide @ np.linalg.pinv(wide)), atol=1e-9)
    assert found.sum() == pytest.approx(np.linalg.matrix_rank(wide), abs=1e-8)
    assert (found >= 0).all() and (found <= 1).all()


def test_leverage_is_the_largest_share_of_a_row_in_any_direction():
    a = matrix(n=12, d=3).astype(np.float64)
    found = leverage(ArrayVectors(a))
    tried = np.random.default_rng(1).normal(size=(3, 200_000))
    share = np.square(a @ tried) / np.square(a @ tried).sum(axis=0)
    assert (share.max(axis=1) <= found + 1e-6).all()
    np.testing.assert_allclose(share.max(axis=1), found, atol=0.01)  # 200 000 directions tried


def test_a_row_alone_in_its_direction_has_leverage_one():
    a = np.vstack([matrix(n=9, d=3), np.zeros((1, 3))])
    a = np.hstack([a, np.zeros((10, 1))]).astype(np.float32)
    a[9] = [0.3, 0.1, 0.2, 1e-3]
    found = leverage(ArrayVectors(a))
    assert found[9] == pytest.approx(1.0)
    for i in range(10):
        is_alone = np.linalg.matrix_rank(np.delete(a, i, axis=0)) < 4
        assert is_alone == (found[i] > 1 - 1e-9)


def test_other_coordinates_do_not_change_leverage():
    a, turn = matrix(), np.random.default_rng(5).normal(size=(4, 4))
    np.testing.assert_allclose(
        leverage(ArrayVectors(a)), leverage(ArrayVectors(a @ turn)), atol=1e-5
    )


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 3.99])
def test_lewis_weights_satisfy_what_defines_them(p):
    a = matrix().astype(np.float64)
    a[:5] *= 30
    w = lewis_weights(ArrayVectors(a), p)
    assert w.sum() == pytest.approx(4, abs=1e-6)
    inside = np.linalg.inv(a.T @ (w[:, None] ** (1 - 2 / p) * a))
    np.testing.assert_allclose(w ** (2 / p), np.einsum("nd,de,ne->n", a, inside, a), rtol=1e-6)
    if p == 2:
        np.testing.assert_allclose(w, leverage(ArrayVectors(a)), rtol=1e-9)


@pytest.fixture
def table(make_table):
    made = make_table(np.zeros(60), errors=[3], label=pa.array(np.arange(60) % 2))
    a = np.random.default_rng(2).normal(size=(60, 3)) * np.random.default_rng(3).gamma(
        1, size=(60, 1)
    )
    a[[10, 11]] = 0
    a[12] = np.nan
    made.vectors, made.target = ArrayVectors(a.astype(np.float32)), None
    return made


def draw(table, method, budget, seed):
    selection = method.select(table, Budget("rows", budget), np.random.default_rng(seed))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(zero_copy_only=False), selection.params


@pytest.mark.parametrize(
    "method", [Leverage(), Leverage("root_leverage", p=1), Leverage("lewis", p=1)]
)
def test_weighted_sums_of_powers_are_unbiased(table, method):
    """E[sum over kept of |a·x|^p / q] = ||Ax||_p^p, up to the noise of 144 draws."""
    p = method.p or 2
    a = np.nan_to_num(table.vectors.array.astype(np.float64))
    terms = np.abs(a @ np.array([1.0, -0.5, 2.0])) ** p
    terms[3] = 0
    sums = []
    for seed in range(144):
        place, weight, params = draw(table, method, 15, seed)
        assert len(place) == 15 and not {3, 10, 11, 12} & set(place.tolist())
        # Weights are 15/58 of 1/q: about 1 in the mean over the 58 rows that have vectors.
        sums.append((weight * terms[place]).sum() * 58 / 15)
    error = np.std(sums) / 12
    assert abs(np.mean(sums) - terms.sum()) < 4 * error
    assert params["weight_kind"] == "loss"
    if method.kind != "root_leverage":
        assert params["total"] == pytest.approx(3, abs=1e-6)


def test_a_row_of_leverage_one_is_all_but_certain(make_table):
    table = make_table(np.zeros(50))
    a = np.random.default_rng(0).normal(size=(50, 3))
    a[:, 2] = 0
    a[20] = [0, 0, 5]
    table.vectors, table.target = ArrayVectors(a), None
    kept = [20 in draw(table, Leverage(), 25, seed)[0] for seed in range(20)]
    # Its rate is 1 of 3, the others' 2/49 each: chance above 1 - exp(-10) at 25 of 50 rows.
    assert all(kept)


def test_wrong_settings_are_refused(table):
    for settings_, said in (
        ({"kind": "sensitivity"}, "kind must be one of"),
        ({"kind": "lewis"}, "give p in"),
        ({"kind": "lewis", "p": 4.0}, "has p in"),
        ({"kind": "leverage", "p": 1.0}, "has p 2"),
        ({"kind": "root_leverage", "p": 2.0}, "has p in"),
    ):
        with pytest.raises(ValueError, match=said):
            Leverage(**settings_)
    table.vectors = ArrayVectors(np.zeros((60, 2)))
    with pytest.raises(ValueError, match="all vectors are 0"):
        Leverage().select(table, Budget("rows", 3), np.random.default_rng(0))
