"""Vectors from a column of the corpus: lists of numbers, all of one length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray

from curate.pipeline.vectors.source import Wanted
from curate.pipeline.vectors.spool import spooled
from curate.selectors.vectors import Vectors


@dataclass(frozen=True)
class Column:
    """The lists of numbers in column `name`; a row where it is null has no vector.

    They are streamed once into a temporary memory-mapped file.

    Raises:
        ValueError: there is no such column, or it holds no lists of numbers; when read, a list of
            another length (its place in the corpus is named), or nothing but nulls.
    """

    name: str
    wanted: Wanted

    def __post_init__(self) -> None:
        kind = self.wanted.type_of(self.name)
        is_list = any(
            test(kind)
            for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        )
        if not is_list or not _is_number(kind.value_type):
            raise ValueError(
                f"{self.wanted.flag}: column {self.name!r} of {self.wanted.corpus.uri} holds "
                f"{kind}, not lists of numbers"
            )

    @property
    def content(self) -> dict[str, Any]:
        return {"source": f"column:{self.name}", "digest": self.wanted.corpus.digest}

    def read(self) -> Vectors:
        vectors = spooled(self._blocks())
        assert self.wanted.rows in (None, vectors.rows), "units cover the corpus"
        return vectors

    def _blocks(self) -> Iterator[Float[ndarray, "b d"]]:
        dimension = at = 0
        for batch in self.wanted.batches([self.name]):
            lists = batch.column(0)
            there = np.asarray(lists.is_valid())
            widths = _widths(lists, there)
            if not dimension and len(widths):
                dimension = int(widths[0])
                yield from _nothing(at, dimension, lists.type)
            odd = np.flatnonzero((widths != dimension) | (widths == 0))
            if len(odd):
                row = at + int(np.flatnonzero(there)[odd[0]])
                before = f" and {dimension} in the rows before" if dimension else ""
                raise ValueError(
                    f"{self.wanted.flag}: column {self.name!r} has {widths[odd[0]]} numbers in row "
                    f"{row} of {self.wanted.corpus.uri}{before}; "
                    "vectors must be of one length, at least 1"
                )
            at += len(lists)
            if dimension:
                block = _missing(len(lists), dimension, lists.type)
                values = lists.filter(pa.array(there)).flatten().to_numpy(zero_copy_only=False)
                block[there] = values.reshape(-1, dimension)
                yield block
        if not dimension:
            raise ValueError(
                f"{self.wanted.flag}: column {self.name!r} of {self.wanted.corpus.uri} "
                "is null in every row"
            )


def _nothing(rows: int, dimension: int, kind: pa.DataType) -> Iterator[Float[ndarray, "b d"]]:
    """Yield rows without vectors, for those that came before the length was known."""
    for start in range(0, rows, 1024):
        yield _missing(min(1024, rows - start), dimension, kind)


def _missing(rows: int, dimension: int, kind: pa.DataType) -> Float[ndarray, "b d"]:
    kept = np.float16 if pa.types.is_float16(kind.value_type) else np.float32
    return np.full((rows, dimension), np.nan, dtype=kept)


def _widths(lists: pa.Array, there: ndarray) -> ndarray:
    """Return the lengths of the lists that are there."""
    if pa.types.is_fixed_size_list(lists.type):
        return np.full(int(there.sum()), lists.type.list_size)
    lengths = lists.value_lengths().filter(pa.array(there))
    return np.asarray(lengths.to_numpy(zero_copy_only=False))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
