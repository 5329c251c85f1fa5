"""What a selector reads and what it returns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

SELECTION_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("row", pa.int64()), ("weight", pa.float32()), ("rank", pa.int32())]
)
"""`weight` is null where rows are unweighted, `rank` where the method orders nothing."""


@dataclass(frozen=True)
class Budget:
    """How much to keep: `fraction` of the corpus rows, a number of `rows`, or of `tokens`."""

    kind: Literal["fraction", "rows", "tokens"]
    value: int | float


@runtime_checkable
class Table(Protocol):
    """A score table that is read in streams, as often as needed, always in corpus order."""

    @property
    def rows(self) -> int: ...

    @property
    def schema(self) -> pa.Schema: ...

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in corpus order; memory is one batch."""
        ...


@dataclass(frozen=True)
class Selection:
    """Chosen rows as batches of SELECTION_SCHEMA sorted by (shard, row), read once."""

    batches: Iterable[pa.RecordBatch]
    params: dict[str, object] = field(default_factory=dict)


@runtime_checkable
class Selector(Protocol):
    """A frozen dataclass whose fields are the method's hyper-parameters."""

    @property
    def needs(self) -> frozenset[str]:
        """Columns that must be in the table besides `shard`, `row` and `error`."""
        ...

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection: ...
