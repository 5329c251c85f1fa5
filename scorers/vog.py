"""VoG: how much the target logit's gradient with respect to the input varies over training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal, SignalKind

VARIANTS = "std", "var", "printed"
NORMALISATIONS = "raw", "class", "dataset"


@dataclass(frozen=True)
class VoG:
    """Variance of Gradients: over K checkpoints of a run, then the mean over input coordinates.

    With S_k = ∂z_y/∂x at checkpoint k (z_y the pre-softmax logit of the row's own class) and
    M2 = Σ_k (S_k − mean)² per coordinate:

        std      √(M2 / K)        Agarwal, D'souza and Hooker 2022 (arXiv 2008.11600), their code
        var      M2 / K           Anand et al. 2023 (arXiv 2311.16298), algorithm 1
        printed  M2 / √K          the same, the formula of appendix B.1

    x are the pixels of an image, the mean over channels taken first; the features of a table; the
    embeddings of a text's tokens, padding left out. A row with several target tokens has the sum
    of their logits for z_y.

    `normalise` standardises the finished column, (v − mean) / std with divisor n, among the rows
    of one label (`class`) or all rows (`dataset`); where all are alike it gives 0.
    """

    variant: str = "std"
    normalise: str = "raw"

    direction: ClassVar[Direction] = Direction(
        high_means="hard or atypical: what the logit looks at still changes",
        keep="high",
        source="Anand et al. 2023 keep high; Agarwal et al. 2022 show high ones to people",
        valid="two or more checkpoints of a run, models that are not linear",
        asks=("several_checkpoints", "nonlinear"),
    )

    def __post_init__(self) -> None:
        for name, known in (("variant", VARIANTS), ("normalise", NORMALISATIONS)):
            if getattr(self, name) not in known:
                choices = ", ".join(known)
                raise ValueError(
                    f"vog: {name} is {getattr(self, name)!r}; choose one of: {choices}"
                )

    @property
    def needs(self) -> frozenset[Signal]:
        kind: SignalKind = "vog_std" if self.variant == "std" else "vog_var"
        return frozenset({Signal(kind)})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "j b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        (signal,) = self.needs
        spread: Tensor = signals[signal][0]
        return spread * math.sqrt(len(weights)) if self.variant == "printed" else spread
