"""What is to be read off a pass over a batch, and what was.

Shapes: B rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from curate.scorers.logit_grad import LogitGradient
from curate.scorers.readouts import Readout


@dataclass(frozen=True)
class Needs:
    """What is to be read off a pass."""

    readouts: Mapping[str, tuple[frozenset[str], Readout]] = field(default_factory=dict)
    """By a name of their own: the parameters each is wanted of, and what is read off them."""
    statistics: bool = False
    logit_norm: bool = False
    alignment: bool = False
    hidden: bool = False
    input_grad: bool = False
    logit_grad: bool = False
    probs: bool = False

    @property
    def params(self) -> frozenset[str]:
        return frozenset().union(*(names for names, _ in self.readouts.values()))

    @property
    def head(self) -> bool:
        return self.alignment or self.hidden

    @property
    def of_loss(self) -> bool:
        """Whether the loss is differentiated."""
        return bool(self.params) or self.logit_norm or self.alignment or self.input_grad

    @property
    def differentiates(self) -> bool:
        return self.of_loss or self.logit_grad

    @property
    def inputs(self) -> bool:
        """Whether gradients of the model's inputs are wanted."""
        return self.input_grad or self.logit_grad


@dataclass
class Harvest:
    """What was read off a pass, everything per row."""

    loss: Float[Tensor, " b"]
    readouts: dict[str, dict[str, Tensor]]
    """Per readout and parameter. A parameter that the loss does not depend on is absent."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    logit_norm: Float[Tensor, " b"] | None = None
    alignment: Float[Tensor, " b"] | None = None
    hidden: Tensor | None = None
    targets: Tensor | None = None
    row_ids: Tensor | None = None
    input_grad: dict[str, Tensor] = field(default_factory=dict)
    logit_grad: LogitGradient | None = None
    probs: Float[Tensor, "b c"] | None = None
