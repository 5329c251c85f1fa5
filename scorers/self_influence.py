"""Self-influence in TracIn's checkpoint form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class SelfInfluence:
    """Σ_k η_k ‖∇_θ ℓ(θ_k; x, y)‖² over the checkpoints of a run, learning rates η summing to 1.

    Pruthi et al. 2020 (arXiv 2002.08484), TracInCP with z' = z. Normalising η changes the scale
    alone, so with one checkpoint this is GraNd². `params` limits θ as in GraNd.
    """

    params: str = ""

    direction: ClassVar[Direction] = Direction(
        high_means="hard, mislabelled or an outlier",
        keep="low",
        source="Thakkar et al. 2023 (PRESENCE-Sequential) keep low; high finds wrong labels",
        valid="checkpoints spread over a run",
        asks=("spread_checkpoints",),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("grad_sq_norm", self.params)})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        (signal,) = self.needs
        return weights @ signals[signal]
