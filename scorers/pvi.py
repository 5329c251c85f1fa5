"""PVI: how many bits about its label a row's input gives the model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class PVI:
    """-log2 f[∅](y) + log2 f[x](y): pointwise V-information, in bits.

    Ethayarajh, Choi and Swayamdipta 2022 (arXiv 2110.08420), definition 3.1. f[x] are the
    checkpoints, f[∅] references that were trained on empty inputs and are shown one. Both losses
    are the negative logarithm of the label's probability; of a document behind a prompt that is of
    its tokens, mean or sum by the row loss, and the empty input an empty prompt. Means over the
    checkpoints of a run and over the references.
    """

    direction: ClassVar[Direction] = Direction(
        high_means="easy: its input tells the label; negative: probably mislabelled",
        keep="high",
        source="Ethayarajh et al. 2022 read low as hard or wrong; dropping by it beats random "
        "little beyond a tenth of the rows (Anand et al. 2023)",
        valid="models trained alike, one on empty inputs",
    )
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal("loss"), Signal("null_loss")})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        null = signals[Signal("null_loss")].mean(2)
        return (null - signals[Signal("loss")]).mean(0) / math.log(2)
