"""A score table as a selection method sees it: who may be chosen, in what order, of which group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64, UInt32
from numpy import ndarray

from curate.selectors.protocol import Table
from curate.selectors.score_keys import UNSCORED

Keys = Callable[[pa.RecordBatch], "UInt32[ndarray, ' n']"]
Groups = Callable[[pa.RecordBatch], "Int64[ndarray, ' n']"]


@dataclass(frozen=True)
class Candidates:
    """Rows of one batch that may be chosen, in corpus order.

    The lower `key` comes first. `size` is what a row takes from the budget: 1, or its tokens.
    """

    batch: pa.RecordBatch
    key: UInt32[ndarray, " n"]
    group: Int64[ndarray, " n"]
    size: Int64[ndarray, " n"]

    def where(self, mask: Bool[ndarray, " n"]) -> "Candidates":
        return Candidates(
            self.batch.filter(pa.array(mask)), self.key[mask], self.group[mask], self.size[mask]
        )


def one_group() -> Groups:
    """Return the grouping in which all rows are together."""
    return lambda batch: np.zeros(batch.num_rows, dtype=np.int64)


@dataclass(frozen=True)
class Ordering:
    """The order of a table's candidates: by key, equal keys in corpus order.

    `keys` reads a batch of `columns`; `groups` gives, for one scan, the function that numbers each
    row's group. Rows with an `error`, and rows whose key is UNSCORED, are no candidates unless
    `include_errors`.
    """

    table: Table
    columns: frozenset[str]
    keys: Keys
    groups: Callable[[], Groups] = one_group
    by_tokens: bool = False
    include_errors: bool = False
    passes: Callable[[pa.RecordBatch], "Bool[ndarray, ' n']"] | None = None
    """Which rows may be chosen at all; None: all."""
    without: "tuple[Exclusion, ...]" = ()
    """Rows that are left out, each of those that the ones before it leave."""

    def scan(self, carry: tuple[str, ...] = ()) -> Iterator[Candidates]:
        """Yield the candidates, reading the table once; `carry` columns come along."""
        groups = self.groups()
        left_out = [exclusion.mask() for exclusion in self.without]
        for batch in self.table.scan(self._columns(carry)):
            rows = self._candidates(batch, groups)
            for is_out in left_out:
                rows = rows.where(~is_out(rows.batch))
            if len(rows.key):
                yield rows

    def sizes(self, batch: pa.RecordBatch) -> Int64[ndarray, " n"]:
        """Return what each row takes from the budget: 1, or its tokens."""
        if not self.by_tokens:
            return np.ones(batch.num_rows, dtype=np.int64)
        tokens = batch.column("tokens").cast(pa.int64()).fill_null(0)
        return np.asarray(tokens.to_numpy(zero_copy_only=False))

    def but(self, *out: "Exclusion") -> "Ordering":
        """Return this order without those rows."""
        return replace(self, without=(*self.without, *out))

    def _columns(self, carry: tuple[str, ...]) -> list[str]:
        wanted = {"shard", "row", *self.columns, *carry}
        wanted |= {name for out in self.without for name in out.ordering.columns}
        wanted |= {"error"} if "error" in self.table.schema.names else set()
        by_tokens = self.by_tokens or any(out.ordering.by_tokens for out in self.without)
        wanted |= {"tokens"} if by_tokens else set()
        return [name for name in self.table.schema.names if name in wanted]

    def _candidates(self, batch: pa.RecordBatch, groups: Groups) -> Candidates:
        if not self.include_errors and "error" in batch.schema.names:
            failed = batch.column("error")
            if failed.null_count < len(failed):
                batch = batch.filter(pc.is_null(failed))
        if self.passes is not None:
            batch = batch.filter(pa.array(self.passes(batch)))
        key = self.keys(batch)
        if not self.include_errors and (unscored := key == UNSCORED).any():
            batch, key = batch.filter(pa.array(~unscored)), key[~unscored]
        return Candidates(batch, key, groups(batch), self.sizes(batch))


@dataclass(frozen=True)
class First:
    """The front of the order of each group: keys below `key`, and `ties` of those equal to it.

    `ties` counts sizes: equal rows are taken in corpus order until one would exceed it. `tied`
    counts the rows that share the key of a cut that goes through equal rows, else 0.
    """

    key: UInt32[ndarray, " g"]
    ties: Int64[ndarray, " g"]
    tied: Int64[ndarray, " g"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def mask(self) -> Callable[[Candidates], Bool[ndarray, " n"]]:
        """Return the function that marks the rows inside, for the batches of one scan in order."""
        used = np.zeros(len(self.key), dtype=np.int64)

        def inside(rows: Candidates) -> Bool[ndarray, " n"]:
            edge = self.key[rows.group]
            marked = rows.key < edge
            tied = np.flatnonzero(rows.key == edge)
            if len(tied):
                group = rows.group[tied]
                so_far = used[group] + _running(group, rows.size[tied])
                marked[tied] = so_far <= self.ties[group]
                np.add.at(used, group, rows.size[tied])
            return np.asarray(marked)

        return inside


@dataclass(frozen=True)
class Exclusion:
    """Rows at the front of an order of the same table, which need not be the order they leave."""

    front: First
    ordering: Ordering

    def mask(self) -> Callable[[pa.RecordBatch], Bool[ndarray, " n"]]:
        """Return the function that marks them, for the batches of one scan in order."""
        inside, groups, order = self.front.mask(), self.ordering.groups(), self.ordering
        return lambda batch: inside(
            Candidates(batch, order.keys(batch), groups(batch), order.sizes(batch))
        )


def _running(group: Int64[ndarray, " n"], size: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """Return the running sum of sizes inside each group, in the given order."""
    order = np.argsort(group, kind="stable")
    total = np.cumsum(size[order])
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    before = np.repeat(total[begins] - size[order][begins], np.diff([*begins, len(group)]))
    running = np.empty_like(total)
    running[order] = total - before
    return running
