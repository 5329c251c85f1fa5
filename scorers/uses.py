"""What one use of a parameter in a forward pass contributes to the parameter's per-row gradient.

Shapes: S sequences, T tokens or positions, O and I the sides of a matrix, g groups.

A use keeps what it needs of its inputs; given the gradient g of its output it returns, for each
of its parameters, a part: factors whose product is the gradient, never a matrix's gradient itself.
Which torch functions are known is said in `readers.py`; the others have another path (fallback.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curate.scorers.parts import Layout, Part
from curate.scorers.readouts import TwoSidedSketch


class Overwritten(Exception):
    """An input was changed in place between the use and the backward pass.

    With frozen weights autograd does not notice: it has no need of that input itself.
    """


class Saved:
    """A tensor as it was when it was used."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def keep_copy(self) -> None:
        """Outlive a change in place."""
        self._tensor = self._tensor.clone()
        self._version = self._tensor._version

    def drop(self) -> None:
        """Let the memory go. The use itself lives as long as the graph that its hook is in."""
        del self._tensor

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise Overwritten
        return self._tensor


@dataclass(frozen=True)
class Param:
    """A parameter, or its transpose, as a function received it."""

    name: str
    shape: torch.Size
    transposed: bool = False


@dataclass
class Use:
    """One call that consumed parameters. `params` are by role: weight, bias."""

    kind: str
    params: dict[str, Param]
    parts: Callable[[Tensor, Layout, frozenset[str]], dict[str, Part]]
    """From the output's gradient, its layout and the roles wanted, to one part per role."""
    takes_row_axis: Callable[[int, int], bool]
    """Whether the rows may run along this axis of an output of so many axes."""
    saved: list[Saved] = field(default_factory=list)
    may_be_shared: bool = False
    """The output may be the same for all rows (a look-up of positions [1, T])."""
    call: Callable[[], Tensor] | None = None
    """How the call is made where it is more than the function itself."""
    shrink: Callable[[Layout, TwoSidedSketch], None] | None = None
    """Keep of the input only what the sketch of the weight's gradient takes of it."""


Lookup = Callable[[object], Param | None]
"""How a reader asks whether a value is a tracked parameter."""


def by_role(**params: Param | None) -> dict[str, Param]:
    """Return the parameters that are there, by the role they play."""
    return {role: p for role, p in params.items() if p is not None}


def per_channel(g: Tensor, layout: Layout) -> Tensor:
    """Return [S, C] from [N, C, *positions]."""
    g = g.flatten(2).sum(2) if g.dim() > 2 else g
    g = layout.rows_first(g)
    return g.sum(1) if g.dim() == 3 else g
