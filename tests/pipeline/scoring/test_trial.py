"""Halving finds the rows that kill, whatever they are."""

from hypothesis import given
from hypothesis import strategies as st

from curate.pipeline.scoring.trial import _isolate


@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=6))
def test_every_row_that_kills_is_found_and_no_other(n: int, lethal: set[int]) -> None:
    rows = list(range(n))
    asked: list[list[int]] = []

    def survives(group: list[int]) -> str | None:
        asked.append(group)
        return "dead" if lethal & set(group) else None

    groups = _isolate(survives, rows)
    assert sorted(row for group, _ in groups for row in group) == rows
    assert {row for group, reason in groups if reason for row in group} == lethal & set(rows)
    assert all(len(group) == 1 for group, reason in groups if reason)
    assert all(not lethal & set(group) for group, reason in groups if reason is None)


def test_rows_that_kill_only_together_come_apart() -> None:
    groups = _isolate(lambda g: "dead" if {1, 6} <= set(g) else None, list(range(8)))
    assert groups == [([0, 1, 2, 3], None), ([4, 5, 6, 7], None)]
