"""What the columns of a score table look like, found in one streaming pass.

Counts, means and extremes are exact. Quantiles, histograms and rank correlations come from a
sample of rows shared by all columns; it is the whole table up to `SAMPLE_ROWS` rows. Memory is
bounded by the sample whatever the table's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, UInt64
from scipy.stats import rankdata

from curate.selectors.protocol import Table

SAMPLE_ROWS = 100_000
EXTREMES = 9
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Extreme:
    """One of the rows with the highest or lowest score."""

    shard: int
    row: int
    score: float


@dataclass
class ColumnSummary:
    """One score column: exact counts and moments, its extreme rows, its sample."""

    name: str
    scored: int = 0
    finite: int = 0
    missing: int = 0
    mean: float = 0.0
    sum_of_squares: float = 0.0
    highest: list[Extreme] = field(default_factory=list)
    lowest: list[Extreme] = field(default_factory=list)
    sample: Float[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0))

    @property
    def std(self) -> float:
        """Standard deviation over the finite scores (n - 1)."""
        return float(np.sqrt(self.sum_of_squares / (self.finite - 1))) if self.finite > 1 else 0.0

    def quantiles(self) -> dict[str, float]:
        """Return QUANTILES of the sample, with the exact extremes; {} if nothing was scored."""
        if not self.scored:
            return {}
        finite = self.sample[np.isfinite(self.sample)]
        values = {f"{q:g}": float(np.quantile(finite, q)) for q in QUANTILES if len(finite)}
        return values | {"0": self.lowest[0].score, "1": self.highest[0].score}


@dataclass
class Summary:
    """All score columns of a table; `is_exact` while the sample is the whole table."""

    columns: dict[str, ColumnSummary]
    rows: int = 0
    errors: int = 0
    is_exact: bool = True

    def rank_correlations(self) -> Float[np.ndarray, "k k"]:
        """Return Spearman's correlation of each pair of columns over rows that both scored.

        Ties share their mean rank. NaN where fewer than three rows have both or one is constant.
        """
        columns = list(self.columns.values())
        matrix = np.full((len(columns), len(columns)), np.nan)
        for i, a in enumerate(columns):
            for j, b in enumerate(columns[: i + 1]):
                matrix[i, j] = matrix[j, i] = spearman(a.sample, b.sample)
        return matrix


def summarize(
    table: Table,
    names: Sequence[str],
    *,
    extremes: int = EXTREMES,
    sample_rows: int = SAMPLE_ROWS,
) -> Summary:
    """Return the summary of these score columns. One pass; rows with errors are counted."""
    summary = Summary({name: ColumnSummary(name) for name in names})
    sample = RowSample(len(names), sample_rows)
    for batch in table.scan(["shard", "row", *names, "error"]):
        shard, row = (batch.column(i).to_numpy() for i in range(2))
        scores = np.empty((batch.num_rows, len(names)))
        for i, name in enumerate(names):
            scores[:, i] = _float64(batch.column(name))
            _add(summary.columns[name], shard, row, scores[:, i], extremes)
        sample.add(shard, row, scores)
        summary.rows += batch.num_rows
        summary.errors += batch.num_rows - batch.column("error").null_count
    for i, name in enumerate(names):
        summary.columns[name].sample = sample.values[:, i]
    summary.is_exact = sample.is_whole
    return summary


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Return the rank correlation over entries where both are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3:
        return float("nan")
    ranks_a, ranks_b = rankdata(a[both]), rankdata(b[both])
    if np.ptp(ranks_a) == 0 or np.ptp(ranks_b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


class RowSample:
    """A uniform sample of rows, a function of (shard, row) alone, at most `limit` of them.

    Rows whose hash lies under a threshold are kept; the threshold is halved whenever too many are.
    """

    def __init__(self, width: int, limit: int) -> None:
        self.limit = limit
        self.values: Float[np.ndarray, "n k"] = np.empty((0, width))
        self._hashes = np.empty(0, dtype=np.uint64)
        self._shift = 0

    @property
    def is_whole(self) -> bool:
        return self._shift == 0

    def add(
        self,
        shard: Int[np.ndarray, " b"],
        row: Int[np.ndarray, " b"],
        values: Float[np.ndarray, "b k"],
    ) -> None:
        hashes = row_hash(shard, row)
        keep = self._kept(hashes)
        self._hashes = np.concatenate([self._hashes, hashes[keep]])
        self.values = np.concatenate([self.values, values[keep]])
        while len(self._hashes) > self.limit:
            self._shift += 1
            keep = self._kept(self._hashes)
            self._hashes, self.values = self._hashes[keep], self.values[keep]

    def _kept(self, hashes: UInt64[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        if self._shift == 0:
            return np.ones(len(hashes), dtype=bool)
        return np.asarray(hashes >> np.uint64(64 - self._shift) == 0)


def row_hash(shard: Int[np.ndarray, " b"], row: Int[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
    """Return 64 well-mixed bits per row (splitmix64's finaliser, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = row.astype(np.uint64) + shard.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def _add(
    column: ColumnSummary,
    shard: Int[np.ndarray, " b"],
    row: Int[np.ndarray, " b"],
    scores: Float[np.ndarray, " b"],
    extremes: int,
) -> None:
    """Take a batch into the column's counts, moments (Chan et al. 1979) and extreme rows."""
    there = np.flatnonzero(~np.isnan(scores))
    column.missing += len(scores) - len(there)
    if len(there) == 0:
        return
    values = scores[there]
    finite = values[np.isfinite(values)]
    if len(finite):
        old, new = column.finite, len(finite)
        shift = float(finite.mean()) - column.mean
        column.sum_of_squares += float(finite.var()) * new + shift**2 * old * new / (old + new)
        column.mean += shift * new / (old + new)
        column.finite += new
    column.scored += len(there)
    for sign, kept in ((-1, column.highest), (1, column.lowest)):
        # A stable sort keeps the first of equal rows, as selection does.
        best = there[np.argsort(sign * values, kind="stable")[:extremes]]
        kept.extend(Extreme(int(shard[i]), int(row[i]), float(scores[i])) for i in best)
        kept.sort(key=lambda e: sign * e.score)
        del kept[extremes:]


def _float64(column: pa.Array) -> Float[np.ndarray, " b"]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
