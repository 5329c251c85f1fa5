"""Per-row gradients as vectors: themselves where they are short, else one-sided sketches.

Shapes: B rows, P parameters, k sketch size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.sparse_projection import MOST_OUTPUTS
from curate.scorers.needs import Harvest
from curate.scorers.parts import Gradient
from curate.scorers.prepared import named_parameters
from curate.scorers.protocol import Signal
from curate.scorers.readouts import Projection, Readout
from curate.scorers.watched_model import WatchedModel

EXACT = 1 << 17
"""Gradients of so many numbers are not sketched: half a megabyte for each row at hand."""
SEED = 0


@dataclass(frozen=True)
class Whole:
    """The gradient itself."""

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b p"]:
        return gradient.materialised(slice(None)).flatten(1)


class GradientVectors:
    """Reads the `grad_vector`s off a pass: all of one kind have the same map at all checkpoints."""

    def __init__(self, core: WatchedModel, wanted: Iterable[Signal]) -> None:
        self._core = core
        self._signals = [s for s in wanted if s.kind == "grad_vector"]

    @property
    def params(self) -> list[str]:
        """The sets of parameters whose gradients are wanted."""
        return [s.params for s in self._signals]

    def readouts(self) -> dict[str, tuple[frozenset[str], Readout]]:
        """Return what is to be read off, by a key of its own for each signal."""
        return {
            _key(s): (self._core.names(s.params), readout(s.projection, self._size(s)))
            for s in self._signals
        }

    def value(self, signal: Signal, harvest: Harvest) -> Float[Tensor, "b n"]:
        """Return the rows' vectors; N is P or k."""
        found, names = harvest.readouts[_key(signal)], self._core.names(signal.params)
        rows, params = len(harvest.loss), named_parameters(self._core.passes.model)
        ordered = [name for name in self._core.all if name in names]
        if isinstance(readout(signal.projection, self._size(signal)), Whole):
            zero = harvest.loss.new_zeros
            each = (found.get(n, zero(rows, params[n].numel())) for n in ordered)
            return torch.cat([v.to(harvest.loss.dtype) for v in each], 1)
        start = harvest.loss.new_zeros(rows, signal.projection)
        return torch.stack([start, *(found[n] for n in ordered if n in found)]).sum(0)

    def _size(self, signal: Signal) -> int:
        params = named_parameters(self._core.passes.model)
        return sum(params[name].numel() for name in self._core.names(signal.params))


def readout(projection: int, size: int) -> Whole | Projection:
    """Return how gradients of `size` numbers are read where `projection` numbers are asked for."""
    if projection == 0 or size <= max(EXACT, projection):
        return Whole()
    is_sparse = projection.bit_count() == 1 and projection <= MOST_OUTPUTS
    return Projection(SEED, projection, is_sparse)


def _key(signal: Signal) -> str:
    return f"vector {signal.projection} {signal.params}"
