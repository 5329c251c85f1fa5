"""Herding against the formula by brute force, its sign, its rate, groups and a target."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from curate.selectors import herding as module
from curate.selectors.herding import Herding, herd
from curate.selectors.inner_products import mean_of
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


def plain(points, k, mean=None):
    """argmin ||(t + 1) mu - sum - x|| as it is written."""
    points = np.asarray(points, np.float64)
    mean = points.mean(axis=0) if mean is None else mean
    order = []
    for t in range(k):
        rest = (t + 1) * mean - points[order].sum(axis=0)
        away = np.linalg.norm(rest - points, axis=1)
        away[order] = np.inf
        order.append(int(np.argmin(away)))
    return order


def run(points, k):
    vectors = ArrayVectors(np.asarray(points, np.float32))
    order, total = herd(vectors, mean_of(vectors), np.ones(len(points), dtype=np.int64), k)
    return order.tolist(), np.linalg.norm(total) / k


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 5), st.booleans())
def test_it_is_the_formula_and_the_smallest(seed, n, d, is_held):
    """Of three rows or more: two are equally far from their mean, and its rounding decides."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32) + np.float32(draw.choice([0, 3, 40]))
    k = int(draw.integers(1, n + 1))
    with pytest.MonkeyPatch.context() as patch:
        if not is_held:
            patch.setattr(module, "SMALL_BYTES", 0)
        order, gap = run(points, k)
    assert order == plain(points, k)
    found = np.linalg.norm(points[order].astype(np.float64).mean(axis=0) - points.mean(axis=0))
    assert gap == pytest.approx(found, abs=1e-5)


def test_a_case_worked_by_hand():
    """mu = 1: first 1, then 2·1 - 1 = 1 again: 0 and 2 are equally near, 0 is earlier."""
    assert run([[0.0], [2.0], [1.0], [-3.0], [5.0]], 4)[0] == [2, 0, 1, 3]


def test_the_mean_is_followed_far_better_than_by_chance():
    points = load_digits().data.astype(np.float32)[:600]
    order, gap = run(points, 60)
    mean, draw = points.mean(axis=0), np.random.default_rng(0)
    chance = [
        np.linalg.norm(points[draw.choice(600, 60, replace=False)].mean(axis=0) - mean)
        for _ in range(20)
    ]
    assert gap < 0.25 * min(chance)
    assert len(set(order)) == 60


