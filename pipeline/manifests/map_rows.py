"""A selection as a map-style torch data set, and the sampler that walks it epoch by epoch.

For trainers that want random access (`dataset[i]`) and bring their own DataLoader. The universal
pair is a data set of positions 0..K-1 and a sequence of positions; the sampler's is the same as
`TorchRows` shows: keyed order, sampling draws, repeats, schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, Sampler

from curate.pipeline.manifests.row_source import WEIGHT, RowSource
from curate.pipeline.manifests.torch_rows import Reading, single

POSITION = "__position"
CHUNK = 4096

Row = Callable[[pa.Table], Any]


class MapRows(Dataset[Any]):
    """The selected rows by position: `dataset[i]`, or many at once as DataLoaders ask.

    An item is `row(table of one row)`, by default a dict of the row's values (tensors where they
    have that form) with the corpus columns, `__shard`, `__row`, `__position` and `weight`. The
    weight is the manifest's where that multiplies the loss, else 1: how often a row is shown is the
    sampler's business.
    """

    def __init__(self, source: RowSource, row: Row | None = None) -> None:
        if "weight" in source.columns:
            raise ValueError(
                "the corpus has a column 'weight' of its own, beside the manifest's; leave it out "
                "with columns=[...]"
            )
        self.source, self._row = source, row

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """Return the items at these positions; read together."""
        at = np.asarray(positions, dtype=np.int64)
        at = np.where(at < 0, at + len(self), at)
        if len(at) and not (0 <= at.min() and at.max() < len(self)):
            raise IndexError(f"position outside the {len(self)} rows of the selection")
        table = self.source.take(at).append_column(POSITION, pa.array(at))
        if self.source.weight_kind != "loss":
            index = table.column_names.index(WEIGHT)
            ones = pa.array(np.ones(len(at), dtype=np.float32))
            table = table.set_column(index, table.schema.field(index), ones)
        table = table.rename_columns({WEIGHT: "weight"})
        rows = [table.slice(i, 1) for i in range(len(at))]
        return [self._row(row) if self._row else single(row) for row in rows]

    def sampler(
        self,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        uneven: str = "drop",
    ) -> "EpochSampler":
        """Return the sampler of this rank's positions."""
        return EpochSampler(self.source, Reading(rank, world_size, None, seed, epoch, uneven))  # type: ignore[arg-type]


class EpochSampler(Sampler[int]):
    """The positions that one rank visits in an epoch; each `iter` starts where the state says.

    Place p of the epoch goes to rank p mod W; a last stretch of fewer than W places is dropped or,
    with `uneven="pad"`, filled from the epoch's start. DataLoaders read samplers ahead, so
    `state_dict` takes how many samples of this epoch every rank has *trained on*; resuming with
    another number of ranks or workers then loses and repeats none.
    """

    def __init__(self, source: RowSource, reading: Reading) -> None:
        self._source, self.reading, self._start = source, reading, 0

    @property
    def follows_weights(self) -> bool:
        """Whether rows are shown as often as their weights say, which are then no loss weights."""
        return self._source.weight_kind in ("sampling", "repeat")

    def __len__(self) -> int:
        """Samples of this rank in the epoch, from where the next `iter` starts."""
        return self.reading.steps(self._length - self._start)

    def __iter__(self) -> Iterator[int]:
        reading, start, length = self.reading, self._start, self._length
        plan = self._source.plan(reading.seed, reading.epoch)
        steps = reading.steps(length - start)
        for first in range(0, steps, CHUNK):
            chunk = range(first, min(first + CHUNK, steps))
            places = [reading.my_places(start, step, length) for step in chunk]
            yield from plan.at(np.concatenate(places)).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of that epoch; staying in the epoch keeps a loaded start."""
        if epoch != self.reading.epoch:
            self.reading, self._start = replace(self.reading, epoch=epoch), 0

    def state_dict(self, trained: int = 0) -> dict[str, Any]:
        """Return the state after this rank has trained on `trained` samples since the start."""
        done = self.reading.delivered(self._start, trained, self._length) if trained else None
        return {
            "seed": self.reading.seed,
            "epoch": self.reading.epoch,
            "delivered": self._start if done is None else done,
            "rows": len(self._source),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stood; the number of ranks may differ.

        Raises:
            ValueError: the state is of another selection.
        """
        if state["rows"] != len(self._source):
            raise ValueError(
                f"the state is of a selection of {state['rows']} rows, "
                f"this one has {len(self._source)}; load it with the manifest it was saved with"
            )
        self.reading = replace(self.reading, seed=state["seed"], epoch=state["epoch"])
        self._start = state["delivered"]

    @property
    def _length(self) -> int:
        return self._source.plan(self.reading.seed, self.reading.epoch).length
