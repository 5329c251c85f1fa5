"""D² pruning against message passing written out, its limits, and two far clusters."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import d2 as module
from curate.selectors.d2 import D2, passed
from curate.selectors.near_rows import near_rows
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

pytest.importorskip("faiss")

RNG = np.random.default_rng(0)


def written_out(points, score, k, gamma, budget):
    """The whole distance matrix, and every value looked at for every pick."""
    away = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    np.fill_diagonal(away, np.inf)
    near = np.argsort(away, axis=1, kind="stable")[:, :k]
    value = score.astype(np.float64).copy()
    for i in range(len(score)):
        value[i] += sum(np.exp(-away[i, j]) * score[j] for j in near[i])
    first, picks = value.copy(), []
    while len(picks) < budget:
        best = max((i for i in range(len(score)) if i not in picks), key=lambda i: value[i])
        picks.append(best)
        for j in near[best]:
            value[j] -= np.exp(-gamma * away[best, j]) * value[best]
    return first, picks


def run(points, score, k, gamma, budget):
    vectors = ArrayVectors(np.float32(points))
    graph = near_rows(vectors, k)
    ones = np.ones(len(points), dtype=np.int64)
    return passed(np.asarray(score, float), graph.near, graph.away, gamma, ones, budget).tolist()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5), st.floats(0, 3))
def test_it_is_message_passing(seed, n, k, gamma):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, 3)).astype(np.float32)
    score = draw.normal(size=n)  # of both signs: a negative value raises its neighbours
    k = min(k, n - 1)
    assert run(points, score, k, gamma, n) == written_out(points, score, k, gamma, n)[1]


LARGEST = float(np.finfo(np.float32).max)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(0, 4),
    st.sampled_from([0, 0.5, 2.0]),
    st.booleans(),
)
def test_the_order_is_that_of_looking_at_all_values(seed, n, k, gamma, are_whole):
    """Whole scores at distances of 0 or past all: many ties, of both signs; or no ties at all."""
    draw = np.random.default_rng(seed)
    k = min(k, n - 1)
    others = [draw.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)]
    near = np.array(others, dtype=np.int32).reshape(n, k)
    if are_whole:
        score, away = draw.integers(-3, 4, n).astype(float), draw.choice([0, LARGEST], (n, k))
    else:
        score, away = draw.normal(size=n), draw.exponential(size=(n, k))
    missing = draw.random((n, k)) < 0.2
    near[missing] = np.nonzero(missing)[0]
    away = np.where(missing, LARGEST, away).astype(np.float32)
    sizes = draw.integers(1, 5, n)
    amount = int(draw.integers(0, sizes.sum() + 1))

    value = [
        score[i]
        + sum((np.exp(-float(d)) * score[j] for j, d in zip(near[i], away[i], strict=True)), 0.0)
        for i in range(n)
    ]
    left, wanted = amount, []
    for _ in range(n):
        best = max((i for i in range(n) if i not in wanted), key=lambda i: value[i])
        if sizes[best] > left:
            break
        left -= sizes[best]
        wanted.append(best)
        for j, d in zip(near[best], away[best], strict=True):
            if j != best:
                value[j] -= np.exp(-gamma * float(d)) * value[best]
    assert passed(score, near, away, gamma, sizes, amount).tolist() == wanted


def test_a_large_gamma_keeps_the_top_of_the_diffused_score():
    draw = np.random.default_rng(1)
    points, score = draw.normal(size=(50, 4)), draw.random(50)
    first, _ = written_out(np.float32(points), score, 5, 0.1, 0)
    assert run(points, score, 5, 1e6, 20) == np.argsort(-first)[:20].tolist()


def test_two_far_clusters_take_turns():
    draw = np.random.default_rng(2)
    points = np.vstack([draw.normal(size=(6, 2)), 100 + draw.normal(size=(6, 2))]) * 0.01
    points[6:] += 100
    picks = run(points, np.ones(12), 5, 0.1, 8)
    # A pick takes nearly all value from its cluster, so that the next is of the other one.
    of = [int(i >= 6) for i in picks]
    assert of[0] != of[1] and of[2] != of[3] and of[4] != of[5]
    assert run(points, np.ones(12), 5, 50.0, 3) != picks[:3]


@pytest.fixture
def table(make_table):
    draw = np.random.default_rng(3)
    made = make_table(draw.random(40), errors=[7], label=pa.array(np.arange(40) % 2))
    made.vectors, made.target = ArrayVectors(draw.normal(size=(40, 3))), None
    return made


def test_the_low_end_counts_from_the_largest_score(table, ranked):
    score = table.data["score"].to_numpy().astype(np.float64)
    able = np.array([i for i in range(40) if i != 7])
    picks = run(table.vectors.array[able], score[able].max() - score[able], 5, 0.1, 11)
    found = ranked(D2("score", direction="low").select(table, Budget("rows", 11), RNG))
    assert found.tolist() == able[picks].tolist()


def test_groups_have_graphs_of_their_own(table, kept):
    score = table.data["score"].to_numpy().astype(np.float64)
    found = kept(D2("score", by_group="label").select(table, Budget("rows", 10), RNG)).tolist()
    wanted = []
    for value in (0, 1):
        able = np.array([i for i in range(value, 40, 2) if i != 7])
        wanted += able[run(table.vectors.array[able], score[able], 5, 0.1, 5)].tolist()
    assert found == sorted(wanted)


def test_wrong_settings_are_refused(table, make_table):
    for settings_, said in (
        ({"direction": "up"}, "direction must be"),
        ({"neighbors": 0}, "neighbors must be"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"cells": 0}, "cells must be"),
        ({"probes": 0}, "probes must be"),
    ):
        with pytest.raises(ValueError, match=said):
            D2("score", **settings_)
    infinite = make_table([1.0, np.inf])
    infinite.vectors, infinite.target = ArrayVectors(np.eye(2)), None
    with pytest.raises(ValueError, match="infinite in some rows"):
        D2("score").select(infinite, Budget("rows", 1), RNG)


def test_many_rows_are_cut_into_cells(table, ranked, monkeypatch):
    exact = D2("score", neighbors=3).select(table, Budget("rows", 11), RNG)
    assert exact.params == {"used_cells": 1, "recall": 1.0, "stretch": 1.0}
    cut = D2("score", neighbors=3, cells=4).select(table, Budget("rows", 11), RNG)
    assert ranked(cut).tolist() == ranked(exact).tolist()  # who looks in 8 cells of 4 looks in all
    monkeypatch.setattr(module, "EXACT_ROWS", 30)
    monkeypatch.setattr(module, "CELL_ROWS", 8)
    cut = D2("score", neighbors=3, probes=1).select(table, Budget("rows", 11), RNG).params
    assert cut["used_cells"] >= 4 and 0 < cut["recall"] < 1 < cut["stretch"]
    grouped = D2("score", neighbors=3, probes=1, by_group="label")
    assert grouped.select(table, Budget("rows", 11), RNG).params["used_cells"] == 1
