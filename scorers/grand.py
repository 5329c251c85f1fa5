"""GraNd: norm of the row's loss gradient (Data Diet)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class GraNd:
    """‖∇_θ ℓ(x, y)‖₂ over all trainable parameters, mean over the checkpoints of a run.

    Paul, Ganguli, Dziugaite 2021 (arXiv 2107.07075), definition 2.1. `params` limits θ: a regular
    expression over parameter names, or `head` for the classifier alone, the form that Fayyaz et
    al. 2022 use for BERT.
    """

    params: str = ""

    direction: ClassVar[Direction] = Direction(
        high_means="hard: one step on this row moves the model far",
        keep="high",
        source="Paul et al. 2021",
        valid="after some training: at initialisation it does not reproduce (Kirsch 2023)",
        asks=("trained_one_epoch",),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("grad_sq_norm", self.params)})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        (signal,) = self.needs
        return signals[signal].sqrt().mean(0)
