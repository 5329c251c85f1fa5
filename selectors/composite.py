"""A score table with one more column: the value of an expression over its scores.

`rank(x)` is the average rank of x among the rows that have it, over their number, so in (0, 1] and
rising with x, as `scipy.stats.rankdata(x) / n`; equal values share their mean rank. `z(x)` is
(x - mean) / standard deviation, both of the finite values and of the population; 0 where all are
equal. Rows with an error, and rows where x is null or NaN, have neither and no score.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64
from numpy import ndarray

from curate.selectors.average_ranks import RankFile, write_average_ranks
from curate.selectors.budget import need_score
from curate.selectors.exact_sum import Moments
from curate.selectors.expression import Expression
from curate.selectors.protocol import Table
from curate.selectors.score_keys import score_column, sort_keys


class Composite:
    """The table with a float32 column that is called as the expression is written.

    The first scan that wants this column is preceded by another one, if there is a rank or z.
    Memory: one batch, and what `selectors/average_ranks.py` says; 12 bytes a row and rank wait in
    a temporary folder as long as this object lives.

    Raises:
        ValueError: a column is missing or holds no numbers.
    """

    def __init__(self, table: Table, expression: Expression) -> None:
        self._table, self.expression = table, expression
        self.name = expression.text
        for column in expression.columns:
            if column not in table.schema.names:
                raise expression.unknown_column(column, list(table.schema.names))
            need_score(table, column)
        self._ready: tuple[dict[str, Moments], dict[str, RankFile]] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def rows(self) -> int:
        return self._table.rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema.append(pa.field(self.name, pa.float32()))

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in corpus order."""
        if self.name not in columns:
            yield from self._table.scan(columns)
            return
        moments, files = self._prepared()
        ranks = {text: file.read() for text, file in files.items()}
        for batch in self._table.scan(self._wanted([c for c in columns if c != self.name])):
            named = self._named(batch)
            calls = {text: next_ranks(batch.num_rows) for text, next_ranks in ranks.items()}
            for call in self.expression.calls:
                if call.name == "z":
                    inner = self.expression.inner(call, named)
                    calls[call.text] = _standardised(inner, moments[call.text])
            with np.errstate(over="ignore"):
                values = self.expression.values(named, calls).astype(np.float32)
            values[~self._is_able(batch)] = np.nan
            column = pa.array(values, mask=np.isnan(values))
            yield batch.append_column(self.name, column).select(list(columns))

    def _prepared(self) -> tuple[dict[str, Moments], dict[str, RankFile]]:
        """Return the moments of every z and the ranks of every rank; one scan, once."""
        if self._ready is None:
            self._ready = self._read() if self.expression.calls else ({}, {})
        return self._ready

    def _read(self) -> tuple[dict[str, Moments], dict[str, RankFile]]:
        self._folder = tempfile.TemporaryDirectory(prefix="curate-composite-")
        ranked = [call for call in self.expression.calls if call.name == "rank"]
        moments = {call.text: Moments() for call in self.expression.calls if call.name == "z"}
        folders = {call.text: Path(self._folder.name, str(i)) for i, call in enumerate(ranked)}
        for folder in folders.values():
            folder.mkdir()
        files = {text: (folder / "keys").open("wb") for text, folder in folders.items()}
        try:
            for batch in self._table.scan(self._wanted([])):
                named, able = self._named(batch), self._is_able(batch)
                for call in self.expression.calls:
                    inner = np.where(able, self.expression.inner(call, named), np.nan)
                    if call.name == "z":
                        moments[call.text].add(inner)
                    else:
                        with np.errstate(over="ignore"):
                            keys = sort_keys(inner.astype(np.float32), "low")
                        keys.astype("<u4").tofile(files[call.text])
        finally:
            for file in files.values():
                file.close()
        return moments, {text: write_average_ranks(folder) for text, folder in folders.items()}

    def _wanted(self, columns: list[str]) -> list[str]:
        error = ["error"] if "error" in self._table.schema.names else []
        return list(dict.fromkeys([*columns, *self.expression.columns, *error]))

    def _named(self, batch: pa.RecordBatch) -> dict[str, Float64[ndarray, " n"]]:
        names = self.expression.columns
        return {name: score_column(batch, name).astype(np.float64) for name in names}

    def _is_able(self, batch: pa.RecordBatch) -> Bool[ndarray, " n"]:
        if "error" not in batch.schema.names:
            return np.ones(batch.num_rows, dtype=bool)
        return np.asarray(batch.column("error").is_null().to_numpy(zero_copy_only=False))


def _standardised(values: Float64[ndarray, " n"], moments: Moments) -> Float64[ndarray, " n"]:
    std = moments.std
    return (values - moments.mean) / std if std > 0 else np.where(np.isnan(values), np.nan, 0.0)
