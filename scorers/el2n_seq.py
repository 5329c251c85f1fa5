"""EL2N of a whole sequence: norm of the row loss's gradient at the logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class EL2NSeq:
    """‖∂ℓ_row/∂logits‖₂ over all target tokens, mean over the checkpoints of a run.

    Equals EL2N where a row has one target. With T targets and a mean row loss the per-token errors
    are orthogonal blocks scaled by 1/T, so long rows score lower than their tokens' mean.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="hard, then noisy",
        keep="high",
        source="the sequence form of Paul et al. 2021, definition 2.3",
        valid="after some training; compare rows of like length",
        asks=("one_epoch",),
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("el2n_seq")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("el2n_seq")].mean(0)
