"""Mean and spread of each row's gradient over the checkpoints of a run, one at a time.

Shapes: B rows, N numbers of a gradient or its sketch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import GRADIENT_SPREAD_KINDS, Signal


def vector_of(signal: Signal) -> Signal:
    """Return the vector whose mean or spread this is."""
    return replace(signal, kind="grad_vector")


@dataclass
class _State:
    count: int
    mean: Float[Tensor, "b n"]
    m2: Float[Tensor, " b"]
    """Σ_k ‖g_k − mean‖² so far (Welford 1962): no difference of large squares."""


class GradientSpread:
    """One batch's gradients: N + 1 numbers per row, until the run's last checkpoint."""

    def __init__(self, kinds: Collection[Signal]) -> None:
        self._kinds = [s for s in kinds if s.kind in GRADIENT_SPREAD_KINDS]
        self._states: dict[Signal, _State] = {}

    def clear(self) -> None:
        """Forget all checkpoints so far."""
        self._states.clear()

    @staticmethod
    def size(reading: Mapping[Signal, Tensor]) -> int:
        """Return the bytes that are kept from such a reading to the next."""
        found = [x for signal, x in reading.items() if signal.kind == "grad_vector"]
        return sum((x.numel() + len(x)) * x.element_size() for x in found)

    def take(self, reading: dict[Signal, Tensor], is_last: bool) -> dict[Signal, Tensor]:
        """Return the reading with ‖mean‖² and the mean squared distance in place of the vectors.

        They are 0 but at the last checkpoint of a run; the next checkpoint is of another run then.
        """
        if not self._kinds:
            return reading
        rest = {s: x for s, x in reading.items() if s.kind != "grad_vector"}
        for vector in {vector_of(s): None for s in self._kinds}:
            self._add(vector, reading[vector])
        for signal in self._kinds:
            state = self._states[vector_of(signal)]
            if not is_last:
                rest[signal] = torch.zeros_like(state.m2)
            elif signal.kind == "grad_signal":
                rest[signal] = state.mean.square().sum(1)
            else:
                rest[signal] = state.m2 / state.count
        if is_last:
            self.clear()
        return rest

    def _add(self, vector: Signal, x: Float[Tensor, "b n"]) -> None:
        state = self._states.get(vector)
        if state is None:
            self._states[vector] = _State(1, x.clone(), x.new_zeros(len(x)))
            return
        state.count += 1
        before = x - state.mean
        state.mean += before / state.count
        state.m2 += (before * (x - state.mean)).sum(1)
