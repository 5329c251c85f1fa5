"""CRAIG against greedy by brute force, the best subset, and what its weights must sum to."""

import itertools
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import craig as craig_module
from curate.selectors import craig_cells, craig_search
from curate.selectors.craig import Craig
from curate.selectors.craig_cells import in_cells
from curate.selectors.craig_search import represent
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

RNG = np.random.default_rng(0)


def distances(points):
    return np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)


def plain_greedy(points, k):
    """Facility location on max d - d, every gain computed anew."""
    similar = distances(points).max() - distances(points)
    picks, covered = [], np.zeros(len(points))
    for _ in range(k):
        gains = [
            np.maximum(similar[:, j], covered).sum() - covered.sum() for j in range(len(points))
        ]
        gains = [-1.0 if j in picks else gain for j, gain in enumerate(gains)]
        best = int(np.argmax(np.array(gains) >= max(gains) * (1 - 1e-9)))
        picks.append(best)
        covered = np.maximum(covered, similar[:, best])
    return picks, covered.sum()


def run(points, k):
    ones = np.ones(len(points), dtype=np.int64)
    found = represent(ArrayVectors(points.astype(np.float32)), ones, k)
    return found.picks, found.counts


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 4))
def test_it_is_facility_location_on_max_d_minus_d(seed, n, d):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32)
    k = int(draw.integers(1, n + 1))
    picks, counts = run(points, k)
    assert picks.tolist() == plain_greedy(points, k)[0]
    assert counts.sum() == n and (counts >= 1).all()
    nearest = distances(points)[:, picks].argmin(axis=1)
    assert counts.tolist() == np.bincount(nearest, minlength=k).tolist()


def test_it_keeps_the_bound_of_greedy_on_every_small_set():
    for seed in range(10):
        points = np.random.default_rng(seed).normal(size=(9, 2)).astype(np.float32)
        similar = distances(points).max() - distances(points)
        best = max(similar[:, s].max(axis=1).sum() for s in itertools.combinations(range(9), 3))
        picks, _ = run(points, 3)
        assert similar[:, picks].max(axis=1).sum() >= (1 - 1 / np.e) * best


def test_computing_distances_again_changes_nothing(monkeypatch):
    points = np.random.default_rng(1).normal(size=(200, 5)).astype(np.float32)
    held = run(points, 60)
    monkeypatch.setattr(craig_search, "HELD_BYTES", 0)
    again = run(points, 60)
    assert held[0].tolist() == again[0].tolist() and held[1].tolist() == again[1].tolist()


def test_copies_are_counted_by_one_of_them_and_a_pick_counts_itself():
    points = np.array([[0.0], [0], [0], [5], [5]])
    picks, counts = run(points, 2)
    assert picks.tolist() == [0, 3] and counts.tolist() == [3, 2]
    picks, counts = run(points, 5)
    assert sorted(picks.tolist()) == [0, 1, 2, 3, 4] and counts.tolist() == [1] * 5


@pytest.mark.parametrize("held_bytes", [0, craig_search.HELD_BYTES])
def test_copies_save_nothing_whatever_rounding_says_of_their_distance(monkeypatch, held_bytes):
    monkeypatch.setattr(craig_search, "HELD_BYTES", held_bytes)
    for seed in range(4):
        draw = np.random.default_rng(seed)
        of = draw.permutation(np.concatenate([np.arange(60), draw.integers(0, 60, 240)]))
        picks, counts = run((3 * draw.normal(size=(60, 37)) + 5)[of], 90)
        assert sorted(of[picks[:60]].tolist()) == list(range(60))
        others = np.setdiff1d(np.arange(300), picks[:60])
        assert picks[60:].tolist() == others[:30].tolist()  # in the order of the table
        left = np.bincount(of, minlength=60) - np.bincount(of[others[:30]], minlength=60)
        assert counts.tolist() == [*left[of[picks[:60]]].tolist(), *[1] * 30]


def test_order_of_rows_only_moves_the_picks():
    points = np.random.default_rng(2).normal(size=(40, 3))
    shuffle = np.random.default_rng(3).permutation(40)
    # Five rows of 40: late picks are one of a pair that save each other alone, a tie by order.
    picks, counts = run(points, 5)
    moved, their = run(points[shuffle], 5)
    assert shuffle[moved].tolist() == picks.tolist() and their.tolist() == counts.tolist()


def with_vectors(make_table, points, **columns):
    table = make_table(np.zeros(len(points)), **columns)
    table.vectors, table.target = ArrayVectors(points.astype(np.float32)), None
    return table


def test_weights_of_each_class_add_up_to_its_rows(make_table, kept):
    """ALGORITHMS section 7: DeepCore's weights begin at 1 and add up to n_c + |S|."""
    points = np.random.default_rng(5).normal(size=(60, 4))
    label = np.array([0] * 30 + [1] * 20 + [2] * 10)
    table = with_vectors(make_table, points, errors=[3], label=pa.array(label))
    selection = Craig(by_group="label").select(table, Budget("rows", 12), RNG)
    batches = pa.Table.from_batches(list(selection.batches))
    place = batches["shard"].to_numpy() * 10 + batches["row"].to_numpy()
    weight = batches["weight"].to_numpy()
    assert selection.params["weight_kind"] == "loss"
    for value, rows in ((0, 29), (1, 20), (2, 10)):
        assert weight[label[place] == value].sum() == rows
    assert [int((label[place] == v).sum()) for v in range(3)] == [6, 4, 2]


