"""Loss change: what training won on a row."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal

SINCE = "reference", "first", "auto"

_MEANS = "learnt in training; near 0: known before, or never learnt; negative: got worse"
_SOURCE = "the difference itself; no paper's rule"
_DIRECTIONS = {
    False: Direction(_MEANS, "high", _SOURCE, "a reference from before the training"),
    True: Direction(
        _MEANS, "high", _SOURCE, "first and last checkpoints of a run far apart",
        ("several_checkpoints",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LossChange:
    """The row's loss before training less its loss after, in nats: positive where it fell.

    `since="reference"`: ℓ(reference) - ℓ(checkpoint), the mean over the checkpoints of a run, less
    those of the references; the reference is an earlier checkpoint, or the model before it was
    fine-tuned. `since="first"`: ℓ at the first checkpoint of the run less ℓ at its last. `auto`
    is the one where a reference is given, the other where none is; a run writes down which.

    Raises:
        ValueError: `since` is none of these.
    """

    since: str = "auto"

    def __post_init__(self) -> None:
        if self.since not in SINCE:
            raise ValueError(f"loss_change: since is one of {', '.join(SINCE)}, not {self.since!r}")

    @property
    def direction(self) -> Direction:
        return _DIRECTIONS[self.is_of_run]

    @property
    def needs(self) -> frozenset[Signal]:
        own = frozenset({Signal("loss")})
        return own | {Signal("reference_loss")} if self.since == "reference" else own

    @property
    def is_of_run(self) -> bool:
        """Whether it takes several checkpoints, so that one alone has no value of its own."""
        return self.since != "reference"

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b ..."]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        loss = signals[Signal("loss")]
        if self.since == "reference":
            return (signals[Signal("reference_loss")].mean(2) - loss).mean(0)
        return loss[0] - loss[-1]
