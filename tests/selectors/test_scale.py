"""Selecting from tables larger than memory: what is held, how often the table is read."""

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors import ranks
from curate.selectors.composite import Composite
from curate.selectors.expression import Expression
from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

BATCH = 65_536


@dataclass
class SyntheticTable:
    """Scores computed batch by batch from the row number; `levels` distinct ones if given."""

    rows: int
    levels: int | None = None
    scans: list[list[str]] = field(default_factory=list)

    schema = pa.schema(
        [("shard", pa.int32()), ("row", pa.int64()), ("score", pa.float32()), ("label", pa.int64())]
    )

    def scores(self, row: np.ndarray) -> np.ndarray:
        hashed = (row * 2654435761 + 12345) % 4294967291 / 4294967291
        hashed = hashed if self.levels is None else np.floor(hashed * self.levels)
        return hashed.astype(np.float32)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self.scans.append(list(columns))
        for start in range(0, self.rows, BATCH):
            row = np.arange(start, min(start + BATCH, self.rows))
            columns_of = {
                "shard": pa.array(np.zeros(len(row), np.int32)),
                "row": pa.array(row),
                "score": pa.array(self.scores(row)),
                "label": pa.array(row % 10),
            }
            yield pa.record_batch({name: columns_of[name] for name in columns})


def run(table, selector, budget):
    """Return kept rows, ranks, and the peak of numpy and Arrow memory in bytes."""
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    rows, rank, peak_arrow = [], [], 0
    tracemalloc.start()
    for batch in selector.select(table, budget, np.random.default_rng(0)).batches:
        rows.append(np.packbits(batch.column(1).to_numpy() % 2))  # touch, do not hold
        rank.append(batch.column(3).null_count)
        peak_arrow = max(peak_arrow, pool.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak + peak_arrow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "most_scans"),
    [
        ("top", {"by": "score"}, 3),
        ("random", {}, 3),
        ("balanced", {"by": "score", "by_group": "label"}, 3),
        ("threshold", {"by": "score", "at_least": 0.5}, 3),
        ("stratified", {"by": "score", "strata": 10}, 4),
        ("stratified", {"by": "score", "edges": "quantile", "strata": 10}, 5),
        ("ccs", {"by": "score", "drop_top": 0.1, "strata": 10}, 6),
        ("moderate", {"by": "score"}, 3),
        ("top", {"by": "score", "by_group": "label", "min_shares": 0.05}, 5),
        ("importance", {"by": "score"}, 4),
        ("importance", {"by": "score", "replacement": True}, 4),
        ("softmax", {"by": "score"}, 4),
    ],
)
def test_five_million_rows_in_a_few_scans_and_little_memory(name, params, most_scans):
    table = SyntheticTable(5_000_000)
    selector = make_selector(name, ranked=False, **params)
    peak = run(table, selector, Budget("fraction", 0.3))
    assert len(table.scans) <= most_scans
    # Hashed keys fill all 65 536 bins of every group; 24 bytes each, a few times while merging.
    # One float per row would be 20 MB, the three columns 80 MB.
    limit = 90e6 if name in ("stratified", "ccs") else 45e6
    assert peak < limit, f"{peak / 1e6:.0f} MB"


@pytest.mark.slow
def test_a_composite_of_five_million_rows_stays_in_bounds():
    text = "rank(score) + 0.1*z(label)"
    source = SyntheticTable(5_000_000)
    table = Composite(source, Expression(text))
    peak = run(table, make_selector("top", by=text, ranked=False), Budget("fraction", 0.3))
    assert len(source.scans) <= 4
    # Blocks of 2 million keys with their places, about 60 bytes each, whatever the rows.
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.slow
def test_half_of_five_million_rows_are_the_highest_exactly():
    table = SyntheticTable(5_000_000)
    top = make_selector("top", by="score", ranked=False)
    batches = top.select(table, Budget("fraction", 0.5), np.random.default_rng(0)).batches
    kept = np.concatenate([batch.column(1).to_numpy() for batch in batches])
    scores = table.scores(np.arange(table.rows))
    expected = np.sort(np.argsort(-scores, kind="stable")[: len(kept)])
    assert len(kept) == 2_500_000
    assert np.array_equal(kept, expected)


@pytest.mark.parametrize("levels", [None, 3, 1])
def test_ranks_sorted_on_disk_are_those_of_a_stable_sort(monkeypatch, levels):
    # Small limits: many buckets, bins larger than a block (equal scores), blocks of ranks.
    monkeypatch.setattr(ranks, "MEMORY_ROWS", 1000)
    monkeypatch.setattr(ranks, "BLOCK_ROWS", 4096)
    table = SyntheticTable(150_000, levels)
    top = make_selector("top", by="score")
    batches = list(top.select(table, Budget("rows", 100_000), np.random.default_rng(0)).batches)
    rows = pa.Table.from_batches(batches)
    scores = table.scores(np.arange(table.rows))
    expected = np.argsort(-scores, kind="stable")[:100_000]
    by_rank = rows["row"].to_numpy()[np.argsort(rows["rank"].to_numpy())]
    assert np.array_equal(by_rank, expected)
    assert len(table.scans) <= 3
