"""The order of a table's candidates, against a plain sort of all rows.

Shapes: N rows, G groups.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.ordering import Exclusion, First, Ordering, one_group
from curate.selectors.score_keys import UNSCORED, score_column, sort_keys

NAN = float("nan")
SCORES = [3.0, NAN, 1.0, 2.0, 1.0, None, 0.0, 1.0, 2.0, 1.0, 5.0, 1.0]
GROUPS = [0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]
TOKENS = [4, 1, 3, 2, 2, 9, 5, 3, 1, 2, 7, 1]
N = len(SCORES)


def keys(batch: pa.RecordBatch) -> np.ndarray:
    return sort_keys(score_column(batch, "score"), "low")


def by_group() -> Callable[[pa.RecordBatch], np.ndarray]:
    return lambda batch: batch.column("group").to_numpy()


@pytest.fixture(params=[1, 5, 100])
def table(make_table, request) -> Any:
    group, tokens = pa.array(GROUPS, pa.int64()), pa.array([*TOKENS[:-1], None], pa.int32())
    return make_table(SCORES, errors=[3], batch_rows=request.param, group=group, tokens=tokens)


def ordering(table: Any, **more: Any) -> Ordering:
    return Ordering(table, frozenset({"score"}), keys, **more)


def places(order: Ordering, carry: tuple[str, ...] = ()) -> list[int]:
    """Return the candidates' places in the table (10 rows a shard)."""
    return in_front(order, First(np.full(2, UNSCORED, dtype=np.uint32), np.full(2, N)), carry)


def test_rows_with_errors_and_without_scores_are_no_candidates(table) -> None:
    assert places(ordering(table)) == [0, 2, 4, 6, 7, 8, 9, 10, 11]
    assert places(ordering(table, include_errors=True)) == list(range(N))
    passes = ordering(table, passes=lambda batch: batch.column("row").to_numpy() % 2 == 0)
    assert places(passes) == [0, 2, 4, 6, 8, 10]


def test_only_what_is_needed_is_read(table) -> None:
    list(ordering(table).scan(carry=("group",)))
    assert table.scans[-1] == ["shard", "row", "score", "group", "error"]
    list(ordering(table, by_tokens=True).scan())
    assert table.scans[-1] == ["shard", "row", "score", "tokens", "error"]


def test_sizes_are_rows_or_tokens(table) -> None:
    (batch,) = table.data.combine_chunks().to_batches()
    assert ordering(table).sizes(batch).tolist() == [1] * N
    assert ordering(table, by_tokens=True).sizes(batch).tolist() == [*TOKENS[:-1], 0]


def in_front(order: Ordering, front: First, carry: tuple[str, ...] = ()) -> list[int]:
    inside, found = front.mask(), []
    for rows in order.scan(carry):
        rows = rows.where(inside(rows))
        shard, row = (rows.batch[name].to_numpy() for name in ("shard", "row"))
        found += (shard * 10 + row).tolist()
    return found


def key_of(*scores: float) -> np.ndarray:
    return sort_keys(np.array(scores, dtype=np.float32), "low")


@pytest.mark.parametrize("ties", range(7))
def test_equal_rows_are_taken_in_corpus_order(table, ties) -> None:
    """Those below 1 are in, and the first `ties` of the five of score 1."""
    front = First(key_of(1.0), np.array([ties]))
    assert in_front(ordering(table), front) == sorted([6, *[2, 4, 7, 9, 11][:ties]])


def test_each_group_has_a_front_of_its_own(table) -> None:
    front = First(key_of(1.0, 2.0), np.array([2, 0]))
    grouped = Ordering(table, frozenset({"score", "group"}), keys, by_group)
    assert in_front(grouped, front) == [2, 4, 6, 7, 9]


@pytest.mark.parametrize(
    ("most", "expected"), [(2, []), (3, [2]), (4, [2]), (5, [2, 4]), (7, [2, 4]), (8, [2, 4, 7])]
)
def test_equal_rows_are_taken_until_one_would_exceed_the_tokens(table, most, expected) -> None:
    """Of 3, 2, 3, 2 and 0 tokens; nothing comes after the first that did not fit."""
    front = First(key_of(1.0), np.array([most]))
    found = in_front(ordering(table, by_tokens=True), front)
    assert found == sorted([*expected, 6])


def test_rows_are_left_out_by_an_order_that_need_not_be_theirs(table) -> None:
    def high(batch: pa.RecordBatch) -> np.ndarray:
        return sort_keys(score_column(batch, "score"), "high")

    top = sort_keys(np.array([2.0], dtype=np.float32), "high")
    order = ordering(table)
    largest = Exclusion(First(top, np.array([1])), Ordering(table, frozenset({"score"}), high))
    rest = order.but(largest)
    assert places(rest) == [2, 4, 6, 7, 9, 11]  # without 10, 0 and the first of score 2: 8
    smallest = Exclusion(First(key_of(1.0), np.array([2])), order)
    both = rest.but(smallest)
    assert places(both) == [7, 9, 11]
    assert places(order) == [0, 2, 4, 6, 7, 8, 9, 10, 11]  # as it was


def test_one_group_holds_all_rows(table) -> None:
    (batch,) = table.data.combine_chunks().to_batches()
    assert one_group()(batch).tolist() == [0] * N
