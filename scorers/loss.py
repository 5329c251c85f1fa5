"""Loss of the row under the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class Loss:
    """The row's loss in nats, mean over the checkpoints of a run.

    For language the row loss is the mean over target tokens, or their sum with `--row-loss sum`.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="hard or mislabelled",
        keep="high",
        source="folklore; see EL2N for a bounded form",
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("loss")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("loss")].mean(0)
