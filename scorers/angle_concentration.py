"""Angle concentration: how far the hidden states of a row's tokens point the same way (GAIN-RL)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal, SignalKind

VARIANTS: dict[str, SignalKind] = {
    "paper": "angle_paper",
    "pairs": "angle_pairs",
    "code": "angle_code",
}


@dataclass(frozen=True)
class AngleConcentration:
    """C_intra + w C_inter, mean over the checkpoints of a run. Wang et al. 2025 (arXiv 2506.02281).

    With u_t the hidden state that enters the up projection of the last block's MLP at token t,
    brought to length 1, of the n tokens of the row itself:

        paper   C_intra = (1/n²) Σ_{s,t} u_s·u_t, a token with itself included
        pairs   C_intra = mean of u_s·u_t over different tokens: not higher for being short. Ours
        code    C_intra = (1/n²) Σ_{s ≤ t+1} u_t·u_s: the lower triangle and one diagonal above
                it, the rest counted as 0, as the authors' code has it

    C_inter is the mean of u_s·u_t over the row's own tokens s and those of its prompt t, 0 where
    the task has no prompt; its weight w is `prompt_weight`, by default 1 (`code`: 8). Their code
    slices rows twice and takes the first 110 tokens for the prompt; here both are the task's.

    `layer` is a regular expression for the module that the hidden states enter, where its name is
    not a known one; the last that matches counts. A forward pass is enough.

    Raises:
        ValueError: a setting that is none of these.
    """

    variant: str = "paper"
    prompt_weight: float | int | None = None
    layer: str = ""

    direction: ClassVar[Direction] = Direction(
        high_means="its tokens point one way: larger gradients, learnt first",
        keep="high",
        source="Wang et al. 2025 order by it, high first",
        valid="transformers; made for prompts of reinforcement learning, with the model to train",
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"angle_concentration: variant is {self.variant!r}; choose one of: "
                f"{', '.join(VARIANTS)}"
            )
        weight = self.prompt_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float | None):
            raise ValueError(f"angle_concentration: prompt_weight is a number, not {weight!r}")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self._intra, self._inter})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        weight = self.prompt_weight
        if weight is None:
            weight = 8.0 if self.variant == "code" else 1.0
        return (signals[self._intra] + weight * signals[self._inter]).mean(0)

    @property
    def _intra(self) -> Signal:
        return Signal(VARIANTS[self.variant], self.layer)

    @property
    def _inter(self) -> Signal:
        return Signal("angle_prompt", self.layer)
