"""What is kept of a batch from one checkpoint of a run to the next, for signals made of all.

Shapes: B rows.
"""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from curate.scorers import logit_spread
from curate.scorers.gradient_spread import GradientSpread, vector_of
from curate.scorers.logit_spread import GRADIENT, LogitSpread
from curate.scorers.protocol import GRADIENT_SPREAD_KINDS, LOGIT_SPREAD_KINDS, Signal


def of_one_checkpoint(wanted: Iterable[Signal]) -> frozenset[Signal]:
    """Return what each checkpoint must give, so that these signals can be made of all of them."""
    wanted = logit_spread.of_one_checkpoint(wanted)
    spreads = {s for s in wanted if s.kind in GRADIENT_SPREAD_KINDS}
    return wanted - spreads | {vector_of(s) for s in spreads}


class RunState:
    """One batch's state, of all kinds of spread together."""

    def __init__(self, kinds: Collection[Signal]) -> None:
        self._of_logits = LogitSpread([s for s in kinds if s.kind in LOGIT_SPREAD_KINDS])
        self._of_gradients = GradientSpread(kinds)

    def clear(self) -> None:
        """Forget all checkpoints so far."""
        self._of_logits.clear()
        self._of_gradients.clear()

    @staticmethod
    def size(reading: Mapping[Signal, Tensor]) -> int:
        """Return the bytes that are kept from such a reading to the next."""
        of_logits = LogitSpread.size(reading) if GRADIENT in reading else 0
        return of_logits + GradientSpread.size(reading)

    def take(self, reading: dict[Signal, Tensor], is_last: bool) -> dict[Signal, Tensor]:
        """Return the reading with the spreads in place of what they are made of.

        They are 0 but at the last checkpoint of a run; the next checkpoint is of another run then.
        """
        reading = self._of_logits.take(reading, is_last)
        return self._of_gradients.take(reading, is_last)
