"""Schedules that need the live loss: samplers that are told each row's loss as training goes.

    sampler = InfoBatch(len(manifest), epochs=90, seed=0)
    for epoch in range(90):
        sampler.start(epoch)
        for positions in sampler.batches(64):
            weights = sampler.weights(positions)          # multiply the rows' losses
            ...
            sampler.update(positions, losses)

Positions are those of the manifest, 0..K-1 (`__position` of `MapRows`). With several ranks every
rank tells its sampler the losses of all ranks (gather positions and losses first), so that all
choose the same rows; `batches(B, rank, W)` gives a rank its share. Memory: 12 bytes a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from curate.pipeline.manifests.order import order
from curate.selectors.keyed import keyed64, stream_key

Positions = Int64[ndarray, " n"]
_ORDER, _CHOICE = 31, 32  # what a key is for
UNSEEN = 3.0
"""The loss that rows start with, as in the published code of both methods."""


class LossDriven(ABC):
    """What both samplers share: known losses, the epoch's rows, its order, and the state."""

    name: str

    def __init__(self, rows: int, epochs: int, seed: int = 0) -> None:
        if rows < 1 or epochs < 1:
            raise ValueError(f"a schedule needs rows and epochs, not {rows} and {epochs}")
        self.rows, self.epochs, self.seed = rows, epochs, seed
        self.losses: Float32[ndarray, " n"] = np.full(rows, UNSEEN, dtype=np.float32)
        """The last known loss of each row; a row that was not shown keeps its old one."""
        self.epoch = -1
        self.is_replay = False
        self._chosen = np.arange(rows, dtype=np.int64)
        self._weights = np.ones(rows, dtype=np.float32)

    @abstractmethod
    def choose(self, epoch: int) -> tuple[Positions, Float32[ndarray, " n"]]:
        """Return the epoch's positions, sorted, and their weights, from the losses known now."""

    def start(self, epoch: int) -> None:
        """Choose the epoch's rows from the losses known now."""
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch {epoch} is not one of {self.epochs}")
        self.epoch = epoch
        self._chosen, self._weights = self.choose(epoch)

    def __len__(self) -> int:
        """Rows of the epoch that was started."""
        return len(self._chosen)

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's positions in a random order, a function of (seed, epoch)."""
        yield from self.positions().tolist()

    def positions(self) -> Positions:
        """Return the epoch's positions in the order in which they are shown."""
        self._refuse_unstarted()
        n, key = len(self._chosen), stream_key(self.seed, _ORDER)
        return np.asarray(self._chosen[order(n, key, self.epoch, 0, n)])

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Iterator[Positions]:
        """Yield this rank's batches; what is left after the last whole global step is its own
        smaller step, of which fewer than `world_size` rows are dropped."""
        shown = self.positions()
        for start in range(0, len(shown), size * world_size):
            step = shown[start : start + size * world_size]
            each = len(step) // world_size
            if each:
                yield step[rank * each : (rank + 1) * each]

    def weights(self, positions: Positions) -> Float32[ndarray, " n"]:
        """Return what to multiply the losses of these rows of the epoch by."""
        at = np.searchsorted(self._chosen, positions)
        is_there = at < len(self._chosen)
        if not (is_there.all() and np.array_equal(self._chosen[at], positions)):
            raise ValueError("a row is not of this epoch, so it has no weight in it")
        return np.asarray(self._weights[at])

    def update(self, positions: Positions, losses: Float[ndarray, " n"]) -> None:
        """Note the losses of rows (unweighted), as numbers or tensors.

        Raises:
            ValueError: as many losses as rows are expected, finite ones, and rows of the schedule.
        """
        at, found = _array(positions).astype(np.int64), _array(losses).astype(np.float32)
        if at.shape != found.shape:
            raise ValueError(f"{len(at)} rows and {found.size} losses; one loss for each row")
        if len(at) and not (0 <= at.min() and at.max() < self.rows):
            raise ValueError(f"a row is outside the {self.rows} rows of the schedule")
        if not np.isfinite(found).all():
            raise ValueError(f"{int((~np.isfinite(found)).sum())} losses are not finite")
        self.losses[at] = found

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on: the losses, and the epoch's choice."""
        return {
            "name": self.name,
            "rows": self.rows,
            "epochs": self.epochs,
            "seed": self.seed,
            "epoch": self.epoch,
            "losses": self.losses.copy(),
            "chosen": self._chosen.copy(),
            "weights": self._weights.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stood.

        Raises:
            ValueError: it is of another schedule, selection or seed.
        """
        for key in ("name", "rows", "epochs", "seed"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"the state is of another schedule: {key} {state[key]}, here "
                    f"{getattr(self, key)}"
                )
        self.epoch = state["epoch"]
        self.losses = np.array(state["losses"], dtype=np.float32)
        self._chosen = np.array(state["chosen"], dtype=np.int64)
        self._weights = np.array(state["weights"], dtype=np.float32)

    def _random(self, positions: Positions, count: int, epoch: int) -> Positions:
        """Return `count` of the positions, uniformly, sorted."""
        keys = keyed64(stream_key(self.seed, _CHOICE, epoch), positions)
        return np.sort(positions[np.argsort(keys)[:count]])

    def _refuse_unstarted(self) -> None:
        if self.epoch < 0:
            raise ValueError("no epoch was started; call start(epoch) first")


def _array(values: Any) -> ndarray:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy() if values.is_floating_point() else values
    return np.asarray(values)
