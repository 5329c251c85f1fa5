"""The vectors of a batch on their way from the engine to a store: narrow, and of few checkpoints.

Shapes: B rows, K checkpoints, L layers, W numbers of a vector at one checkpoint.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from curate.pipeline.scoring.work import Work, learning_rate_weights
from curate.pipeline.stores.layout import At, Layer, Layout, layers_of
from curate.scorers.engine import Engine
from curate.scorers.prepared import named_parameters
from curate.scorers.protocol import VECTOR_KINDS, Signal
from curate.scorers.readouts import TwoSidedSketch


@dataclass(frozen=True)
class Stored:
    """Rows as a store keeps them; without norms the vectors are as they were."""

    vectors: Float[np.ndarray, "b k w"]
    norms: Float32[np.ndarray, "b k l"] | None

    def is_finite(self) -> np.ndarray:
        """Return which rows (bool [B]) can be stored."""
        numbers = self.vectors if self.norms is None else self.norms
        finite: np.ndarray = np.isfinite(numbers).all((1, 2))
        return finite


@dataclass
class Held:
    """What is kept of one batch from checkpoint to checkpoint, on the device, by store."""

    vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """Let go of it."""
        self.vectors.clear()
        self.norms.clear()

    def stored(self) -> dict[str, Stored]:
        """Return it on the CPU."""
        return {
            name: Stored(
                torch.stack(self.vectors[name], 1).cpu().numpy(),
                torch.stack(self.norms[name], 1).cpu().numpy() if name in self.norms else None,
            )
            for name in self.vectors
        }


class StorePass:
    """Takes vectors out of each checkpoint's signals, in the precision of the store.

    Layers are known once `learn` has seen a reading of the engine.
    """

    def __init__(self, work: Work) -> None:
        assert work.stores is not None, "made where vectors are stored"
        self.work, self.plan = work, work.stores
        self.signals = self.plan.signals
        self.places = {name: _places(work, name) for name in self.plan.names}
        self.layers: dict[str, tuple[Layer, ...]] = {}
        self.how = dict(self.plan.sketch)

    def ready(self, engine: Engine) -> None:
        """Tell the engine which sketch is meant."""
        engine.row_sketch = self.plan.kind

    def learn(self, engine: Engine, reading: Mapping[Signal, Tensor]) -> None:
        """Take note of the layers that vectors have."""
        for name, signal in self.signals.items():
            width = reading[signal].shape[1]
            self.layers[name] = layers_of([("", width, ())])
            if name == "sketch":
                kind, own = self.plan.kind, named_parameters(engine.model)
                shapes = [(n, tuple(own[n].shape)) for n in engine.sketched(signal.params)]
                if isinstance(kind, TwoSidedSketch):
                    size = kind.k[0] * kind.k[1]
                    self.layers[name] = layers_of([(n, size, shape) for n, shape in shapes])
                else:
                    said = json.dumps(shapes, separators=(",", ":")).encode()
                    self.how["parameters"] = hashlib.sha256(said).hexdigest()[:16]

    def take(
        self, engine: Engine, k: int, reading: dict[Signal, Tensor], held: Held
    ) -> dict[Signal, Tensor]:
        """Return the reading of checkpoint k without vectors; `held` gets those to be stored."""
        if not self.layers:
            self.learn(engine, reading)
        for name, signal in self.signals.items():
            if k not in self.places[name]:
                continue
            if name == "probs":
                held.vectors.setdefault(name, []).append(reading[signal].float())
            else:
                direction, norm = _halved(reading[signal], self.layers[name])
                held.vectors.setdefault(name, []).append(direction)
                held.norms.setdefault(name, []).append(norm)
        return {s: value for s, value in reading.items() if s.kind not in VECTOR_KINDS}

    def row_bytes(self) -> float:
        """Return what the vectors of a row take; infinite while that is not known."""
        if not self.layers:
            return math.inf
        return sum(layout.row_bytes for layout in self.layouts().values())

    def whole_row_bytes(self, work: Work) -> int:
        """Return what a row of work with other checkpoints takes, its layers being these."""
        return sum(self._layout(work, name).row_bytes for name in self.layers)

    def layouts(self) -> dict[str, Layout]:
        """Return each store's layout, by name."""
        return {name: self._layout(self.work, name) for name in self.plan.names}

    def _layout(self, work: Work, name: str) -> Layout:
        at = tuple(_at(work, k, name) for k in _places(work, name))
        return Layout(name, self.how if name == "sketch" else {}, at, self.layers[name])


def _places(work: Work, name: str) -> list[int]:
    """Return the checkpoints that are stored: all for sketches, else each seed's last."""
    if name == "sketch":
        return list(range(len(work.checkpoints)))
    return sorted(indices[-1] for indices in work.runs.values())


def _at(work: Work, k: int, name: str) -> At:
    checkpoint, runs = work.checkpoints[k], work.runs
    weight = 1.0
    if name == "sketch":
        indices = runs[checkpoint.seed]
        rates = learning_rate_weights([work.checkpoints[i] for i in indices])
        weight = float(rates[indices.index(k)])
    return At(
        checkpoint.seed, checkpoint.step, checkpoint.epoch, checkpoint.digest, weight / len(runs)
    )


def _halved(
    x: Float[Tensor, "b w"], layers: tuple[Layer, ...]
) -> tuple[Float[Tensor, "b w"], Float32[Tensor, "b l"]]:
    """Return float16 directions of length 1 by layer, and float32 norms; 0 has the direction 0."""
    size = layers[0].size
    assert all(layer.size == size for layer in layers), "layers are of one size"
    parts = x.reshape(len(x), len(layers), size)
    # By the largest entry first: squares of what is tiny or huge leave float32's range.
    scale = parts.abs().amax(2, keepdim=True)
    parts = parts / torch.where(scale > 0, scale, 1)
    norm = torch.linalg.vector_norm(parts, dim=2, keepdim=True)
    direction = (parts / torch.where(norm > 0, norm, 1)).half().reshape(x.shape)
    return direction, (norm * scale)[..., 0].float()
