"""The spread of target-logit gradients over the checkpoints of a run, one checkpoint at a time.

Shapes: B rows, N coordinates.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.moments import Spread, finish_moments, update_moments
from curate.kernels.summation import accumulator
from curate.scorers.protocol import LOGIT_SPREAD_KINDS, Signal

GRADIENT, COORDINATES = Signal("logit_grad"), Signal("coordinates")


def of_one_checkpoint(wanted: Iterable[Signal]) -> frozenset[Signal]:
    """Return what each checkpoint must give, so that these signals can be made of all of them."""
    wanted = frozenset(wanted)
    spreads = {s for s in wanted if s.kind in LOGIT_SPREAD_KINDS}
    return wanted - spreads | {GRADIENT, COORDINATES} if spreads else wanted


class LogitSpread:
    """Mean and M2 of one batch's gradients: two numbers per coordinate, until the run's last."""

    def __init__(self, kinds: Collection[Signal]) -> None:
        self._kinds = tuple(kinds)
        self.clear()

    def clear(self) -> None:
        """Forget all checkpoints so far."""
        self._count = 0
        self._mean = self._m2 = torch.empty(0)

    @staticmethod
    def size(reading: Mapping[Signal, Tensor]) -> int:
        """Return the bytes that are kept from such a reading to the next."""
        x = reading[GRADIENT]
        return 2 * x.numel() * accumulator(x).itemsize

    def take(self, reading: dict[Signal, Tensor], is_last: bool) -> dict[Signal, Tensor]:
        """Return the reading with the spreads in place of the gradient.

        They are 0 but at the last checkpoint of a run; the next checkpoint is of another run then.
        """
        if not self._kinds:
            return reading
        x, own = reading[GRADIENT], reading[COORDINATES]
        rest = {s: value for s, value in reading.items() if s not in (GRADIENT, COORDINATES)}
        self._count += 1
        if not is_last:
            if self._count == 1:
                self._mean, self._m2 = torch.empty((2, *x.shape), dtype=accumulator(x),
                                                   device=x.device)  # fmt: skip
            update_moments(self._mean, self._m2, x, self._count)
            return rest | {s: torch.zeros_like(own) for s in self._kinds}
        found = {s: self._spread(s, x, own) for s in self._kinds}
        self.clear()
        return rest | found

    def _spread(
        self, signal: Signal, x: Float[Tensor, "b n"], own: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        if self._count == 1:
            return torch.zeros_like(own)
        spread: Spread = "std" if signal.kind == "vog_std" else "var"
        # What fills a row up is 0 at every checkpoint and spreads nowhere, but was counted.
        return finish_moments(self._mean, self._m2, x, self._count, spread) * (x.shape[1] / own)
