"""A score table in memory, and the sort that every selector is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.protocol import Selection
from curate.selectors.vectors import ArrayVectors


@dataclass
class ArrowTable:
    """A Table over an Arrow table, cut into batches of `batch_rows`; counts its scans."""

    data: pa.Table
    batch_rows: int = 7
    scans: list[list[str]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.data.num_rows)

    @property
    def schema(self) -> pa.Schema:
        return self.data.schema

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self.scans.append(list(columns))
        yield from self.data.select(columns).to_batches(max_chunksize=self.batch_rows)


@pytest.fixture
def make_table() -> Callable[..., ArrowTable]:
    def make(
        scores: Sequence[float | None] | np.ndarray,
        *,
        errors: Sequence[int] = (),
        batch_rows: int = 7,
        shard_rows: int = 10,
        **columns: object,
    ) -> ArrowTable:
        n = len(scores)
        index = np.arange(n)
        error = [("broken" if i in set(errors) else None) for i in range(n)]
        named = {
            "shard": pa.array(index // shard_rows, pa.int32()),
            "row": pa.array(index % shard_rows, pa.int64()),
            "score": pa.array(scores, pa.float32()),
            **columns,
            "error": pa.array(error, pa.string()),
        }
        return ArrowTable(pa.table(named), batch_rows)

    return make


@pytest.fixture
def table(make_table: Callable[..., ArrowTable]) -> ArrowTable:
    """60 rows of three groups with `points` in four dimensions; 3 has an error, 7 no vector."""
    draw = np.random.default_rng(5)
    made = make_table(np.zeros(60), errors=[3], label=pa.array(np.repeat(["b", "a", "c"], 20)))
    made.points = draw.normal(size=(60, 4)).astype(np.float32)
    made.points[7] = np.nan
    made.vectors, made.target = ArrayVectors(made.points), None
    return made


@pytest.fixture
def kept() -> Callable[[Selection], np.ndarray]:
    """Return the positions in the table (10 rows a shard) that a selection holds, in its order."""

    def positions(selection: Selection, shard_rows: int = 10) -> np.ndarray:
        batches = list(selection.batches)
        if not batches:
            return np.empty(0, dtype=np.int64)
        table = pa.Table.from_batches(batches)
        return table["shard"].to_numpy().astype(np.int64) * shard_rows + table["row"].to_numpy()

    return positions


@pytest.fixture
def ranked() -> Callable[[Selection], np.ndarray]:
    """Return the positions that a selection holds in the order of their ranks."""

    def positions(selection: Selection, shard_rows: int = 10) -> np.ndarray:
        table = pa.Table.from_batches(list(selection.batches))
        place = table["shard"].to_numpy().astype(np.int64) * shard_rows + table["row"].to_numpy()
        rank = table["rank"].to_numpy()
        assert sorted(rank.tolist()) == list(range(len(rank)))
        return place[np.argsort(rank)]

    return positions
