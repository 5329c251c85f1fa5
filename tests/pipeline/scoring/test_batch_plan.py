"""Batches: every row once, under the budgets, the same for the same rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.pipeline.scoring.batch_plan import BatchPlan, window_rows

COSTS = st.lists(st.integers(0, 300), max_size=80).map(lambda c: np.array(c, dtype=np.int64))


@given(COSTS, st.integers(1, 20), st.integers(1, 1000), st.floats(0, 200))
def test_batches_hold_every_row_once_under_the_budgets(
    costs: np.ndarray, rows: int, tokens: int, row_bytes: float
) -> None:
    plan = BatchPlan(batch_rows=rows, batch_tokens=tokens, batch_bytes=1000)
    batches = plan.batches(costs, row_bytes)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(costs)))
    for batch in batches:
        assert 1 <= len(batch) <= rows
        if len(batch) > 1:
            assert costs[batch].max() * len(batch) <= tokens
            assert len(batch) * row_bytes <= 1000


@given(COSTS)
def test_padding_is_small_because_rows_are_sorted_by_length(costs: np.ndarray) -> None:
    order = np.concatenate([*BatchPlan(batch_rows=7).batches(costs, 1.0), np.zeros(0, int)])
    assert (np.diff(costs[order]) <= 0).all()


def test_rows_of_equal_length_stay_in_corpus_order() -> None:
    batches = BatchPlan(batch_rows=4).batches(np.ones(10, dtype=np.int64), 1.0)
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_row_over_budget_is_a_batch_of_its_own() -> None:
    batches = BatchPlan(batch_tokens=10).batches(np.array([50, 5, 5]), 1.0)
    assert [b.tolist() for b in batches] == [[0], [1, 2]]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_rows must be at least 1, got 0"):
        BatchPlan(batch_rows=0)


def test_windows_of_wide_rows_are_shorter():
    assert window_rows(4 * 3 * 32 * 32) == 2048  # small images, texts, tables
    assert window_rows(4 * 3 * 224 * 224) == 111  # 64 MiB of float32 images
    assert window_rows(0) == 2048 and window_rows(1 << 40) == 32