def test_smaller_budgets_nest_without_groups(make_table, ranked):
    points = np.random.default_rng(6).normal(size=(50, 4))
    table = with_vectors(make_table, points)
    few, many = (ranked(Craig().select(table, Budget("rows", k), RNG)).tolist() for k in (5, 20))
    assert many[:5] == few


def test_tokens_end_before_the_row_that_exceeds_them(make_table, kept):
    points = np.array([[0.0], [1], [10], [20]])
    table = with_vectors(make_table, points, tokens=pa.array([3, 3, 3, 3], pa.int32()))
    assert len(kept(Craig().select(table, Budget("tokens", 8), RNG))) == 2
    with pytest.raises(ValueError, match="13 tokens is more than the 12"):
        Craig().select(table, Budget("tokens", 13), RNG)


def greedy_in_cells(points, cells, sizes, amount):
    """Plain greedy on distances that are the largest possible between cells, from their matrix."""
    far = 2 * np.linalg.norm(points - points.mean(axis=0), axis=1).max()
    away = np.full((len(points), len(points)), far)
    for cell in cells:
        away[np.ix_(cell, cell)] = distances(points)[np.ix_(cell, cell)]
    picks, nearest = [], np.full(len(points), far)
    while len(picks) < len(points):
        saved = np.maximum(nearest[:, None] - away, 0).sum(axis=0)
        saved[picks] = -1
        best = int(np.argmax(saved))
        if sizes[picks].sum() + sizes[best] > amount:
            break
        picks.append(best)
        nearest = np.minimum(nearest, away[:, best])
    counts, true = np.zeros(len(picks), dtype=int), distances(points)[:, picks]
    for i in range(len(points)):
        is_served = bool((away[i, picks] < far).any())
        counts[int(np.argmin(away[i, picks] if is_served else true[i]))] += 1
    return picks, counts, nearest.sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by_tokens", [False, True])
def test_in_cells_it_is_greedy_where_rows_of_other_cells_are_far(seed, by_tokens):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(40, 3)).astype(np.float32)
    sizes = draw.integers(1, 6, 40) if by_tokens else np.ones(40, dtype=np.int64)
    # A last cell of one row far out: it often gets no pick, and another cell's pick counts it.
    cells = [np.sort(c) for c in np.split(draw.permutation(40), [18, 39])]
    for amount in (5, 9, 31) if by_tokens else (1, 2, 7, 20):
        picks, counts = in_cells(ArrayVectors(points), cells, sizes, amount)
        wanted, served, objective = greedy_in_cells(points.astype(np.float64), cells, sizes, amount)
        # Late picks save each other alone, two by two, and either comes first: none is late here.
        assert picks.tolist() == wanted
        assert counts.tolist() == served.tolist()
        assert counts.sum() == 40
        assert distances(points)[:, picks].min(axis=1).sum() <= objective + 1e-9


def test_cells_do_not_depend_on_the_scale_of_the_vectors(make_table, ranked):
    """k-means squares distances in float32: of 2^-80 they are 0, of 2^80 infinite."""
    pytest.importorskip("faiss")
    points = np.random.default_rng(9).normal(size=(60, 4)).astype(np.float32)
    found = []
    for exponent in (0, -80, 80):
        table = with_vectors(make_table, np.ldexp(points, exponent))
        selection = Craig(cells=3).select(table, Budget("rows", 12), np.random.default_rng(0))
        assert selection.params["used_cells"] == 3
        found.append(ranked(selection).tolist())
    assert found[0] == found[1] == found[2]


def test_more_rows_than_can_be_compared_are_cut_into_cells_in_bounded_memory(
    make_table, monkeypatch
):
    pytest.importorskip("faiss")
    draw = np.random.default_rng(8)
    points = (draw.normal(size=(4000, 8)) + 6 * np.eye(8)[draw.integers(0, 8, 4000)]).astype("f4")
    table = with_vectors(make_table, points)
    table.batch_rows = 1000
    for name, rows in (("EXACT_ROWS", 1000), ("CELL_ROWS", 256)):
        monkeypatch.setattr(craig_module, name, rows)
    tracemalloc.start()
    selection = Craig().select(table, Budget("rows", 60), np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All distances are 128 MB; a cell's 0.5 MB, blocks of 256 x 4096 products some 10 MB.
    assert peak < 40e6
    weight = pa.Table.from_batches(list(selection.batches))["weight"].to_numpy()
    assert selection.params["used_cells"] >= 16
    assert len(weight) == 60 and weight.sum() == 4000 and weight.min() >= 1
    exact = Craig(cells=1).select(table, Budget("rows", 60), np.random.default_rng(0))
    assert exact.params["used_cells"] == 1
    with pytest.raises(ValueError, match="cells must be a count"):
        Craig(cells=0)
    assert craig_cells.CELL_ROWS**2 * 8 <= craig_search.HELD_BYTES
