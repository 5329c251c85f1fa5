"""Hashes of a column's values as vectors, so that equal values are equal vectors."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32
from numpy import ndarray

from curate.pipeline.vectors.source import Wanted
from curate.pipeline.vectors.spool import spooled
from curate.selectors.vectors import Vectors

NUMBERS = 8  # of 16 bits each, which float32 holds exactly


@dataclass(frozen=True)
class Hashed:
    """128 bits of blake2b of each value of column `name`; a row where it is null has no vector.

    Texts are hashed as UTF-8, bytes as they are, images by their encoded bytes, all else as Python
    writes it. Raises ValueError where there is no such column.
    """

    name: str
    wanted: Wanted

    def __post_init__(self) -> None:
        self.wanted.type_of(self.name)  # raises where there is none

    @property
    def content(self) -> dict[str, Any]:
        return {"source": f"hash:{self.name}", "digest": self.wanted.corpus.digest}

    def read(self) -> Vectors:
        return spooled(self._blocks())

    def _blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        for batch in self.wanted.batches([self.name]):
            column: pa.Array = batch.column(0)
            yield np.stack([_hash(value) for value in column.to_pylist()])


def _hash(value: object) -> Float32[ndarray, " d"]:
    if value is None:
        return np.full(NUMBERS, np.nan, dtype=np.float32)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    data = value.encode() if isinstance(value, str) else value
    digest = hashlib.blake2b(
        data if isinstance(data, bytes) else repr(data).encode(), digest_size=2 * NUMBERS
    )
    return np.frombuffer(digest.digest(), dtype="<u2").astype(np.float32)
