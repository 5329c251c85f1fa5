"""Predictive entropy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class Entropy:
    """-Σ_k p_k log p_k in nats, in [0, log C], mean over target tokens and checkpoints.

    The label plays no part: a row can be confidently wrong and have no entropy.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="uncertain", keep="high", source="uncertainty sampling (Lewis and Gale 1994)"
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("entropy")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("entropy")].mean(0)
