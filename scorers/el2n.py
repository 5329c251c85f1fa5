"""EL2N: norm of the error vector (Data Diet)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class EL2N:
    """‖softmax(f(x)) - onehot(y)‖₂ in [0, √2], mean over the checkpoints of a run.

    Paul, Ganguli, Dziugaite 2021 (arXiv 2107.07075), definition 2.3. Seeds are averaged as norms,
    never as vectors. For language: the mean over target tokens of each token's norm.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="hard, then noisy",
        keep="high",
        source="Paul et al. 2021: keep high early in training; with noisy labels, and for language "
        "(Fayyaz et al. 2022), drop the very top first",
        valid="after some training: epoch 1 or later (Fayyaz et al. 2022), never at initialisation",
        asks=("one_epoch",),
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("el2n")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("el2n")].mean(0)
