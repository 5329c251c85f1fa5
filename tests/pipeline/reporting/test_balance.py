"""Class counts against a dictionary, however table and manifest are cut into batches."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.reporting.balance import KeptRows, class_counts, row_keys, shares

Rows = list[tuple[int, int]]


def batches(rows: Rows, size: int, labels: list[str | None] | None = None) -> list[pa.RecordBatch]:
    columns = {
        "shard": pa.array([s for s, _ in rows], pa.int32()),
        "row": pa.array([r for _, r in rows], pa.int64()),
    }
    if labels is not None:
        columns["label"] = pa.array(labels, pa.string())
    return pa.table(columns).to_batches(max_chunksize=size)


class Rowed:
    """Stands for a manifest or a score table: hands out batches."""

    def __init__(self, given: list[pa.RecordBatch]) -> None:
        self.given = given

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        return (batch.select(columns) for batch in self.given)

    scan = batches


corpus = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=80, unique=True
).map(sorted)


@settings(max_examples=80, deadline=None)
@given(corpus, st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_counts_are_those_of_a_dictionary(
    rows: Rows, table_batch: int, manifest_batch: int, random: np.random.Generator
) -> None:
    labels = [random.choice(["a", "b", None]) for _ in rows]
    kept = [row for row in rows if random.random() < 0.4]
    table = Rowed(batches(rows, table_batch, labels))
    before, (after,) = class_counts(
        table,  # type: ignore[arg-type]
        "label",
        [Rowed(batches(kept, manifest_batch))],  # type: ignore[list-item]
    )
    said = {row: label or "no label" for row, label in zip(rows, labels, strict=True)}
    assert before == Counter(said.values())
    assert after == Counter(said[row] for row in kept)


def test_an_empty_selection_keeps_nothing() -> None:
    kept = KeptRows(Rowed([]))  # type: ignore[arg-type]
    assert not kept.contain(row_keys(batches([(0, 0), (0, 1)], 2)[0])).any()
    assert shares(Counter()) == {}


def test_keys_sort_as_shard_then_row() -> None:
    rows = [(0, 5), (0, 10**9), (1, 0), (70_000, 3)]
    keys = row_keys(batches(rows, 9)[0])
    assert (np.diff(keys) > 0).all()
