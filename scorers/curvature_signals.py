"""The signals that have a curvature between two gradients, read off an engine's pass.

Shapes: B rows, M groups of a target.

A row's own g^T (G + λI)^-1 g is a readout of its gradient. Of a target's mean gradients v the
directions (G + λI)^-1 v are made once; the rows' inner products with them are taken as with v.
"""

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.curvature import Asked, Curvature
from curate.scorers.needs import Harvest
from curate.scorers.protocol import Signal
from curate.scorers.readouts import Dots, Readout
from curate.scorers.watched_model import total

Directions = Mapping[str, Float[Tensor, "m ..."]]


class CurvedSignals:
    """Those of the wanted signals that name a curvature."""

    def __init__(self, wanted: Iterable[Signal]) -> None:
        self.signals = tuple(s for s in wanted if s.curvature)
        self.curvatures: Mapping[Asked, Curvature] = {}
        """By what is asked for, for the weights that are loaded. Set anew where they change."""
        self._solved: WeakKeyDictionary[Curvature, tuple[Directions, dict[str, Tensor]]]
        self._solved = WeakKeyDictionary()

    @property
    def params(self) -> list[str]:
        return [s.params for s in self.signals]

    def readouts(self, directions: Directions) -> dict[str, tuple[frozenset[str], Readout]]:
        """Return what to read off the rows' gradients."""
        found: dict[str, tuple[frozenset[str], Readout]] = {}
        for signal in self.signals:
            curvature = self._of(signal)
            if signal.kind == "grad_sq_norm":
                found[_key(signal)] = curvature.names, curvature
                continue
            assert directions, "a target's directions are set before the first batch"
            if curvature not in self._solved or self._solved[curvature][0] is not directions:
                self._solved[curvature] = directions, curvature.solve(directions)
            _, solved = self._solved[curvature]
            found[_key(signal)] = frozenset(solved), Dots(solved)
        return found

    def value(self, signal: Signal, harvest: Harvest) -> Float[Tensor, "b ..."]:
        """Return the signal's value, [B] or [B, M]."""
        if signal.kind == "grad_sq_norm":
            return total(harvest, _key(signal), self._of(signal).names)
        found = harvest.readouts[_key(signal)]
        _, solved = self._solved[self._of(signal)]
        groups = len(next(iter(solved.values())))
        zero = harvest.loss.new_zeros(len(harvest.loss), groups)
        return torch.stack([zero, *(found[n] for n in sorted(found))]).sum(0)

    def _of(self, signal: Signal) -> Curvature:
        asked = signal.params, signal.curvature
        assert asked in self.curvatures, "set before the first batch"
        return self.curvatures[asked]


def _key(signal: Signal) -> str:
    return f"{signal.kind} {signal.params} {signal.curvature}"
