"""Logit margin of the true class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class Margin:
    """z_y - max_{k≠y} z_k on logits, mean over target tokens and checkpoints.

    Negative where the prediction is wrong. AUM is the same quantity averaged over training.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="easy", keep="low", source="Pleiss et al. 2020, section 3, at one checkpoint"
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("margin")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("margin")].mean(0)
