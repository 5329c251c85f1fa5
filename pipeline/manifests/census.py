"""What a selection keeps of each group and score, counted while the selector reads the table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.pipeline.manifests.merge import row_keys
from curate.selectors.groups import GroupNumbers
from curate.selectors.protocol import Table
from curate.selectors.score_keys import score_column

CODE = "__group"
"""The number of a row's group, of kept rows whose schedule needs it; `group` in the manifest."""


@dataclass
class Counts:
    """Rows, scores and tokens of some rows, and the rows of each group."""

    rows: int = 0
    tokens: int = 0
    scored: int = 0
    total: float = 0.0
    deviations: float = 0.0  # sum of squared deviations from the mean
    lowest: float = np.inf
    highest: float = -np.inf
    groups: dict[str, int] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean of the finite scores."""
        return self.total / self.scored if self.scored else None

    def add_scores(self, scores: Float64[ndarray, " n"]) -> None:
        finite = scores[np.isfinite(scores)]
        if len(finite):
            # Chan, Golub and LeVeque 1983: two parts' deviations and the gap of their means.
            gap = float(finite.mean()) - (self.mean or 0.0)
            both = self.scored + len(finite)
            self.deviations += float(finite.var()) * len(finite)
            self.deviations += gap**2 * self.scored * len(finite) / both
            self.scored += len(finite)
            self.total += float(finite.sum())
            self.lowest = min(self.lowest, float(finite.min()))
            self.highest = max(self.highest, float(finite.max()))


class Census:
    """A score table that is counted during its first scan, at no further scan's cost.

    `all` counts every row, `able` those that a random selection would choose from (without error,
    unless `include_errors`), `kept` the rows given to `keep`. `by` and `group` are columns of the
    table or None.
    """

    def __init__(
        self,
        table: Table,
        by: str | None,
        group: str | None,
        by_tokens: bool = False,
        include_errors: bool = False,
    ) -> None:
        self._table, self.by, self.group, self.by_tokens = table, by, group, by_tokens
        self.all, self.able, self.kept = Counts(), Counts(), Counts()
        self._numbers = GroupNumbers(group or "")
        self._weighted = self._weights = 0.0
        self._is_counted, self._include_errors = False, include_errors

    @property
    def rows(self) -> int:
        return self._table.rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @property
    def vectors(self) -> Any:
        """The table's vectors; AttributeError for a table that has none."""
        return self._table.vectors  # type: ignore[attr-defined]

    @property
    def target(self) -> Any:
        """The target's vectors; AttributeError for a table without vectors."""
        return self._table.target  # type: ignore[attr-defined]

    def target_values(self, column: str) -> Any:
        """A column of the target's rows; AttributeError for a table without vectors."""
        return self._table.target_values(column)  # type: ignore[attr-defined]

    def manifest_weights(self) -> Any:
        """Weights of the method's manifest; AttributeError for a table without vectors."""
        return self._table.manifest_weights()  # type: ignore[attr-defined]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are counted."""
        wanted = (self.by, self.group, "tokens" if "tokens" in self.schema.names else None)
        return tuple(dict.fromkeys(name for name in wanted if name))

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns as the table does; the first whole scan counts."""
        if self._is_counted:
            yield from self._table.scan(columns)
            return
        self.all, self.able = Counts(), Counts()
        error = ["error"] if "error" in self.schema.names else []
        for batch in self._table.scan(list(dict.fromkeys([*columns, *self.columns, *error]))):
            self._count(self.all, batch)
            able = batch
            if error and not self._include_errors:
                able = batch.filter(batch.column("error").is_null())
            self._count(self.able, able)
            yield batch.select(columns)
        self._is_counted = True

    def keep(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches without the columns that only the census wanted, and count them."""
        self.kept = Counts()
        self._weighted = self._weights = 0.0
        for batch in batches:
            self._count(self.kept, batch)
            self._weigh(batch)
            own = ("shard", "row", "id", "weight", "rank", CODE)
            yield batch.select([name for name in batch.schema.names if name in own])

    def groups(self) -> dict[str, dict[str, int]] | None:
        """Return {value: {of, kept}} in the order of the values, None without a group column."""
        if self.group is None:
            return None
        kept = self.kept.groups
        return {v: {"of": of, "kept": kept.get(v, 0)} for v, of in sorted(self.all.groups.items())}

    def summary(self) -> dict[str, Any]:
        """Return what was kept beside what a random selection of that budget keeps.

        Means over all random selections and, as `random_sd`, their standard deviation from one to
        the next (sampling without replacement). Of a budget in tokens a random selection is one
        of as many tokens; its deviations are those of a selection of as many rows as it has.
        The mean score is of the rows that have one, however many are drawn: its deviation is that
        of a ratio, to first order.
        """
        able = self.able.rows
        share = self.kept.rows / max(1, able)
        if self.by_tokens and self.able.tokens:
            share = self.kept.tokens / self.able.tokens
        random_rows = able * share
        spread = share * (1 - share) * able / max(1, able - 1)
        found: dict[str, Any] = {
            "rows": self.all.rows,
            "selected": self.kept.rows,
            "share": self.kept.rows / max(1, self.all.rows),
            "random": {
                "rows": random_rows,
                "rows_in_common": self.kept.rows * share,
                "overlap": share,
            },
        }
        if "tokens" in self.columns:
            found["tokens"] = {"of": self.all.tokens, "kept": self.kept.tokens}
        if self.by is not None and self.kept.mean is not None:
            found["score"] = {
                "column": self.by,
                "kept_mean": self.kept.mean,
                "kept_lowest": self.kept.lowest,
                "kept_highest": self.kept.highest,
                "random_mean": self.able.mean,
                "random_sd": (self.able.deviations * max(0.0, spread)) ** 0.5
                / (share * max(1, self.able.scored)),
            }
            if self._weights:
                found["score"]["kept_weighted_mean"] = self._weighted / self._weights
        if self.group is not None:
            found["groups"] = {
                value: {**counts, **self._random_group(value, share, spread)}
                for value, counts in (self.groups() or {}).items()
            }
        return found

    def _random_group(self, value: str, share: float, spread: float) -> dict[str, float]:
        """Return how many rows of a group a random selection keeps: hypergeometric."""
        there, able = self.able.groups.get(value, 0), max(1, self.able.rows)
        deviation = max(0.0, there * (1 - there / able) * spread) ** 0.5
        return {"random": there * share, "random_sd": deviation}

    def _weigh(self, batch: pa.RecordBatch) -> None:
        """Add the weighted scores of kept rows, where rows are weighted."""
        weight = batch.column("weight")
        if self.by is None or weight.null_count == len(weight):
            return
        scores = score_column(batch, self.by).astype(np.float64)
        finite = np.isfinite(scores)
        weights = weight.to_numpy(zero_copy_only=False).astype(np.float64)[finite]
        self._weighted += float(weights @ scores[finite])
        self._weights += float(weights.sum())

    def _count(self, counts: Counts, batch: pa.RecordBatch) -> None:
        counts.rows += batch.num_rows
        if not batch.num_rows:
            return
        if "tokens" in self.columns:
            tokens = batch.column("tokens").cast(pa.int64()).fill_null(0)
            counts.tokens += int(tokens.to_numpy(zero_copy_only=False).sum())
        if self.by is not None:
            counts.add_scores(score_column(batch, self.by).astype(np.float64))
        if self.group is not None:
            numbers = np.bincount(self._numbers.of(batch))
            for value, rows in zip(self._numbers.values, numbers.tolist(), strict=False):
                counts.groups[value] = counts.groups.get(value, 0) + rows


