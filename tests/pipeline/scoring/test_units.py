"""Units cover every row once, in corpus order."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from curate.pipeline.scoring.units import (
    MAX_UNIT_ROWS,
    Span,
    Unit,
    plan_units,
    planned_threads,
    read_units,
    rows_per_unit,
    write_units,
)
from curate.pipeline.storing.storage import Folder

SHARDS = st.lists(st.integers(0, 50), max_size=12)


@given(SHARDS, st.integers(1, 60))
def test_every_row_is_in_one_unit_in_corpus_order(shards: list[int], unit_rows: int) -> None:
    units = plan_units(shards, unit_rows)
    rows = [(s.shard, s.start + i) for u in units for s in u.spans for i in range(s.rows)]
    assert rows == [(shard, row) for shard, n in enumerate(shards) for row in range(n)]
    assert [u.number for u in units] == list(range(len(units)))
    assert all(0 < u.rows <= unit_rows for u in units)


@given(SHARDS, st.integers(1, 60))
def test_positions_lead_to_the_rows_of_the_unit(shards: list[int], unit_rows: int) -> None:
    for unit in plan_units(shards, unit_rows):
        places = [unit.locate(i) for i in range(unit.rows)]
        assert places == [(s.shard, s.start + i) for s in unit.spans for i in range(s.rows)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 60))
def test_neighbours_that_fit_into_one_unit_are_together(shards: list[int], unit_rows: int) -> None:
    whole = [u for u in plan_units(shards, unit_rows) if all(s.start == 0 for s in u.spans)]
    for a, b in pairwise(whole):
        is_neighbour = a.spans[-1].shard + 1 == b.spans[0].shard
        a_whole = a.spans[-1].rows == shards[a.spans[-1].shard]
        b_whole = b.spans[0].rows == shards[b.spans[0].shard]
        if is_neighbour and a_whole and b_whole:
            assert a.rows + b.spans[0].rows > unit_rows


def test_a_large_shard_is_cut_evenly() -> None:
    assert [u.rows for u in plan_units([103], 25)] == [20, 21, 20, 21, 21]


def test_the_plan_is_written_once(tmp_path: object) -> None:
    folder = Folder(str(tmp_path))
    units = plan_units([3, 4, 0, 100, 2], 30)
    assert planned_threads(folder) is None
    write_units(folder, units, threads=3)
    write_units(folder, plan_units([5], 5), threads=1)
    assert (read_units(folder), planned_threads(folder)) == (units, 3)


def test_units_of_a_long_run_last_two_minutes_and_of_a_short_one_less() -> None:
    assert rows_per_unit(10**7, 0.01) == 12_000
    assert rows_per_unit(10_000, 0.1) == 313  # 1000 s in 32 units
    assert rows_per_unit(100, 0.1) == 50  # never below 5 s
    assert rows_per_unit(10**9, 1e-9) == MAX_UNIT_ROWS


def test_a_unit_names_its_shards() -> None:
    assert Unit(3, (Span(1, 100, 100),)).describe(["a", "b"]) == "unit 3 (b rows 100-199)"
    assert Unit(0, (Span(0, 0, 1), Span(1, 0, 1))).describe(["a", "b"]) == "unit 0 (a to b)"
