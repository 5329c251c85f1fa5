"""Columns of a target set: the vectors of each of its classes or groups."""

import numpy as np
import pyarrow as pa
from numpy import ndarray

from curate.selectors.vectors import Vectors, VectorTable, finite_rows, part_of


def target_values(table: VectorTable, column: str) -> pa.Array:
    """Return a column of the target's rows, in the order of its vectors.

    Raises:
        ValueError: the table's target has vectors only.
    """
    values = getattr(table, "target_values", None)
    if values is None:
        raise ValueError(f"the target has vectors only, and its column {column!r} is needed")
    return values(column)


def target_texts(table: VectorTable, column: str) -> ndarray:
    """Return a column of the target's rows as text, null as "null": as groups are named.

    Raises:
        ValueError: there is no such column, or it is not as long as the target.
    """
    assert table.target is not None, "there is a target"
    values, rows = target_values(table, column), table.target.rows
    if len(values) != rows:
        raise ValueError(f"the target corpus has {len(values)} rows, its vectors {rows}")
    texts = ["null" if value is None else str(value) for value in values.to_pylist()]
    return np.array(texts, dtype=object)


def target_groups(table: VectorTable, column: str) -> dict[str, Vectors]:
    """Return the target's finite vectors of each value of this column of the target.

    Raises:
        ValueError: there is no such column, or it is not as long as the target.
    """
    assert table.target is not None, "there is a target"
    texts = target_texts(table, column)
    usable = finite_rows(table.target)
    return {
        value: part_of(table.target, np.flatnonzero(usable & (texts == value)))
        for value in dict.fromkeys(texts[usable].tolist())
    }


def check_target_group(target_group: str | None, by_group: str | None) -> None:
    """Raise ValueError where groups of a target are named but none of the rows."""
    if target_group is not None and by_group is None:
        raise ValueError("target_group needs groups of rows to go with, by_group=COLUMN")
