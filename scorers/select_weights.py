"""SELECT: rows whose gradients lead from one set of weights to another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.grad_similarity import cosine
from curate.scorers.protocol import Direction, Signal

SIMILARITIES = "cosine", "dot"


@dataclass(frozen=True)
class SelectWeights:
    """cos(∇_θ ℓ(θ; x, y), θ - θ_expert), θ the checkpoint's weights, mean over those of a run.

    Morris et al. 2025, SELECT: the direction is made of the weights of a model and of one that was
    trained further (the expert, a reference), not of a target's rows. A descent step on a row moves
    θ by -η ∇ℓ, so a high value leads toward the expert. `params` are the parameters compared: the
    head by default, as in the source, weight and bias; a tied embedding counts with all its uses.
    The source compares random projections of both; here they are compared as they are.
    `similarity="dot"` is the inner product. A row without a gradient has 0.

    Raises:
        ValueError: `similarity` is neither.
    """

    params: str = "head"
    similarity: str = "cosine"

    direction: ClassVar[Direction] = Direction(
        high_means="like what the expert was trained on: a step on it leads toward the expert",
        keep="high",
        source="Morris et al. 2025 keep the highest",
        valid="checkpoints that the expert was trained from",
    )

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(
                f"select_weights: similarity is one of {', '.join(SIMILARITIES)}, "
                f"not {self.similarity!r}"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        dot = frozenset({Signal("weights_dot", self.params)})
        if self.similarity == "dot":
            return dot
        return dot | {Signal("grad_sq_norm", self.params), Signal("weights_norm", self.params)}

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        dot = signals[Signal("weights_dot", self.params)]
        if self.similarity == "dot":
            return dot.mean(0)
        square = signals[Signal("grad_sq_norm", self.params)]
        norm = signals[Signal("weights_norm", self.params)]
        return cosine(dot[..., None], square[..., None], norm[..., None]).mean(0)[:, 0]
