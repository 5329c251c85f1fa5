"""One streaming pass must say what the whole column in memory says."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from curate.pipeline.reporting.summary import RowSample, row_hash, spearman, summarize


class MemoryTable:
    """A score table of one shard in memory, read in batches of `batch` rows."""

    def __init__(self, columns: dict[str, list[float | None]], batch: int = 7) -> None:
        rows = len(next(iter(columns.values())))
        fields = {"shard": pa.array([0] * rows, pa.int32()), "row": pa.array(range(rows))}
        scores = {name: pa.array(values, pa.float32()) for name, values in columns.items()}
        lost = [None if v is not None else "broken" for v in next(iter(columns.values()))]
        self.table = pa.table({**fields, **scores, "error": pa.array(lost, pa.string())})
        self.batch = batch

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self.table.select(list(columns)).to_batches(max_chunksize=self.batch)


floats = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), floats), min_size=1, max_size=60), st.integers(1, 20))
def test_a_pass_in_batches_gives_what_numpy_gives(values: list[float | None], batch: int) -> None:
    summary = summarize(MemoryTable({"a": values}, batch), ["a"], extremes=4)
    column = summary.columns["a"]
    there = np.array([v for v in values if v is not None])
    assert (summary.rows, summary.errors) == (len(values), values.count(None))
    assert (column.scored, column.missing) == (len(there), values.count(None))
    if not len(there):
        assert column.quantiles() == {}
        return
    assert column.mean == pytest.approx(there.mean(), rel=1e-9, abs=1e-9)
    if len(there) > 1:
        assert column.std == pytest.approx(there.std(ddof=1), rel=1e-6, abs=1e-6)
    quantiles = column.quantiles()
    assert quantiles["0.5"] == pytest.approx(np.median(there))
    assert (quantiles["0"], quantiles["1"]) == (there.min(), there.max())
    assert [e.score for e in column.highest] == sorted(there, reverse=True)[:4]
    assert [e.score for e in column.lowest] == sorted(there)[:4]


def test_the_first_of_equal_rows_are_shown() -> None:
    column = summarize(MemoryTable({"a": [1.0] * 30}), ["a"], extremes=3).columns["a"]
    assert [e.row for e in column.highest] == [e.row for e in column.lowest] == [0, 1, 2]


def test_infinite_scores_are_extremes_but_not_in_the_mean() -> None:
    column = summarize(MemoryTable({"a": [float("inf"), 1.0, 3.0]}), ["a"]).columns["a"]
    assert column.highest[0].score == float("inf")
    assert (column.mean, column.finite, column.scored) == (2.0, 2, 3)


def test_the_sample_is_bounded_uniform_and_the_same_for_any_batching() -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    table = {"a": values.tolist(), "b": (-values).tolist()}
    whole = summarize(MemoryTable(table, 20_000), ["a", "b"], sample_rows=1000)
    pieces = summarize(MemoryTable(table, 333), ["a", "b"], sample_rows=1000)
    sample = whole.columns["a"].sample
    assert not whole.is_exact and 500 <= len(sample) <= 1000
    np.testing.assert_array_equal(sample, pieces.columns["a"].sample)
    np.testing.assert_array_equal(sample, -whole.columns["b"].sample)
    # The mean of ≥ 500 standard normals lies within 4/√500 but once in 10⁴.
    assert abs(sample.mean()) < 0.18
    assert whole.columns["a"].mean == pytest.approx(values.astype(np.float64).mean(), abs=1e-9)


def test_row_hashes_fill_their_range_evenly() -> None:
    rows = np.arange(4096)
    top = row_hash(np.zeros(4096, dtype=np.int64), rows) >> np.uint64(60)
    counts = np.bincount(top.astype(int), minlength=16)
    assert counts.min() > 190 and counts.max() < 330  # 256 expected, sd 15.5
    assert len(np.unique(row_hash(rows % 3, rows))) == 4096


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), floats), min_size=3, max_size=40))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, float]]) -> None:
    a, b = (np.array(x, dtype=np.float64) for x in zip(*pairs, strict=True))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_uses_rows_that_both_scored() -> None:
    a = np.array([1, 2, 3, np.nan, 5.0])
    b = np.array([3, 2, 1, 9, np.inf])
    assert spearman(a, b) == pytest.approx(-1)
    assert np.isnan(spearman(a[:2], b[:2]))


def test_correlations_are_symmetric_with_a_unit_diagonal() -> None:
    rng = np.random.default_rng(1)
    columns = {n: rng.normal(size=50).astype(np.float32).tolist() for n in "abc"}
    matrix = summarize(MemoryTable(columns), list("abc")).rank_correlations()
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_an_empty_sample_is_whole() -> None:
    assert RowSample(2, 10).is_whole
