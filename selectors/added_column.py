"""A table with one more column: a number for each row that a method computed from its vectors."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.protocol import Table


class AddedColumn:
    """The table with `values` as the column `name`; NaN becomes null. Memory: 8 bytes a row."""

    def __init__(self, table: Table, name: str, values: Float64[ndarray, " n"]) -> None:
        assert len(values) == table.rows, "one value for each row"
        assert name not in table.schema.names, f"the table has a column {name!r} already"
        self._table, self.name, self._values = table, name, values

    @property
    def rows(self) -> int:
        return self._table.rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema.append(pa.field(self.name, pa.float64()))

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in corpus order; memory is one batch."""
        theirs = [name for name in columns if name != self.name]
        at = 0
        for batch in self._table.scan(theirs or ["row"]):
            values = self._values[at : at + batch.num_rows]
            at += batch.num_rows
            if self.name in columns:
                added = pa.array(values, mask=np.isnan(values))
                batch = batch.append_column(self.name, added)
            yield batch.select(list(columns))
