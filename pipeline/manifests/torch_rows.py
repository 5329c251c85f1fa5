"""A selection as a torch data set that shards over ranks and workers and resumes exactly.

The epoch is one global sequence (`EpochPlan`). Global step s takes its places
[sBW, (s+1)BW) for W ranks of batch size B; rank r takes the r-th slice of B; of V DataLoader
workers, worker s mod V builds it. The state is how many samples were delivered over all ranks, so
a run resumes with another number of ranks, workers or batch size: no row is lost or repeated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from curate.pipeline.manifests.epoch import EpochPlan
from curate.pipeline.manifests.row_source import WEIGHT, RowSource

ROWS_AT_ONCE = 256  # read together when rows are delivered one by one

Collate = Callable[[pa.Table], Any]


@dataclass(frozen=True)
class Reading:
    """Who reads what: this rank of how many, batch size (None: single rows), seed and epoch.

    `uneven` says what happens to the last, incomplete global step: its samples are spread evenly
    over the ranks in smaller batches, and the fewer than `world_size` that are left are dropped,
    or missing ones are padded from the start of the epoch. One rank never loses any.
    """

    rank: int = 0
    world_size: int = 1
    batch_size: int | None = None
    seed: int = 0
    epoch: int = 0
    uneven: Literal["drop", "pad"] = "drop"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, not {self.batch_size}")
        if self.uneven not in ("drop", "pad"):
            raise ValueError(f"uneven must be drop or pad, not {self.uneven!r}")
        if self.epoch < 0:
            raise ValueError(f"epoch must not be negative, not {self.epoch}")

    @property
    def step_rows(self) -> int:
        """Samples of one global step, over all ranks."""
        return (self.batch_size or 1) * self.world_size

    def steps(self, left: int) -> int:
        """Return how many steps deliver `left` samples of the epoch."""
        full, rest = divmod(left, self.step_rows)
        short = rest if self.uneven == "pad" else rest // self.world_size
        return full + (short > 0)

    def my_places(self, start: int, step: int, length: int) -> Int64[ndarray, " n"]:
        """Return the places of the epoch that this rank takes in a step, counted from `start`."""
        at = start + step * self.step_rows
        rest = min(self.step_rows, length - at)
        each = rest // self.world_size
        if self.uneven == "pad":
            each = -(-rest // self.world_size)
        return (at + self.rank * each + np.arange(each)) % length

    def delivered(self, start: int, steps: int, length: int) -> int:
        """Return the samples of the epoch that are gone after so many steps."""
        done = start + steps * self.step_rows
        return length if steps >= self.steps(length - start) else min(done, length)


class TorchRows(IterableDataset[Any]):
    """This rank's batches of one epoch; each `iter` starts at the epoch's or the loaded start.

    Items are `collate(table)`, by default a dict of tensors (lists where a column has no tensor
    form, with one tensor per row for lists of varying length) with the corpus columns, `__shard`,
    `__row` and, if the manifest's weights multiply the loss, `weight`. With `batch_size=None`
    items are single rows as such dicts, for DataLoaders that do the batching.

    Reading to the end moves on to the next epoch. Plain iteration and `loader(num_workers=V)`
    count what was delivered; under a bare DataLoader with workers, which run ahead of the
    training, nobody can, so `state_dict` refuses, and `set_epoch` has to be called each epoch.
    """

    def __init__(self, source: RowSource, reading: Reading, collate: Collate | None = None) -> None:
        super().__init__()
        self.source, self.reading = source, reading
        self._collate = collate
        self._start = self._delivered = 0
        self._has_loader = False
        self._read_by_workers = _shared_zero()

    def __len__(self) -> int:
        """Items of this epoch, from where the next `iter` starts."""
        return self.reading.steps(self._plan.length - self._start)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is not None:
            self._read_by_workers.fill_(1)
            self.source.share_cache(info.num_workers)
            yield from self._items(info.id, info.num_workers)
            return
        yield from self.counted(self._items(0, 1))

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of that epoch."""
        self.reading = replace(self.reading, epoch=epoch)
        self._start = self._delivered = 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the global sequence stands after the items delivered so far.

        Raises:
            RuntimeError: DataLoader workers read it and nobody counts; use `loader`.
        """
        if self._read_by_workers.item() and not self._has_loader:
            raise RuntimeError(
                "DataLoader workers read ahead, so the data set cannot tell what was delivered; "
                "use dataset.loader(num_workers=...) and its state_dict()"
            )
        return self.position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stood; ranks, workers and batch size may differ.

        Raises:
            ValueError: the state is of another selection.
        """
        if state["rows"] != len(self.source):
            raise ValueError(
                f"the state is of a selection of {state['rows']} rows, "
                f"this one has {len(self.source)}; load it with the manifest it was saved with"
            )
        self.reading = replace(self.reading, seed=state["seed"], epoch=state["epoch"])
        self._start = self._delivered = state["delivered"]

    def loader(self, num_workers: int = 0, **options: Any) -> "RowLoader":
        """Return a DataLoader that counts what it delivered; `options` are the DataLoader's."""
        self._has_loader = True
        return RowLoader(self, num_workers, options)

    def position(self) -> dict[str, Any]:
        """Return the state after the items that `counted` has handed out."""
        reading = self.reading
        return {
            "seed": reading.seed,
            "epoch": reading.epoch,
            "delivered": self._delivered,
            "rows": len(self.source),
        }

    def counted(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield the items of an epoch, in order, and count each as delivered."""
        reading, start, length = self.reading, self._start, self._plan.length
        self._delivered = start
        for step, item in enumerate(items):
            self._delivered = reading.delivered(start, step + 1, length)
            yield item
        self.set_epoch(reading.epoch + 1)

    @property
    def _plan(self) -> EpochPlan:
        return self.source.plan(self.reading.seed, self.reading.epoch)

    def _items(self, worker: int, workers: int) -> Iterator[Any]:
        plan, reading, start = self._plan, self.reading, self._start
        mine = range(worker, reading.steps(plan.length - start), workers)
        if reading.batch_size is not None:
            for step in mine:
                yield (self._collate or to_tensors)(self._batch(plan, [step], start))
            return
        for i in range(0, len(mine), ROWS_AT_ONCE):
            rows = self._batch(plan, mine[i : i + ROWS_AT_ONCE], start)
            for j in range(rows.num_rows):
                row = rows.slice(j, 1)
                yield self._collate(row) if self._collate else single(row)

    def _batch(self, plan: EpochPlan, steps: "range | list[int]", start: int) -> pa.Table:
        places = [self.reading.my_places(start, step, plan.length) for step in steps]
        rows = self.source.take(plan.at(np.concatenate(places)))
        if self.source.weight_kind != "loss":
            return rows.drop_columns([WEIGHT])
        if "weight" in self.source.columns:
            raise ValueError(
                "the corpus has a column 'weight' of its own, beside the manifest's loss weights; "
                "leave it out with columns=[...]"
            )
        return rows.rename_columns({WEIGHT: "weight"})


class RowLoader:
    """A DataLoader over `TorchRows` whose state is what the training loop has received.

    Batches that workers prepared ahead are not in the state; they are built again on resume.
    """

    def __init__(self, rows: TorchRows, num_workers: int, options: dict[str, Any]) -> None:
        if "batch_size" in options or "shuffle" in options:
            raise ValueError("batch_size and shuffling belong to as_torch(...), not to the loader")
        self.rows, self._workers, self._options = rows, num_workers, options

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        if not self._workers:
            return iter(self.rows)
        self.rows.source.preload()  # forked workers then share it
        # Made anew each epoch: workers copy the data set, with its epoch, when they start.
        loader = DataLoader(self.rows, batch_size=None, num_workers=self._workers, **self._options)
        return self.rows.counted(iter(loader))

    def state_dict(self) -> dict[str, Any]:
        """Return where the global sequence stands after what was received so far."""
        return self.rows.position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stood; see `TorchRows.load_state_dict`."""
        self.rows.load_state_dict(state)


def to_tensors(rows: pa.Table) -> dict[str, Any]:
    """Return the columns as tensors with the row axis first; lists where that cannot be."""
    return {name: _column(rows[name]) for name in rows.column_names}


def single(row: pa.Table) -> dict[str, Any]:
    """Return a table of one row as a dict of its values, tensors where they have that form."""
    return {name: values[0] for name, values in to_tensors(row).items()}


def _column(values: pa.Array | pa.ChunkedArray) -> Tensor | list[Any]:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    leaf, shape = values, [len(values)]
    while pa.types.is_fixed_size_list(leaf.type) and not leaf.null_count:
        shape.append(leaf.type.list_size)
        leaf = leaf.flatten()
    if _is_number(leaf.type) and not leaf.null_count:
        return torch.from_numpy(np.array(leaf.to_numpy(zero_copy_only=False))).reshape(shape)
    if pa.types.is_list(leaf.type) and leaf is values and _is_number(leaf.type.value_type):
        return [_column(item.values) if item.is_valid else None for item in values]
    return list(values.to_pylist())


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _shared_zero() -> Tensor:
    flag = torch.zeros((), dtype=torch.int64)
    flag.share_memory_()  # type: ignore[no-untyped-call]
    return flag
