"""The signals that have a curvature between two gradients, read off an engine's pass.

Shapes: B rows, M groups of a target.

A row's own g^T (G + λI)^-1 g is a readout of its gradient. Of a target's mean gradients v the
directions (G + λI)^-1 v are made once; the rows' inner products with them are taken as with v.
"""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.curvature import Asked, Curvature
from curate.scorers.needs import Harvest
from curate.scorers.protocol import Signal
from curate.scorers.readouts import Dots, Readout
from curate.scorers.watched_model import total


class CurvedSignals:
    """Those of the wanted signals that name a curvature."""

    def __init__(self, wanted: Iterable[Signal]) -> None:
        self.signals = tuple(s for s in wanted if s.curvature)
        self._curvatures: Mapping[Asked, Curvature] = {}
        self._solved: dict[Asked, dict[str, Tensor]] = {}

    @property
    def params(self) -> list[str]:
        return [s.params for s in self.signals]

    @property
    def curvatures(self) -> Mapping[Asked, Curvature]:
        """By what is asked for, for the weights that are loaded. Set anew where they change."""
        return self._curvatures

    @curvatures.setter
    def curvatures(self, given: Mapping[Asked, Curvature]) -> None:
        self._curvatures = given
        self.forget_directions()

    def forget_directions(self) -> None:
        """The target's gradients have changed."""
        self._solved = {}

    def readouts(
        self, directions: Mapping[str, Float[Tensor, "m ..."]]
    ) -> dict[str, tuple[frozenset[str], Readout]]:
        """Return what to read off the rows' gradients."""
        found: dict[str, tuple[frozenset[str], Readout]] = {}
        for signal in self.signals:
            asked = signal.params, signal.curvature
            assert asked in self._curvatures, "set before the first batch"
            curvature = self._curvatures[asked]
            if signal.kind == "grad_sq_norm":
                found[_key(signal)] = curvature.names, curvature
                continue
            if asked not in self._solved:
                assert directions, "a target's directions are set before the first batch"
                self._solved[asked] = curvature.solve(directions)
            solved = self._solved[asked]
            found[_key(signal)] = frozenset(solved), Dots(solved)
        return found

    def value(self, signal: Signal, harvest: Harvest) -> Float[Tensor, "b ..."]:
        """Return the signal's value, [B] or [B, M]."""
        if signal.kind == "grad_sq_norm":
            names = self._curvatures[signal.params, signal.curvature].names
            return total(harvest, _key(signal), names)
        found = harvest.readouts[_key(signal)]
        solved = self._solved[signal.params, signal.curvature]
        groups = len(next(iter(solved.values())))
        zero = harvest.loss.new_zeros(len(harvest.loss), groups)
        return torch.stack([zero, *(found[n] for n in sorted(found))]).sum(0)


def _key(signal: Signal) -> str:
    return f"{signal.kind} {signal.params} {signal.curvature}"
