"""Scores standardised over the whole table: a last step, when the rows of all units are known.

Parts are immutable, and no unit knows the others. Where a scorer has `normalise` other than `raw`,
the units' parts are therefore written to `raw/` first; when all are there, one pass over them takes
means and deviations and another writes the parts of the table, one by one. Both are functions of
the raw parts alone, so a run that was killed in between goes on to the same bytes. `raw/` is
deleted when the run is whole.

Shapes: N rows of a record batch, G labels so far.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64

from curate.pipeline.scoring.score_table import (
    RAW,
    ROW_GROUP,
    part_name,
    read_receipt,
    write_part,
)
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.commit import TMP
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

ALIKE = 1e-6
"""Values whose deviation is below this share of their mean differ by float32's rounding alone."""


def standardise(
    work: Work,
    units: Sequence[Unit],
    others: Callable[[pa.Table, int], pa.Table] = lambda table, start: table,
) -> dict[str, Any]:
    """Write the table's parts from the raw ones; return each scorer's means and deviations.

    (v - mean) / sd, divisor n, among the rows of one label or all rows; 0 where all are alike.
    `others` puts columns of other last steps into a unit's rows, of which it is told the first.
    """
    raw, folder = Folder(work.parts), Folder(work.out)
    groups = {alias: _Groups(work, alias) for alias in work.standardised}
    for unit in units:
        for batch in _batches(raw, unit):
            for group in groups.values():
                group.add(batch)
    for unit, end in zip(units, np.cumsum([unit.rows for unit in units]).tolist(), strict=True):
        if folder.exists(part_name(unit.number)):
            continue
        made = [pa.Table.from_batches([b]) for b in _batches(raw, unit)]
        table = pa.concat_tables(made).combine_chunks()
        for group in groups.values():
            table = group.applied(table, with_std=group.alias in work.averaged)
        table = others(table, end - unit.rows).cast(work.schema)
        write_part(folder, unit.number, table, read_receipt(raw, unit.number))
    return {alias: group.describe() for alias, group in groups.items()}


def forget_raw(folder: Folder) -> None:
    """Remove what the parts of a finished run were made from."""
    raw = folder.child(RAW)
    for name in raw.names():
        raw.delete(name)
    raw.clean_tmp(0.0)
    for path in (raw.local_path(TMP), raw.local_path()):
        if path is not None:
            with contextlib.suppress(OSError):
                path.rmdir()


def _batches(raw: Folder, unit: Unit) -> Iterator[pa.RecordBatch]:
    with open_parquet(raw, part_name(unit.number)) as file:
        yield from file.iter_batches(ROW_GROUP, use_threads=False)


@dataclass
class _Groups:
    """Count, mean and M2 of a scorer's values by label, merged by batches (Chan et al. 1983)."""

    work: Work
    alias: str
    places: dict[Any, int] = field(default_factory=dict)
    count: Float64[np.ndarray, " g"] = field(default_factory=lambda: np.zeros(0))
    mean: Float64[np.ndarray, " g"] = field(default_factory=lambda: np.zeros(0))
    m2: Float64[np.ndarray, " g"] = field(default_factory=lambda: np.zeros(0))

    def add(self, batch: pa.RecordBatch) -> None:
        values, where = _values(batch.column(self.alias)), self._where(batch)
        good = np.isfinite(values)
        values, where = values[good], where[good]
        more = len(self.places) - len(self.count)
        self.count, self.mean, self.m2 = (
            np.pad(x, (0, more)) for x in (self.count, self.mean, self.m2)
        )
        n = np.bincount(where, minlength=len(self.count)).astype(float)
        mean = np.bincount(where, values, len(n)) / np.maximum(n, 1)
        m2 = np.bincount(where, (values - mean[where]) ** 2, len(n))
        total, step = np.maximum(self.count + n, 1), mean - self.mean
        self.m2 += m2 + step**2 * self.count * n / total
        self.mean += step * n / total
        self.count += n

    def applied(self, table: pa.Table, with_std: bool) -> pa.Table:
        """Return the table with this scorer's columns standardised."""
        where, sd = self._where(table), self._deviations
        scale = np.where(sd > 0, 1 / np.where(sd > 0, sd, 1), 0)[where]
        values = _values(table.column(self.alias))
        table = _replaced(table, self.alias, (values - self.mean[where]) * scale)
        if with_std:
            name = f"{self.alias}_std"
            table = _replaced(table, name, _values(table.column(name)) * scale)
        return table

    def describe(self) -> dict[str, Any]:
        """Return the mean and deviation of the raw values, by label where there are several."""
        sums = zip(self.count, self.mean, self._deviations, strict=True)
        each = [{"rows": int(n), "mean": float(mean), "sd": float(sd)} for n, mean, sd in sums]
        if self.work.standardised[self.alias] == "dataset":
            return {"by": "dataset", "of": each[0] if each else None}
        return {"by": self.work.label, "of": {str(k): each[i] for k, i in self.places.items()}}

    @property
    def _deviations(self) -> Float64[np.ndarray, " g"]:
        """0 where all are alike."""
        sd: np.ndarray = np.sqrt(self.m2 / np.maximum(self.count, 1))
        sd[sd <= ALIKE * np.abs(self.mean)] = 0.0
        return sd

    def _where(self, rows: pa.RecordBatch | pa.Table) -> Int64[np.ndarray, " n"]:
        """Return each row's place among the labels seen so far."""
        if self.work.standardised[self.alias] == "dataset":
            self.places.setdefault(None, 0)
            return np.zeros(rows.num_rows, np.int64)
        column = rows.column(self.work.label)
        chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_decode()
        coded = pc.dictionary_encode(chunk, null_encoding="encode")
        places = [
            self.places.setdefault(label, len(self.places))
            for label in coded.dictionary.to_pylist()
        ]
        found: np.ndarray = np.array(places, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
        return found


def _values(column: pa.Array | pa.ChunkedArray) -> Float64[np.ndarray, " n"]:
    """Return the scores, NaN where there is none."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _replaced(table: pa.Table, name: str, values: Float64[np.ndarray, " n"]) -> pa.Table:
    column = pa.array(values.astype(np.float32), mask=np.isnan(values))
    return table.set_column(table.schema.names.index(name), name, column)
