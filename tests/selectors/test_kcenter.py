"""k-center against brute force: the greedy order, its bound of two, cells, starts and groups."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import farthest
from curate.selectors.cells import cells_of
from curate.selectors.farthest import FarthestFirst, nearest_to_mean
from curate.selectors.kcenter import KCenter
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


def distances(points, metric="euclidean", others=None):
    """Pairwise distances, from coordinates one difference at a time."""
    points = points.astype(np.float64)
    others = points if others is None else others.astype(np.float64)
    if metric == "cosine":
        points, others = (
            x / np.where((n := np.linalg.norm(x, axis=1, keepdims=True)) > 0, n, 1)
            for x in (points, others)
        )
    return np.linalg.norm(points[:, None] - others[None], axis=2)


def plain_greedy(away, k, start):
    order, nearest = [start], away[:, start].copy()
    while len(order) < k:
        open_rows = np.setdiff1d(np.arange(len(away)), order)
        order.append(int(open_rows[np.argmax(nearest[open_rows].astype(np.float32))]))
        nearest = np.minimum(nearest, away[:, order[-1]])
    return order, float(nearest.max())


def run(points, k, metric="euclidean", start=0, **more):
    starts = [] if "base" in more else [start]
    found = FarthestFirst(ArrayVectors(points), metric, starts=starts, **more)
    order = found.fill(np.ones(len(points), dtype=np.int64), k)
    return order.tolist(), found.radius()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from(["cosine", "euclidean"]),
    st.integers(1, 9),
)
def test_it_is_plain_greedy_however_rows_lie_in_blocks(seed, n, d, metric, block):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32)
    k, start = int(draw.integers(1, n + 1)), int(draw.integers(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farthest, "BLOCK_ROWS", block)
        patch.setattr(farthest, "CENTRES", 3)
        order, radius = run(points, k, metric, start)
    expected, far = plain_greedy(distances(points, metric), k, start)
    if d > 1 or metric == "euclidean":  # directions of numbers are all ties
        assert order == expected
    # Squared distances near 2 are kept in float32: off by 1e-7, their root near 0 by 3e-4.
    assert radius == pytest.approx(far, abs=5e-4)


def test_ties_go_to_the_earlier_row_and_duplicates_come_last():
    grid = np.array([[0, 0], [4, 0], [0, 0], [-4, 0], [0, 4], [4, 0]], dtype=np.float32)
    for block in (1, 2, 6):
        farthest.BLOCK_ROWS, before = block, farthest.BLOCK_ROWS
        try:
            order, radius = run(grid, 6)
        finally:
            farthest.BLOCK_ROWS = before
        assert order == [0, 1, 3, 4, 2, 5]
        assert radius == 0
    assert run(grid, 4)[1] == 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_radius_is_at_most_twice_the_best(seed, metric):
    points = np.random.default_rng(seed).normal(size=(11, 3)).astype(np.float32)
    away = distances(points, metric)
    for k in (1, 2, 4):
        best = min(away[:, list(s)].min(axis=1).max() for s in itertools.combinations(range(11), k))
        for start in range(11):
            assert run(points, k, metric, start)[1] <= 2 * best + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_the_radius_with_cells_keeps_its_two_bounds(seed):
    """Twice the best of rows that serve their own cells; four times the best of k / cells rows."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(12, 2)).astype(np.float32)
    cells = [np.sort(c) for c in np.array_split(draw.permutation(12), 2)]
    away = distances(points)
    apart = away.copy()
    apart[np.ix_(cells[0], cells[1])] = apart[np.ix_(cells[1], cells[0])] = np.inf
    for k in (2, 4, 6):
        found = FarthestFirst(
            ArrayVectors(points), "euclidean", starts=[int(c[0]) for c in cells], cells=cells
        )
        order = found.fill(np.ones(12, dtype=np.int64), k)
        assert len(set(order.tolist())) == k
        radius = found.radius()
        assert radius == pytest.approx(apart[:, order].min(axis=1).max(), abs=1e-6)
        inside, free = (
            min(m[:, list(s)].min(axis=1).max() for s in itertools.combinations(range(12), size))
            for m, size in ((apart, k), (away, k // 2))
        )
        assert radius <= 2 * inside + 1e-6
        assert radius <= 4 * free + 1e-6


def test_rows_one_has_already_count_as_centres():
    draw = np.random.default_rng(2)
    points, base = draw.normal(size=(30, 4)), draw.normal(size=(5, 4))
    points, base = points.astype(np.float32), base.astype(np.float32)
    order, _ = run(points, 6, base=ArrayVectors(base))
    nearest = distances(points, others=base).min(axis=1)
    expected = []
    for _ in range(6):
        expected.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, distances(points)[:, expected[-1]])
    assert order == expected


def test_the_start_may_be_the_row_nearest_the_mean():
    points = np.random.default_rng(3).normal(size=(50, 3)).astype(np.float32) + 1
    mean = points.astype(np.float64).mean(axis=0, keepdims=True)
    away = distances(points, others=mean)[:, 0]
    assert nearest_to_mean(ArrayVectors(points), "euclidean") == away.argmin()


def test_few_blocks_are_read_for_a_centre():
    """The order is exact though most blocks are looked at once for many centres."""
    points = np.random.default_rng(4).normal(size=(20_000, 8)).astype(np.float32)
    found = FarthestFirst(ArrayVectors(points), "euclidean", starts=[0])
    looks, look = [], found._look
    found._look = lambda block: (looks.append(block), look(block))
    order = found.fill(np.ones(len(points), dtype=np.int64), 300).tolist()
    nearest = np.square(points.astype(np.float64) - points[0]).sum(axis=1)
    for row in order[1:]:
        assert nearest[row] == pytest.approx(nearest.max(), rel=1e-6)
        new = np.square(points.astype(np.float64) - points[row]).sum(axis=1)
        nearest = np.minimum(nearest, new)
    assert len(looks) < 300 * 20  # all 20 blocks for each centre


class TestSelector:
    def test_ranks_are_the_order_and_a_smaller_budget_is_a_prefix(self, table, ranked):
        orders = [
            ranked(KCenter().select(table, Budget("rows", k), np.random.default_rng(1))).tolist()
            for k in (12, 5)
        ]
        assert orders[0][:5] == orders[1]
        able = np.setdiff1d(np.arange(60), [3, 7])
        start = int(np.flatnonzero(able == orders[0][0])[0])
        expected, far = plain_greedy(distances(table.points[able], "cosine"), 12, start)
        assert able[expected].tolist() == orders[0]
        selection = KCenter().select(table, Budget("rows", 12), np.random.default_rng(1))
        assert selection.params["radius"] == pytest.approx(far, rel=1e-6)

    def test_each_group_has_its_own_centres(self, table, kept):
        selector = KCenter(by_group="label", group_shares={"a": 1.0, "b": 3.0}, start="mean")
        chosen = kept(selector.select(table, Budget("rows", 8), np.random.default_rng(0)))
        assert [(chosen // 20 == g).sum() for g in range(3)] == [6, 2, 0]
        alone = table.points[20:40]
        first = nearest_to_mean(ArrayVectors(alone), "cosine")
        order, _ = plain_greedy(distances(alone, "cosine"), 2, first)
        assert sorted(20 + i for i in order) == [c for c in chosen.tolist() if 20 <= c < 40]

    def test_a_permuted_table_gives_the_same_rows(self, table, kept, make_table):
        order = np.random.default_rng(6).permutation(60)
        other = make_table(np.zeros(60), errors=np.flatnonzero(order == 3).tolist())
        other.vectors, other.target = ArrayVectors(table.points[order]), None
        chosen = [
            kept(KCenter(start="mean").select(t, Budget("rows", 15), np.random.default_rng(0)))
            for t in (table, other)
        ]
        assert chosen[0].tolist() == sorted(order[chosen[1]].tolist())

    def test_cells_hold_all_rows_and_the_budget_is_met(self, table, ranked):
        vectors = ArrayVectors(np.nan_to_num(table.points))
        cells = cells_of(vectors, 5, "cosine", 1)
        assert np.sort(np.concatenate(cells)).tolist() == list(range(60))
        selection = KCenter(cells=4).select(table, Budget("rows", 20), np.random.default_rng(0))
        assert selection.params["used_cells"] == 4
        assert len(ranked(selection)) == 20

    def test_tokens_are_filled_to_the_row_that_would_exceed_them(self, make_table, kept):
        tokens = np.random.default_rng(7).integers(1, 9, 40)
        table = make_table(np.zeros(40), tokens=pa.array(tokens, pa.int32()))
        points = np.random.default_rng(8).normal(size=(40, 3)).astype(np.float32)
        table.vectors, table.target = ArrayVectors(points), None
        chosen = kept(KCenter().select(table, Budget("tokens", 50), np.random.default_rng(0)))
        assert 50 - 8 < tokens[chosen].sum() <= 50

    def test_there_is_no_radius_where_a_group_has_no_room_for_its_first_row(self, make_table):
        tokens, label = pa.array([90, 90, 1, 1], pa.int32()), pa.array(["a", "a", "b", "b"])
        table = make_table(np.zeros(4), tokens=tokens, label=label)
        table.vectors, table.target = ArrayVectors(np.eye(4, dtype=np.float32)), None
        selector = KCenter(by_group="label", group_shares="equal", start="mean")
        selection = selector.select(table, Budget("tokens", 2), np.random.default_rng(0))
        assert [batch["row"].to_pylist() for batch in selection.batches] == [[2]]
        assert selection.params["radius"] is None  # a number that JSON can hold

    def test_wrong_settings_are_refused(self):
        for wrong in ({"metric": "dot"}, {"start": "first"}, {"cells": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                KCenter(**wrong)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "settings", [{}, {"start": "mean"}, {"cells": 3}, {"base": True}, {"by_group": "label"}]
)
def test_vectors_of_any_scale_give_the_same_rows(make_table, kept, metric, settings):
    """Squares of distances such as 2^-120 are no numbers of float32, those of 2^120 infinite."""
    draw = np.random.default_rng(11)
    points = draw.normal(size=(60, 4)).astype(np.float32) * np.float32(3e-3)
    base = draw.normal(size=(2, 4)).astype(np.float32) * np.float32(3e-3)
    found, radii = [], []
    for exponent in (0, -60, 60):
        table = make_table(np.zeros(60), label=pa.array(np.arange(60) % 2))
        table.vectors, table.target = ArrayVectors(np.ldexp(points, exponent)), None
        named = dict(settings)
        if named.pop("base", False):
            table.target = ArrayVectors(np.ldexp(base, exponent))
        method = KCenter(metric=metric, **named)
        selection = method.select(table, Budget("rows", 20), np.random.default_rng(0))
        found.append(kept(selection).tolist())
        radii.append(selection.params["radius"])
    assert found[0] == found[1] == found[2]
    there = -60 if metric == "euclidean" else 0
    assert [radii[0], radii[0]] == [np.ldexp(radii[1], -there), np.ldexp(radii[2], there)]