@pytest.mark.parametrize("exponent", [-70, 70])
@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.filterwarnings("error")
def test_rows_of_any_scale_come_in_the_same_order(exponent, held, monkeypatch):
    """Squares of lengths of 2^-70 are 0 in float32, those of 2^70 infinite: near copies tell."""
    monkeypatch.setattr(module, "SMALL_BYTES", held)
    draw = np.random.default_rng(0)
    base = draw.normal(size=(30, 4))
    near = [base * (1 + 2e-7 * draw.normal(size=base.shape)) for _ in range(8)]
    points = np.concatenate(near).astype(np.float32)
    order, gap = run(points, 60)
    assert run(np.ldexp(points, exponent), 60) == (order, np.ldexp(gap, exponent))


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_a_distant_mean_costs_no_precision(held, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BYTES", held)
    points = np.random.default_rng(3).normal(size=(200, 4)).astype(np.float32)
    far = (points.astype(np.float64) + 1000).astype(np.float32)
    assert run(far, 50)[0] == plain(far, 50)


def test_each_group_follows_its_own_mean(table, kept):
    selection = Herding(by_group="label").select(
        table, Budget("rows", 15), np.random.default_rng(0)
    )
    chosen = kept(selection)
    for group in (1, 2):
        mine = [c - 20 * group for c in chosen.tolist() if c // 20 == group]
        assert sorted(plain(table.points[20 * group :][:20], len(mine))) == mine
    assert len(chosen) == 15


def test_a_target_is_followed_and_length_may_not_count(table, ranked):
    aim = np.random.default_rng(9).normal(size=(6, 4)).astype(np.float32)
    aim[2] = np.nan
    table.target = ArrayVectors(aim)
    able = np.setdiff1d(np.arange(60), [3, 7])
    selection = Herding(metric="cosine").select(table, Budget("rows", 9), np.random.default_rng(0))
    units, aims = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (table.points[able].astype(np.float64), np.delete(aim, 2, 0).astype(np.float64))
    )
    assert ranked(selection).tolist() == able[plain(units, 9, aims.mean(axis=0))].tolist()


def test_tokens_are_filled_to_the_row_that_would_exceed_them(make_table, kept):
    tokens = np.random.default_rng(7).integers(1, 9, 40)
    table = make_table(np.zeros(40), tokens=pa.array(tokens, pa.int32()))
    points = np.random.default_rng(8).normal(size=(40, 3)).astype(np.float32)
    table.vectors, table.target = ArrayVectors(points), None
    chosen = kept(Herding().select(table, Budget("tokens", 50), np.random.default_rng(0)))
    assert 50 - 8 < tokens[chosen].sum() <= 50


@pytest.fixture
def clusters(make_table):
    """Rows of three well separated clusters of 30, 60 and 90, mixed up, and which each is of."""
    draw = np.random.default_rng(5)
    of = draw.permutation(np.repeat([0, 1, 2], [30, 60, 90]))
    table = make_table(np.zeros(180))
    points = draw.normal(size=(180, 4)) + 50 * np.eye(4)[of]
    table.vectors, table.target = ArrayVectors(points.astype(np.float32)), None
    return table, of


def test_cells_follow_their_own_means_in_proportion(clusters, ranked):
    table, of = clusters
    selection = Herding(cells=3).select(table, Budget("rows", 18), np.random.default_rng(0))
    order = ranked(selection)
    assert selection.params["used_cells"] == 3
    for cluster, picks in enumerate([3, 6, 9]):
        mine = np.flatnonzero(of == cluster)
        inside = plain(table.vectors.array[mine], picks)
        assert order[of[order] == cluster].tolist() == mine[inside].tolist()
    assert np.bincount(of[order[:6]]).tolist() == [1, 2, 3]  # in turn, so a prefix keeps shares


@pytest.mark.parametrize("picks", [18, 20])
def test_the_gap_in_cells_is_that_of_all_picks(clusters, kept, picks):
    """Of 18 picks every cell has its share; of 20 whole numbers move the mean, by more than 1."""
    table, _ = clusters
    selection = Herding(cells=3).select(table, Budget("rows", picks), np.random.default_rng(0))
    points = table.vectors.array.astype(np.float64)
    gap = np.linalg.norm(points[kept(selection)].mean(axis=0) - points.mean(axis=0))
    assert selection.params["mean_gap"] == pytest.approx(gap, abs=1e-5)
    assert (gap > 1) == (picks == 20)


def test_many_picks_are_searched_in_cells_that_fit_in_memory(clusters, kept, monkeypatch):
    table, _ = clusters
    monkeypatch.setattr(module, "EXACT_PICKS", 20)
    monkeypatch.setattr(module, "SMALL_BYTES", 40 * 16)
    few = Herding().select(table, Budget("rows", 20), np.random.default_rng(0))
    many = Herding().select(table, Budget("rows", 30), np.random.default_rng(0))
    assert few.params["used_cells"] == 1
    assert many.params["used_cells"] >= 6  # 40 rows each at most: 1 + 2 + 3 for three clusters
    assert len(kept(many)) == 30


def test_tokens_are_divided_among_cells(clusters, make_table, kept):
    table, of = clusters
    tokens = np.where(of == 2, 10, 1)
    table = make_table(np.zeros(180), tokens=pa.array(tokens, pa.int32()))
    table.vectors, table.target = clusters[0].vectors, None
    selection = Herding(cells=3).select(table, Budget("tokens", 99), np.random.default_rng(0))
    assert np.bincount(of[kept(selection)]).tolist() == [3, 6, 9]  # of 30, 60, 900 tokens


def test_cells_with_a_target_are_refused(clusters):
    table, _ = clusters
    table.target = table.vectors
    with pytest.raises(ValueError, match="no target's; leave one out"):
        Herding(cells=3).select(table, Budget("rows", 9), np.random.default_rng(0))
    assert Herding(cells=1).select(table, Budget("rows", 9), np.random.default_rng(0))


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric"):
        Herding(metric="dot")


def test_no_wider_copy_of_all_rows_is_made_even_where_all_are_equal(monkeypatch):
    """Rows that may be the nearest are compared in float64: of copies these are all rows."""
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    points = np.full((40_000, 64), 3, dtype=np.float32)  # 10 MB, 20 MB in float64
    points[::2, 0] = 1  # two kinds of rows, each half of them, so that all tie at the first pick
    tracemalloc.start()
    order, _ = run(points, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order == [0, 1, 2, 3]
    # Some 100 bytes a row are 4 MB, blocks of 4096 rows 1 and 2 MB.
    assert peak < 14e6
