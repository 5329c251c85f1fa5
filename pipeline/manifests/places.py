"""Where positions 0..K-1 of a selection lie: shard, row and weight, in bounded memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numpy import ndarray

from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

GROUP_ROWS = 262_144
"""Rows of a manifest's row group, and of the blocks in which a corpus is counted through."""

CACHED_GROUPS = 16  # 64 MB: 16 bytes a row

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Placed:
    """Shard, row and weight of consecutive positions."""

    shard: Int32[ndarray, " n"]
    row: Int64[ndarray, " n"]
    weight: Float32[ndarray, " n"]

    def slice(self, start: int, stop: int) -> "Placed":
        return Placed(self.shard[start:stop], self.row[start:stop], self.weight[start:stop])


@runtime_checkable
class Places(Protocol):
    """Positions 0..rows-1, sorted by (shard, row), in groups of consecutive positions."""

    @property
    def starts(self) -> Int64[ndarray, " g"]:
        """First position of each group, and the number of positions at the end."""
        ...

    def group(self, index: int) -> Placed: ...

    def column(self, index: int, name: str) -> ndarray:
        """Return a further column of the group: `rank` or `group`, whole numbers.

        Raises:
            ValueError: there is no such column.
        """
        ...


def placed(places: Places, start: int, stop: int) -> Iterator[Placed]:
    """Yield positions [start, stop), one piece per group that they touch."""
    first = int(np.searchsorted(places.starts, start, side="right")) - 1
    for index in range(max(first, 0), len(places.starts) - 1):
        base = int(places.starts[index])
        if base >= stop:
            return
        piece = places.group(index).slice(max(0, start - base), stop - base)
        if len(piece.row):
            yield piece


class CorpusPlaces:
    """Every row of a corpus, weight 1; nothing is stored but the shards' row counts."""

    def __init__(self, shard_rows: list[int]) -> None:
        self._first = np.cumsum([0, *shard_rows], dtype=np.int64)  # position of each shard's row 0
        total = int(self._first[-1])
        self.starts = np.unique(np.append(np.arange(0, total, GROUP_ROWS), total)).astype(np.int64)

    def group(self, index: int) -> Placed:
        positions = np.arange(self.starts[index], self.starts[index + 1], dtype=np.int64)
        shard = np.searchsorted(self._first, positions, side="right") - 1
        ones = np.ones(len(positions), dtype=np.float32)
        return Placed(shard.astype(np.int32), positions - self._first[shard], ones)

    def column(self, index: int, name: str) -> ndarray:
        raise ValueError(f"a whole corpus has no column {name!r} as a selection may have")


class PartPlaces:
    """The rows in a manifest's parts, a few decoded row groups at a time."""

    def __init__(self, folder: Folder, parts: list[str]) -> None:
        self._folder = folder
        self._groups: list[tuple[str, int]] = []
        sizes: list[int] = []
        for part in parts:
            with open_parquet(folder, part) as file:
                footer = file.metadata
            self._groups += [(part, i) for i in range(footer.num_row_groups)]
            sizes += [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)
        self._cache: Recent[int, Placed] = Recent(CACHED_GROUPS, lambda _: 1)

    def group(self, index: int) -> Placed:
        return self._cache.get(index, self._decode)

    def column(self, index: int, name: str) -> ndarray:
        part, row_group = self._groups[index]
        with open_parquet(self._folder, part) as file:
            if name not in file.schema_arrow.names:
                raise ValueError(f"{self._folder.uri}/{part} has no column {name!r}; select again")
            return np.asarray(file.read_row_group(row_group, [name]).column(0).to_numpy())

    def _decode(self, index: int) -> Placed:
        part, row_group = self._groups[index]
        with open_parquet(self._folder, part) as file:
            table = file.read_row_group(row_group, ["shard", "row", "weight"])
        return Placed(*(column.to_numpy() for column in table.columns))


class Recent(Generic[K, V]):
    """The most recently used values, as many as fit under `limit` by `size` (always one)."""

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit, self._size, self._held = limit, size, 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """Return the value of `key`, made anew where it is not held."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make(key)
        self._held += self._size(value)
        while self._held > self.limit and len(self._values) > 1:
            self._held -= self._size(self._values.popitem(last=False)[1])
        return value
