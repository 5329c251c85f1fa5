"""The stream of batches that one seed trains on, from any step on."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from curate.pipeline.manifests.epoch import EpochPlan
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.training.encoded_rows import HeldRows, PickedRows, StreamedRows
from curate.pipeline.training.schedule import Length
from curate.scorers.protocol import Batch

if TYPE_CHECKING:
    from curate.pipeline.tasks.causal_lm import CausalLM, Packed

AHEAD = 2
"""Batches made in the background while the device works; none for rows held in memory."""


@dataclass(frozen=True)
class Fed:
    """One step's batch (None where no row of it can be used) and its rows' positions."""

    step: int
    batch: "Batch | Packed | None"
    positions: Int64[ndarray, " b"]


class RowStream:
    """Epoch after epoch of a source in its keyed order, cut into steps.

    Weights of kind `loss` travel in `Batch.weights`; those of kind `sampling` and `repeat` are in
    how often a position occurs. With a `packing` task the rows of a step are packed into windows.
    """

    def __init__(
        self,
        source: RowSource,
        rows: HeldRows | PickedRows | StreamedRows,
        seed: int,
        length: Length,
        device: str,
        packing: "CausalLM | None" = None,
    ) -> None:
        self._source, self._rows, self._seed, self._packing = source, rows, seed, packing
        self._length, self._device = length, device
        self._plan = lru_cache(maxsize=2)(self._new_plan)

    def positions(self, start: int, stop: int) -> Int64[ndarray, " n"]:
        """Return the positions that presentations [start, stop) show."""
        pieces = []
        while start < stop:
            visits = self._plan(0).length
            epoch, first = divmod(start, visits)
            last = min(visits, first + stop - start)
            pieces.append(self._plan(epoch).positions(first, last))
            start += last - first
        return np.concatenate(pieces)

    def batches(self, after: int) -> Iterator[Fed]:
        """Yield the batches of steps `after` + 1 to the last."""
        steps = range(after + 1, self._length.steps + 1)
        if not isinstance(self._rows, StreamedRows):
            yield from map(self._fed, steps)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as background:
            waiting: deque[Future[Fed]] = deque()
            for step in steps:
                waiting.append(background.submit(self._fed, step))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _fed(self, step: int) -> Fed:
        positions = self.positions(*self._length.bounds(step))
        if self._packing is not None:
            return self._fed_packed(self._packing, step, positions)
        batch, kept = self._rows.batch(positions)
        positions = positions[kept]
        if batch is not None and self._source.weight_kind == "loss":
            batch = replace(batch, weights=self._weights(positions))
        return Fed(step, batch, positions)

    def _fed_packed(self, task: "CausalLM", step: int, positions: Int64[ndarray, " b"]) -> Fed:
        table, kept = self._rows.encoded(positions)
        positions = positions[kept]
        if table is None:
            return Fed(step, None, positions)
        is_weighted = self._source.weight_kind == "loss"
        weights = self._weights(positions) if is_weighted else None
        return Fed(step, task.pack_batch(table, weights).to(self._device), positions)

    def _weights(self, positions: Int64[ndarray, " n"]) -> Float[Tensor, " n"]:
        places = self._source.places
        weights = np.empty(len(positions), dtype=np.float32)
        groups = np.searchsorted(places.starts, positions, side="right") - 1
        for group in np.unique(groups):
            mine = groups == group
            at = positions[mine] - places.starts[group]
            weights[mine] = places.group(int(group)).weight[at]
        return torch.from_numpy(weights).to(self._device)

    def _new_plan(self, epoch: int) -> EpochPlan:
        return self._source.plan(self._seed, epoch)
