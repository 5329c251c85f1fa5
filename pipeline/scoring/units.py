"""Units of work: what is leased, committed, resumed and quarantined.

A unit is a shard, a range of rows of a large shard, or several tiny shards in a row. The plan is
made once per run and written down; order comes from it, never from file names.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from curate.pipeline.scoring.score_table import UNITS, parquet_bytes
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

UNIT_SECONDS = 120.0
"""A unit of a long run; shorter runs get shorter units, so that a kill never costs much."""
MIN_UNIT_SECONDS = 5.0
UNITS_PER_RUN = 32
"""What a run is cut into before the two limits above."""
MAX_UNIT_ROWS = 1_000_000
"""Bounds a worker's memory: a unit's scores are held until they are committed."""
THREADS = b"threads"
"""Key of the plan's metadata."""
UNIT_FIELDS = [
    ("unit", pa.int32()),
    ("shard", pa.int32()),
    ("row_start", pa.int64()),
    ("rows", pa.int64()),
]


@dataclass(frozen=True)
class Span:
    """Rows [start, start + rows) of a shard."""

    shard: int
    start: int
    rows: int


@dataclass(frozen=True)
class Unit:
    """Spans in corpus order. A row's position in the unit counts through them."""

    number: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row) of a position."""
        for span in self.spans:
            if position < span.rows:
                return span.shard, span.start + position
            position -= span.rows
        raise IndexError(f"unit {self.number} has no position {position}")

    def describe(self, shard_paths: Sequence[str]) -> str:
        """Return the unit's name for people: `unit 3 (b.parquet rows 100-199)`."""
        first, last = self.spans[0], self.spans[-1]
        if len(self.spans) > 1:
            where = f"{shard_paths[first.shard]} to {shard_paths[last.shard]}"
        else:
            stop = first.start + first.rows - 1
            where = f"{shard_paths[first.shard]} rows {first.start}-{stop}"
        return f"unit {self.number} ({where})"


def rows_per_unit(rows: int, seconds_per_row: float) -> int:
    """Return how many rows a unit should have, from an estimate of what a row costs.

    The estimate must be a function of the configuration alone, never of a measurement: two runs
    of one command plan the same units.
    """
    total_s = rows * seconds_per_row
    unit_s = min(max(total_s / UNITS_PER_RUN, MIN_UNIT_SECONDS), UNIT_SECONDS)
    return max(1, min(MAX_UNIT_ROWS, math.ceil(unit_s / seconds_per_row)))


def plan_units(shard_rows: Sequence[int], unit_rows: int) -> list[Unit]:
    """Return units of about `unit_rows` rows that cover every row once, in corpus order.

    A shard larger than that is cut into nearly equal ranges; smaller shards are gathered while
    they fit together. Empty shards are in no unit.
    """
    assert unit_rows > 0, "a unit has at least one row"
    return [Unit(number, spans) for number, spans in enumerate(_spans(shard_rows, unit_rows))]


def write_units(folder: Folder, units: Sequence[Unit], threads: int) -> None:
    """Write the plan unless there is one: it never changes within a run.

    With it goes how many threads sums are divided among: a run that goes on elsewhere, where there
    are more or fewer, is to round as it began.
    """
    lines = [(u.number, s.shard, s.start, s.rows) for u in units for s in u.spans]
    columns = [list(column) for column in zip(*lines, strict=True)]
    table = pa.table(columns, schema=pa.schema(UNIT_FIELDS))
    folder.create(UNITS, parquet_bytes(table, {THREADS: str(threads).encode()}))


def planned_threads(folder: Folder) -> int | None:
    """Return the threads that the run began with; None where no plan says so."""
    if not folder.exists(UNITS):
        return None
    with open_parquet(folder, UNITS) as file:
        said = (file.schema_arrow.metadata or {}).get(THREADS)
    return None if said is None else int(said)


def read_units(folder: Folder) -> list[Unit]:
    """Return the plan of a run."""
    with open_parquet(folder, UNITS) as file:
        table = file.read(use_threads=False)
    spans: dict[int, list[Span]] = {}
    for unit, *span in zip(*(column.to_pylist() for column in table.columns), strict=True):
        spans.setdefault(unit, []).append(Span(*span))
    return [Unit(number, tuple(spans[number])) for number in sorted(spans)]


def _spans(shard_rows: Sequence[int], unit_rows: int) -> Iterator[tuple[Span, ...]]:
    gathered: list[Span] = []
    for shard, rows in enumerate(shard_rows):
        if gathered and sum(s.rows for s in gathered) + rows > unit_rows:
            yield tuple(gathered)
            gathered = []
        if rows > unit_rows:
            pieces = math.ceil(rows / unit_rows)
            edges = [rows * i // pieces for i in range(pieces + 1)]
            for start, stop in itertools.pairwise(edges):
                yield (Span(shard, start, stop - start),)
        elif rows:
            gathered.append(Span(shard, 0, rows))
    if gathered:
        yield tuple(gathered)
