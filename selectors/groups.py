"""Numbering the values of a class or group column."""

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

MAX_GROUPS = 10_000


class GroupNumbers:
    """Numbers values by first appearance, the same number each time; null is called "null".

    Values are compared as text. Raises ValueError at more than MAX_GROUPS different ones: such a
    column names rows, not groups.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self._numbers: dict[str, int] = {}

    @property
    def values(self) -> list[str]:
        """The values seen so far, by number."""
        return list(self._numbers)

    def of(self, batch: pa.RecordBatch) -> Int64[ndarray, " n"]:
        """Return the number of each row's value."""
        column = batch.column(self.column)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        encoded = column.dictionary_encode(null_encoding="encode")
        numbers = np.array([self._number(v) for v in encoded.dictionary.to_pylist()], np.int64)
        index = encoded.indices.to_numpy(zero_copy_only=False)
        return numbers[index] if len(index) else np.empty(0, dtype=np.int64)

    def _number(self, value: object) -> int:
        text = "null" if value is None else str(value)
        number = self._numbers.setdefault(text, len(self._numbers))
        if number >= MAX_GROUPS:
            raise ValueError(
                f"column {self.column!r} has more than {MAX_GROUPS} different values; "
                "choose a column of classes or groups"
            )
        return number
