"""Forgetting events, counted while the proxy trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class Forgetting:
    """Number of times the row went from right to wrong between its presentations in training.

    Toneva et al. 2019 (arXiv 1812.05159), algorithm 1; a row never learnt counts as many events
    as it had presentations. Read from `records.parquet`; no pass over the model.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="hard; zero ties many rows",
        keep="high",
        source="Toneva et al. 2019: drop the unforgettable",
        valid="runs of several epochs",
        asks=("several_epochs",),
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("forgetting")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("forgetting")][0]