def attached(
    batches: Iterator[pa.RecordBatch], table: Table, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the batches with these columns of the table; both are in corpus order. One scan.

    For selectors that do not carry columns themselves.
    """
    waiting = _Keyed.read(table.scan(["shard", "row", *columns]))
    there = next(waiting, None)
    for batch in batches:
        begun = [name for name in columns if name not in batch.schema.names]
        keys, found = row_keys(batch), []
        at = 0
        while at < len(keys):
            assert there is not None, "a selected row is not in the table"
            stop = int(np.searchsorted(keys, there.keys[-1], side="right"))
            places = np.searchsorted(there.keys, keys[at:stop])
            assert np.array_equal(there.keys[places], keys[at:stop]), "a selected row is unknown"
            found.append(there.batch.select(begun).take(pa.array(places)))
            at = stop
            if at < len(keys):
                there = next(waiting, None)
        joined = pa.Table.from_batches(found).combine_chunks().to_batches()[0]
        arrays = [*batch.columns, *joined.columns]
        yield pa.record_batch(arrays, [*batch.schema.names, *begun])


@dataclass(frozen=True)
class _Keyed:
    batch: pa.RecordBatch
    keys: "ndarray"

    @classmethod
    def read(cls, batches: Iterator[pa.RecordBatch]) -> "Iterator[_Keyed]":
        for batch in batches:
            if batch.num_rows:
                yield cls(batch, row_keys(batch))
