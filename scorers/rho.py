"""RHO: the part of a row's loss that a model trained on other rows does without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class RHO:
    """ℓ(x, y; model) - ℓ(x, y; reference): the reducible holdout loss, in nats.

    Mindermann et al. 2022 (arXiv 2206.07137), equation 3: the reference is a model trained on a
    holdout set, and its loss the irreducible one. The mean over the checkpoints of a run, less the
    mean over the references.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="learnable and not yet learnt; low: learnt, or noise",
        keep="high",
        source="Mindermann et al. 2022 train on the highest of each large batch",
        valid="early checkpoints; a reference well trained on other rows of the same task",
        asks=("reference_of_other_rows",),
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("loss"), Signal("reference_loss")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        irreducible = signals[Signal("reference_loss")].mean(2)
        return (signals[Signal("loss")] - irreducible).mean(0)
