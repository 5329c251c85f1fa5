"""Similarity of a row's gradient with that of a target set (TracIn, DVGS, LESS)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.adam_readout import UPDATES
from curate.scorers.protocol import Direction, Signal

MODES = "tracin", "dvgs", "less"
SIMILARITIES = "cosine", "dot"
GROUPS = "max", "mean"

_DIRECTIONS: dict[str, Direction] = {
    "tracin": Direction(
        high_means="helps the target: a step on this row lowers the target's loss",
        keep="high",
        source="Pruthi et al. 2020; Xia et al. 2024 keep high",
        valid="checkpoints spread over a run; a clean target drawn as the model will be used",
        asks=("spread_checkpoints",),
    ),
    "dvgs": Direction(
        high_means="good: its gradient agrees with the target's",
        keep="high",
        source="Evans et al. 2024",
        valid="checkpoints of a model that is trained on the target",
        asks=("trained_on_target",),
    ),
    "less": Direction(
        high_means="helps the target: Adam's step on this row lowers the target's loss",
        keep="high",
        source="Xia et al. 2024 keep the 5 % that are highest",
        valid="checkpoints of a short warm-up run with Adam, moments saved; a clean target",
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

    `mode="less"` is LESS itself (Xia et al. 2024, definition 3.1 and section 4):

        max_m mean_{z' in m} Σ_k w_k cos(Γ(z; θ_k), ∇_θ ℓ(z'; θ_k))

    Γ is the step that Adam would take at θ_k on the row alone, from the checkpoint's moments;
    `adam` says in which form (`Moments.step`). Target rows have plain gradients, each brought to
    length 1 before the mean. w are the mean learning rates of the steps that led to each checkpoint
    from the one before. `projection=8192` compares dense Rademacher projections instead, as the
    published code does; 0 compares the gradients.

    Raises:
        ValueError: a setting that is none of these, or one that the mode does not have.
    """

    params: str = ""
    mode: str = "tracin"
    similarity: str = "cosine"
    groups: str = "max"
    adam: str = "less"
    projection: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", MODES), ("similarity", SIMILARITIES), ("groups", GROUPS), ("adam", UPDATES)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"grad_similarity: {name} is one of {', '.join(choices)}, "
                    f"not {getattr(self, name)!r}"
                )
        if not isinstance(self.projection, int) or self.projection < 0:
            raise ValueError(
                f"grad_similarity: projection is a number of dimensions, not {self.projection!r}"
            )
        if self.mode == "less" and self.similarity != "cosine":
            raise ValueError("grad_similarity: mode less compares by similarity cosine alone")
        if self.mode != "less" and (self.projection or self.adam != "less"):
            raise ValueError(
                f"grad_similarity: adam and projection belong to mode less, not to {self.mode}"
            )

    @property
    def direction(self) -> Direction:
        known = _DIRECTIONS[self.mode]
        if self.similarity == "cosine":
            return known
        at_top = "; wrong labels are at the top as well" if self.groups == "max" else ""
        return replace(
            known,
            high_means="its long gradient agrees with the target's: helps it if the row's own "
            f"label is right{at_top}",
            valid=f"{known.valid}; rows whose labels are right",
            asks=(*known.asks, "right_labels"),
        )

    @property
    def needs(self) -> frozenset[Signal]:
        if self.mode == "less":
            return frozenset(self._of_adam())
        dot = Signal("target_dot", self.params)
        if self.similarity == "dot":
            return frozenset({dot})
        norms = Signal("grad_sq_norm", self.params), Signal("target_norm", self.params)
        return frozenset({dot, *norms})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        if self.mode == "less":
            square, value = (signals[s] for s in self._of_adam())
            value = cosine(value, square[:, :, None], torch.ones_like(value))
        elif self.similarity == "dot":
            value = signals[Signal("target_dot", self.params)]
        else:
            value = signals[Signal("target_dot", self.params)]
            square = signals[Signal("grad_sq_norm", self.params)][:, :, None]
            value = cosine(value, square, signals[Signal("target_norm", self.params)])
        if self.mode == "dvgs":
            weights = torch.full_like(weights, 1 / len(weights))
        of_group = torch.einsum("k,kbm->bm", weights, value)
        return of_group.amax(1) if self.groups == "max" else of_group.mean(1)

    def _of_adam(self) -> tuple[Signal, Signal]:
        """Return the signals of the step: its squared norm, and its products with the target."""
        of = {"params": self.params, "adam": self.adam, "projection": self.projection}
        return Signal("adam_sq_norm", **of), Signal("adam_target_dot", **of)  # type: ignore[arg-type]


def cosine(
    dot: Float[Tensor, "k b m"], square: Float[Tensor, "k b 1"], norm: Float[Tensor, "k b m"]
) -> Float[Tensor, "k b m"]:
    """Return the cosine in [-1, 1] from an inner product, a squared norm and a norm.

    0 where one of the two vectors vanishes, NaN where their lengths are beyond float32.
    """
    # Squares come in float32: below its normal range they have no digits left, and count as none.
    is_none = (square < torch.finfo(torch.float32).tiny) | (norm == 0)
    length = (square.sqrt() * norm).masked_fill(is_none, 1)
    value = (dot / length).clamp(-1, 1).masked_fill(is_none, 0)
    return value.masked_fill(length.isinf(), torch.nan)  # beyond float32: no 0, but unknown
