"""GWA: alignment of the row's head gradient with the head's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class GWA:
    """γ = cos(-∂ℓ/∂W, W) in [-1, 1] for the classifier's weight matrix W, its bias excluded.

    Hölzl et al. 2025, per-sample alignment; mean over the checkpoints of a run. Where W is tied to
    the embedding, only its use as the head counts. Over the whole table, their aggregate
    mean(γ) / (excess kurtosis(γ) + 1.2) is taken at each checkpoint.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="aligned: easy and clean; low or negative: noisy",
        keep="high",
        source="Hölzl et al. 2025 use it as a diagnostic; keep high to drop noise",
        valid="models with a linear head, after some training",
        asks=("after_step_0",),
    )
    aggregate: ClassVar[str] = "gwa"
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("weight_alignment")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("weight_alignment")].mean(0)
