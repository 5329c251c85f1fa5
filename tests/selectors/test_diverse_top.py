"""Maximal marginal relevance against every value computed anew, and its two ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from curate.selectors import farthest
from curate.selectors.diverse_top import DiverseTop, marginal
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

RNG = np.random.default_rng(0)


def cosines(points):
    wide = np.float32(points).astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    wide = wide / np.where(lengths > 0, lengths, 1)
    return wide @ wide.T


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0, 1), st.sampled_from([2, 5, 1024]))
def test_every_row_has_the_largest_marginal_worth(seed, n, trade, block):
    draw = np.random.default_rng(seed)
    points, score = draw.normal(size=(n, 4)), draw.random(n).round(1)
    points[draw.random(n) < 0.1] = 0
    worth, near = rankdata(score) / n, cosines(points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farthest, "BLOCK_ROWS", block)
        patch.setattr(farthest, "CENTRES", 3)
        order = marginal(ArrayVectors(points), worth, trade, np.ones(n, dtype=np.int64), n).tolist()
    assert sorted(order) == list(range(n))
    for at, row in enumerate(order):
        repeats = near[:, order[:at]].max(axis=1) if at else np.zeros(n)
        value = trade * worth - (1 - trade) * repeats
        value[order[:at]] = -np.inf
        assert value[row] >= value.max() - 1e-6  # cosines of float32 vectors


def test_rows_that_cannot_be_next_are_not_read():
    class Counted(ArrayVectors):
        read = 0

        def take(self, numbers):
            self.read += len(numbers)
            return super().take(numbers)

    draw = np.random.default_rng(1)
    n = 20 * farthest.BLOCK_ROWS
    vectors, worth = Counted(draw.normal(size=(n, 8))), draw.permutation(n) / n
    marginal(vectors, worth, 0.7, np.ones(n, dtype=np.int64), 30)
    assert vectors.read < 30 * n / 4  # a pass for each row would be 30 n


@pytest.fixture
def table(make_table):
    draw = np.random.default_rng(3)
    made = make_table(draw.random(40), errors=[7])
    made.vectors, made.target = ArrayVectors(draw.normal(size=(40, 3))), None
    return made


@pytest.mark.parametrize("direction", ["high", "low"])
def test_a_trade_of_one_is_the_top_of_the_score(table, ranked, direction):
    score = table.data["score"].to_numpy() * (1 if direction == "high" else -1)
    wanted = [i for i in np.argsort(-score, kind="stable").tolist() if i != 7][:9]
    method = DiverseTop("score", direction=direction, trade=1.0)
    assert ranked(method.select(table, Budget("rows", 9), RNG)).tolist() == wanted


def test_a_trade_of_zero_spreads_out_from_the_best_row(make_table, ranked):
    table = make_table([0.1, 0.9, 0.8, 0.2])
    table.vectors = ArrayVectors(np.array([[0.1, 1], [1, 0.0], [1, 0.05], [-1, 0.2]]))
    table.target = None
    found = ranked(DiverseTop("score", trade=0.0).select(table, Budget("rows", 4), RNG))
    assert found.tolist() == [1, 3, 0, 2]


def test_copies_of_the_best_row_come_late(make_table, ranked):
    table = make_table([1.0, 0.99, 0.98, 0.5, 0.4])
    table.vectors = ArrayVectors(np.array([[1, 0], [1, 0], [1, 0], [0, 1], [-1, 0]]))
    table.target = None
    found = ranked(DiverseTop("score", trade=0.5).select(table, Budget("rows", 3), RNG))
    assert found.tolist() == [0, 4, 3]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="trade must be"):
        DiverseTop("score", trade=1.5)
    with pytest.raises(ValueError, match="direction must be"):
        DiverseTop("score", direction="up")
