"""AUM: area under the margin, gathered while the proxy trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class AUM:
    """Mean over training of the logit margin z_y - max_{k≠y} z_k at each presentation.

    Pleiss et al. 2020 (arXiv 2001.10528), section 3. Read from `records.parquet`; no pass over
    the model.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="easy and clean; low: mislabelled",
        keep="high",
        source="Pleiss et al. 2020: drop the lowest; CCS calls low hard",
        valid="runs of several epochs",
        asks=("several_epochs",),
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("aum")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[Signal("aum")][0]
