"""Rows of an earlier selection beside a score table, however both are cut into batches."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.manifests.among import Among

SHARDS = 3


def batches(keys: np.ndarray, cuts: list[int], **more: list[str | None]) -> list[pa.RecordBatch]:
    """Rows (shard, row) numbered shard * 100 + row, in batches that end at `cuts`."""
    edges = sorted({0, len(keys), *(c % (len(keys) + 1) for c in cuts)})
    columns = {"shard": (keys // 100).astype(np.int32), "row": (keys % 100).astype(np.int64)}
    whole = pa.table({**{k: pa.array(v) for k, v in columns.items()}, **more})
    parts = [whole.slice(a, b - a).combine_chunks() for a, b in pairwise(edges)]
    return [batch for part in parts for batch in part.to_batches()]


class Rows:
    """A table or a manifest: batches that are read again."""

    path = "there"

    def __init__(self, found: list[pa.RecordBatch]) -> None:
        self.found, self.schema = found, found[0].schema
        self.rows = sum(batch.num_rows for batch in found)

    def __len__(self) -> int:
        return self.rows

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return (batch.select(list(columns)) for batch in self.found)

    batches = scan


CUTS = st.lists(st.integers(0, 200), max_size=6)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10_000), CUTS, CUTS)
def test_rows_that_were_left_out_have_an_error(seed, table_cuts, kept_cuts):
    draw = np.random.default_rng(seed)
    keys = np.concatenate([100 * s + np.arange(draw.integers(0, 20)) for s in range(SHARDS)])
    keys = np.append(keys, 100 * SHARDS)
    error = [None if ok else "broken" for ok in draw.random(len(keys)) < 0.8]
    is_kept = draw.random(len(keys)) < draw.choice([0.1, 0.5, 1.0])
    is_kept[draw.integers(len(keys))] = True
    table = Rows(batches(keys, table_cuts, error=pa.array(error, pa.string())))
    among = Among(table, Rows(batches(keys[is_kept], kept_cuts)))
    assert (among.rows, among.schema) == (table.rows, table.schema)
    for columns in (["error"], ["row", "error"], ["error", "shard", "row"]):
        found = pa.Table.from_batches(list(among.scan(columns)))
        assert found.column_names == columns
        able = [e is None and k for e, k in zip(error, is_kept, strict=True)]
        assert found["error"].is_null().to_pylist() == able
    plain = pa.Table.from_batches(list(among.scan(["row"])))
    assert plain["row"].to_pylist() == (keys % 100).tolist()


@pytest.mark.parametrize("stranger", [0, 150, 399])
def test_rows_that_the_table_lacks_are_refused(stranger):
    keys = np.array([1, 2, 100, 101, 300])
    table = Rows(batches(keys, [2], error=pa.array([None] * 5, pa.string())))
    manifest = Rows(batches(np.sort(np.append(keys[1:3], stranger)), [1, 2]))
    with pytest.raises(ValueError, match="the manifest there keeps 1 rows that the score table"):
        list(Among(table, manifest).scan(["error"]))
