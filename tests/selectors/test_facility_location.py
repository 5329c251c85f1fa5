"""Facility location against brute force: greedy's order, its bounds, cells, groups, a target."""

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import coverage as coverage_module
from curate.selectors import facility_location as module
from curate.selectors.coverage import Coverage
from curate.selectors.facility_location import FacilityLocation
from curate.selectors.greedy import lazy_greedy, stochastic_greedy
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


def similar(points, others=None):
    """s[i, j] = 1/2 + cos/2 of demand i and candidate j, as float32, which ties are judged in."""
    points, others = (
        np.asarray(x, np.float64) for x in (points, points if others is None else others)
    )
    cos = [
        [float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))) for b in others]
        for a in points
    ]
    return (0.5 + 0.5 * np.array(cos)).astype(np.float32).astype(np.float64)


def value(s, chosen):
    return s[:, list(chosen)].max(axis=1).sum() if len(chosen) else 0.0


def plain_greedy(s, k):
    order = []
    for _ in range(k):
        gains = [
            -1.0 if j in order else float(np.float32(value(s, [*order, j]) - value(s, order)))
            for j in range(s.shape[1])
        ]
        order.append(int(np.argmax(gains)))
    return order


def lazy(points, k, target=None):
    vectors = ArrayVectors(np.asarray(points, np.float32))
    demand = vectors if target is None else ArrayVectors(np.asarray(target, np.float32))
    function = Coverage(vectors, demand)
    order, added = lazy_greedy(function, np.ones(len(points), dtype=np.int64), k)
    return order.tolist(), added, function


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(2, 5), st.booleans())
def test_it_is_plain_greedy_whether_similarities_are_held_or_not(seed, n, d, is_held):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32)
    k = int(draw.integers(1, n + 1))
    with pytest.MonkeyPatch.context() as patch:
        if not is_held:
            patch.setattr(coverage_module, "HELD_BYTES", 16 * n * 3)
        order, added, function = lazy(points, k)
    s = similar(points)
    # Near the end gains are differences of nearly equal sums: compare what they add up to.
    assert added.sum(dtype=np.float64) == pytest.approx(value(s, plain_greedy(s, k)), rel=1e-6)
    if d > 2:
        assert order[: max(1, k // 2)] == plain_greedy(s, k)[: max(1, k // 2)]
    assert function.mean() == pytest.approx(value(s, order) / n, rel=1e-6)
    assert (np.diff(added) <= 1e-6 * n).all()


@pytest.mark.parametrize("seed", range(10))
def test_greedy_keeps_its_share_of_the_optimum(seed):
    points = np.random.default_rng(seed).normal(size=(11, 3))
    s = similar(points)
    for k in (1, 2, 3, 5):
        best = max(value(s, c) for c in itertools.combinations(range(11), k))
        order, _, _ = lazy(points, k)
        assert value(s, order) >= (1 - 1 / math.e) * best
        if k == 1:
            assert value(s, order) == pytest.approx(best, rel=1e-6)


def test_the_function_is_monotone_and_submodular():
    draw = np.random.default_rng(1)
    points = draw.normal(size=(12, 3)).astype(np.float32)
    function = Coverage(ArrayVectors(points), ArrayVectors(points))
    before = function.gains(np.arange(12))
    assert (before > 0).all()
    for row in draw.permutation(12):
        function.add(int(row))
        after = function.gains(np.arange(12))
        assert (after >= 0).all() and (after <= before).all()
        assert after[row] == 0
        before = after


@pytest.mark.parametrize("seed", range(3))
def test_stochastic_greedy_keeps_its_share_in_the_mean(seed):
    points = np.random.default_rng(seed).normal(size=(12, 3)).astype(np.float32)
    s, vectors = similar(points), ArrayVectors(points)
    best = max(value(s, c) for c in itertools.combinations(range(12), 4))
    found = []
    for draw in range(40):
        function, sizes = Coverage(vectors, vectors), np.ones(12, dtype=np.int64)
        rng = np.random.default_rng(draw)
        order, _ = stochastic_greedy(function, sizes, 4, rng, epsilon=0.3)
        assert len(set(order.tolist())) == 4
        found.append(value(s, order))
        # Sums of 12 float32 similarities in another order.
        assert function.mean() == pytest.approx(found[-1] / 12, rel=1e-6)
    assert np.mean(found) >= (1 - 1 / math.e - 0.3) * best
    # A sample of all rows is plain greedy.
    order, _ = stochastic_greedy(Coverage(vectors, vectors), sizes, 4, rng, epsilon=1e-9)
    assert order.tolist() == plain_greedy(s, 4)


def test_two_clusters_are_both_stood_for_and_duplicates_add_nothing():
    points = np.array([[1, 0], [1, 0.01], [1, 0], [0, 1], [0.01, 1], [0, 1]], dtype=np.float32)
    order, added, _ = lazy(points, 6)
    assert {i < 3 for i in order[:2]} == {True, False}
    assert (added[4:] == 0).all()


class TestSelector:
    def test_ranks_are_the_order_and_a_smaller_budget_is_a_prefix(self, table, ranked):
        orders = [
            ranked(FacilityLocation().select(table, Budget("rows", k), np.random.default_rng(1)))
            for k in (9, 4)
        ]
        able = np.setdiff1d(np.arange(60), [3, 7])
        assert orders[0].tolist() == able[plain_greedy(similar(table.points[able]), 9)].tolist()
        assert orders[0][:4].tolist() == orders[1].tolist()

    def test_groups_stand_for_themselves(self, table, kept):
        selector = FacilityLocation(by_group="label", group_shares="equal")
        selection = selector.select(table, Budget("rows", 9), np.random.default_rng(0))
        chosen = kept(selection)
        assert np.bincount(chosen // 20).tolist() == [3, 3, 3]
        s = similar(table.points[40:])
        assert sorted(plain_greedy(s, 3)) == [c - 40 for c in chosen.tolist() if c >= 40]
        groups = [np.setdiff1d(np.arange(g * 20, g * 20 + 20), [3, 7]) for g in range(3)]
        total = sum(
            value(similar(table.points[g]), np.flatnonzero(np.isin(g, chosen))) for g in groups
        )
        assert selection.params["coverage"] == pytest.approx(total / 58, rel=1e-6)

    def test_a_target_is_covered(self, table, ranked):
        aim = np.random.default_rng(9).normal(size=(6, 4)).astype(np.float32)
        table.target = ArrayVectors(aim)
        selection = FacilityLocation().select(table, Budget("rows", 4), np.random.default_rng(0))
        able = np.setdiff1d(np.arange(60), [3, 7])
        expected = plain_greedy(similar(aim, table.points[able]), 4)
        assert ranked(selection).tolist() == able[expected].tolist()

    @pytest.mark.parametrize("k", [1, 7, 30, 58])
    def test_cells_give_greedy_without_similarity_between_them(self, table, ranked, k, monkeypatch):
        able = np.setdiff1d(np.arange(60), [3, 7])
        cells = np.array_split(np.random.default_rng(1).permutation(58), 4)
        cells = [np.sort(c) for c in cells]
        monkeypatch.setattr(module, "cells_of", lambda *_: cells)
        selection = FacilityLocation(cells=4).select(
            table, Budget("rows", k), np.random.default_rng(0)
        )
        s, apart = similar(table.points[able]), np.zeros((58, 58))
        for cell in cells:
            apart[np.ix_(cell, cell)] = s[np.ix_(cell, cell)]
        order = np.searchsorted(able, ranked(selection))
        best = plain_greedy(apart, k)
        assert value(apart, order) == pytest.approx(value(apart, best), rel=1e-6)
        assert selection.params["coverage"] == pytest.approx(value(apart, order) / 58, rel=1e-6)
        assert value(s, order) >= value(apart, order)
        if k < 20:
            assert order.tolist() == best

    def test_real_cells_meet_the_budget(self, table, ranked):
        selection = FacilityLocation(cells=5).select(
            table, Budget("rows", 40), np.random.default_rng(0)
        )
        assert len(ranked(selection)) == 40

    def test_a_permuted_table_gives_the_same_rows(self, table, kept, make_table):
        order = np.random.default_rng(6).permutation(60)
        other = make_table(np.zeros(60), errors=np.flatnonzero(order == 3).tolist())
        other.vectors, other.target = ArrayVectors(table.points[order]), None
        chosen = [
            kept(FacilityLocation().select(t, Budget("rows", 6), np.random.default_rng(0)))
            for t in (table, other)
        ]
        # Of more rows some are each other's nearest and add the same: the earlier is taken.
        assert chosen[0].tolist() == sorted(order[chosen[1]].tolist())

    @pytest.mark.parametrize("settings_", [{}, {"greedy": "stochastic"}, {"cells": 3}])
    def test_tokens_are_filled_to_the_row_that_would_exceed_them(self, make_table, kept, settings_):
        tokens = np.random.default_rng(7).integers(1, 9, 40)
        table = make_table(np.zeros(40), tokens=pa.array(tokens, pa.int32()))
        points = np.random.default_rng(8).normal(size=(40, 3)).astype(np.float32)
        table.vectors, table.target = ArrayVectors(points), None
        selector = FacilityLocation(**settings_)
        chosen = kept(selector.select(table, Budget("tokens", 50), np.random.default_rng(0)))
        assert 50 - 8 < tokens[chosen].sum() <= 50

    def test_wrong_settings_are_refused(self):
        for wrong in ({"greedy": "eager"}, {"epsilon": 1.0}, {"cells": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                FacilityLocation(**wrong)
        with pytest.raises(ValueError, match="cells"):
            FacilityLocation(greedy="stochastic", cells=3)
