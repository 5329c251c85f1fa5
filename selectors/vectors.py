"""One vector for each row of a score table, read in blocks: what geometric selectors compare.

Shapes: N rows of the table, D dimensions, B rows of a block, K rows taken.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from numpy import ndarray

from curate.selectors.protocol import Table

BLOCK_ROWS = 4096
SMALL_BYTES = 1 << 28
"""Rows that take less than this are copied into memory instead of being read again."""


@runtime_checkable
class Vectors(Protocol):
    """Vectors in the order of a score table; a row without one is all NaN."""

    @property
    def rows(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        """Yield all rows in order, any number of times; memory is one block."""
        ...

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        """Return the rows at these places, in the order asked for."""
        ...


@runtime_checkable
class VectorTable(Table, Protocol):
    """A score table whose rows have vectors, and maybe those of a target set to compare with."""

    @property
    def vectors(self) -> Vectors: ...

    @property
    def target(self) -> Vectors | None: ...


class ArrayVectors:
    """Vectors in an array of numbers, which may be memory-mapped; converted a block at a time.

    What is read may be the array itself: do not write to it.

    Raises:
        ValueError: the array is no matrix of numbers, or has no column.
    """

    def __init__(self, array: Float[ndarray, "n d"] | Int[ndarray, "n d"]) -> None:
        if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "fiu":
            raise ValueError(
                f"vectors must be numbers of shape [rows, dimensions], "
                f"not {array.dtype} of shape {list(array.shape)}"
            )
        self.array = array

    @property
    def rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def dimension(self) -> int:
        return int(self.array.shape[1])

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        """Yield BLOCK_ROWS rows at a time; numbers too large for float32 become infinite."""
        for start in range(0, self.rows, BLOCK_ROWS):
            yield _floats(self.array[start : start + BLOCK_ROWS])

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        # A run of neighbours is read where it lies.
        first, count = (int(numbers[0]), len(numbers)) if len(numbers) else (0, 0)
        if count and int(numbers[-1]) == first + count - 1 and (np.diff(numbers) == 1).all():
            return _floats(self.array[first : first + count])
        return _floats(self.array[numbers])


class PartOfVectors:
    """Some rows of other vectors, at ascending `places`; row i is theirs at `places[i]`."""

    def __init__(self, whole: Vectors, places: Int64[ndarray, " n"]) -> None:
        self.whole, self.places = whole, places

    @property
    def rows(self) -> int:
        return len(self.places)

    @property
    def dimension(self) -> int:
        return self.whole.dimension

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        for start in range(0, self.rows, BLOCK_ROWS):
            yield self.whole.take(self.places[start : start + BLOCK_ROWS])

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        return self.whole.take(self.places[numbers])


class UnitVectors:
    """Other vectors at length 1; zero vectors stay zero."""

    def __init__(self, whole: Vectors) -> None:
        self._whole = whole

    @property
    def rows(self) -> int:
        return self._whole.rows

    @property
    def dimension(self) -> int:
        return self._whole.dimension

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        return (unit_rows(block) for block in self._whole.blocks())

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        found = np.empty((len(numbers), self.dimension), dtype=np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):  # wider copies of a few rows at a time
            part = slice(start, start + BLOCK_ROWS)
            found[part] = unit_rows(self._whole.take(numbers[part]))
        return found


def part_of(vectors: Vectors, places: Int64[ndarray, " n"]) -> Vectors:
    """Return the rows at these ascending places: all as they are, few copied, many read again."""
    if len(places) == vectors.rows:
        return vectors
    return held_if_few(PartOfVectors(vectors, places))


def held_if_few(vectors: Vectors) -> Vectors:
    """Return the vectors in memory if they take less than SMALL_BYTES, as they are otherwise."""
    if vectors.rows * vectors.dimension * 4 > SMALL_BYTES:
        return vectors
    return ArrayVectors(matrix(vectors))


def usable_target(table: VectorTable) -> Vectors | None:
    """Return the target's finite vectors, None where the table has no target.

    Raises:
        ValueError: they are of another dimension than the rows', or none is finite.
    """
    target = table.target
    if target is None:
        return None
    if target.dimension != table.vectors.dimension:
        raise ValueError(
            f"the target's vectors have {target.dimension} dimensions, the rows' "
            f"{table.vectors.dimension}; both must come from the same source"
        )
    found = np.flatnonzero(finite_rows(target))
    if not len(found):
        raise ValueError("no row of the target has a vector")
    return part_of(target, found)


def matrix(vectors: Vectors) -> Float32[ndarray, "n d"]:
    """Return all vectors in one array; memory is N·D·4 bytes."""
    found = np.empty((vectors.rows, vectors.dimension), dtype=np.float32)
    at = 0
    for block in vectors.blocks():
        found[at : at + len(block)] = block
        at += len(block)
    assert at == vectors.rows, "vectors yield as many rows as they say"
    return found


def finite_rows(vectors: Vectors) -> Bool[ndarray, " n"]:
    """Return which rows have a vector without NaN and infinity; one pass."""
    parts = [np.isfinite(block).all(axis=1) for block in vectors.blocks()]
    return np.concatenate(parts) if parts else np.empty(0, dtype=bool)


def square_norms(vectors: Vectors) -> Float64[ndarray, " n"]:
    """Return the squared length of each row, summed in float64; one pass."""
    parts = [np.square(block, dtype=np.float64).sum(axis=1) for block in vectors.blocks()]
    return np.concatenate(parts) if parts else np.empty(0)


def unit_rows(block: Float32[ndarray, "b d"]) -> Float32[ndarray, "b d"]:
    """Return the rows at length 1; a zero row stays zero."""
    lengths = np.sqrt(np.square(block, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.asarray(block / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _floats(block: ndarray) -> Float32[ndarray, "b d"]:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(block, dtype=np.float32)
