"""Similarity of a row's gradient with that of a target set (TracIn, DVGS)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal

MODES = "tracin", "dvgs"
SIMILARITIES = "cosine", "dot"
GROUPS = "max", "mean"

_DIRECTIONS: dict[str, Direction] = {
    "tracin": Direction(
        high_means="helps the target: a step on this row lowers the target's loss",
        keep="high",
        source="Pruthi et al. 2020; Xia et al. 2024 keep high",
        valid="checkpoints spread over a run; a clean target drawn as the model will be used",
    ),
    "dvgs": Direction(
        high_means="good: its gradient agrees with the target's",
        keep="high",
        source="Evans et al. 2024",
        valid="checkpoints of a model that is trained on the target",
    ),
}


@dataclass(frozen=True)
class GradSimilarity:
    """max_m Σ_k w_k cos(∇_θ ℓ(θ_k; x, y), ḡ_m(θ_k)), ḡ_m the mean gradient of target group m.

    `mode` says what the checkpoints are, and so the weights w: in `tracin` those of a training
    run, by learning rate (TracInCP, Pruthi et al. 2020, arXiv 2002.08484); in `dvgs` those of a
    proxy trained on the target, equal (Evans et al. 2024, section 3). `similarity="dot"` gives
    TracIn's inner product; the cosine, in [-1, 1], does not let large gradients decide. A row or
    a group without a gradient has 0. `groups="mean"` averages over groups where `max` takes the
    best, as LESS does over its sub-tasks (Xia et al. 2024, arXiv 2402.04333); the mean loses
    groups that pull in different directions. `params` limits θ as in GraNd.

    Raises:
        ValueError: a setting that is none of these.
    """

    params: str = ""
    mode: str = "tracin"
    similarity: str = "cosine"
    groups: str = "max"

    def __post_init__(self) -> None:
        if self.mode == "less":
            raise ValueError(
                "grad_similarity: mode less needs Adam's moments, which checkpoints do not hold; "
                "choose tracin or dvgs"
            )
        for name, choices in (("mode", MODES), ("similarity", SIMILARITIES), ("groups", GROUPS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"grad_similarity: {name} is one of {', '.join(choices)}, "
                    f"not {getattr(self, name)!r}"
                )

    @property
    def direction(self) -> Direction:
        return _DIRECTIONS[self.mode]

    @property
    def needs(self) -> frozenset[Signal]:
        dot = Signal("target_dot", self.params)
        if self.similarity == "dot":
            return frozenset({dot})
        norms = Signal("grad_sq_norm", self.params), Signal("target_norm", self.params)
        return frozenset({dot, *norms})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        value = signals[Signal("target_dot", self.params)]
        if self.similarity == "cosine":
            square = signals[Signal("grad_sq_norm", self.params)][:, :, None]
            value = _cosine(value, square, signals[Signal("target_norm", self.params)])
        if self.mode == "dvgs":
            weights = torch.full_like(weights, 1 / len(weights))
        of_group = torch.einsum("k,kbm->bm", weights, value)
        return of_group.amax(1) if self.groups == "max" else of_group.mean(1)


def _cosine(
    dot: Float[Tensor, "k b m"], square: Float[Tensor, "k b 1"], norm: Float[Tensor, "k b m"]
) -> Float[Tensor, "k b m"]:
    # Squares come in float32: below its normal range they have no digits left, and count as none.
    is_none = (square < torch.finfo(torch.float32).tiny) | (norm == 0)
    length = (square.sqrt() * norm).masked_fill(is_none, 1)
    cosine = (dot / length).clamp(-1, 1).masked_fill(is_none, 0)
    return cosine.masked_fill(length.isinf(), torch.nan)  # beyond float32: no 0, but unknown
