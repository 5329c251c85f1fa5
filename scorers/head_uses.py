"""The use of a head together with its loss: `linear_cross_entropy`, seen by the taps as one call.

Shapes: S sequences, T tokens, D hidden size, B rows, N all tokens, V vocabulary, M directions.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.cross_entropy import TokenStatistics, active_gathering
from curate.kernels.linear_head import HeadSums, HeadWants, head_pass
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Full, Layout, Part
from curate.scorers.protocol import IGNORE
from curate.scorers.readouts import Dots, Readout, TwoSidedSketch, sq_norm
from curate.scorers.row_map import RowMap
from curate.scorers.uses import Lookup, Saved, Use, by_role


class HeadCall:
    """One call of the head and its loss. What is wanted of it must be said before it is made."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor):
        self.weight, self.bias, self.targets = weight, bias, targets
        self.saved, self._hidden = Saved(hidden), hidden
        self._wants, self._row_map = HeadWants(), RowMap(len(targets))
        self._by_row = False
        self._directions: tuple[Tensor, ...] = ()
        self.sums: HeadSums | None = None

    def prepare(
        self,
        layout: Layout | None,
        row_map: RowMap,
        wants: HeadWants,
        directions: Sequence[Tensor] = (),
    ) -> None:
        """Say which sequences make a row, and what is to be summed over the vocabulary.

        `directions` are the sets that `wants.directions` holds one after another. Only of
        sequences along axis 0, [S, T, D] or [S, D]; elsewhere the errors are made again.
        """
        self._row_map, self._directions = row_map, tuple(directions)
        if layout is None or layout.kind != "dense" or layout.axis != 0 or self._hidden.dim() > 3:
            self._wants = HeadWants(statistics=wants.statistics)
            return
        tokens = self._hidden[0].numel() // self._hidden.shape[-1]
        tokens *= row_map.most
        # The Gram form costs t^2 v, the other 2 t v d: the errors again, and the products.
        gram = wants.gram and tokens <= 2 * self._hidden.shape[-1]
        self._by_row, self._wants = True, replace(wants, gram=gram)

    def __call__(self) -> Tensor:
        """Return the loss of each token, in the shape of the targets."""
        given = hidden = self._hidden
        self._hidden = hidden.detach()
        targets = self.targets
        if not self._by_row:
            hidden, targets = hidden.reshape(-1, 1, hidden.shape[-1]), targets.reshape(-1, 1)
        elif hidden.dim() == 2:
            hidden, targets = hidden[:, None], targets[:, None]
        if self._by_row:
            hidden = self._row_map.end_to_end(hidden, 1)
            targets = self._row_map.end_to_end(targets, 1, fill=IGNORE)
        loss, self.sums = head_pass(hidden, self.weight, self.bias, targets, self._wants)
        gathered, statistics = active_gathering(), self.sums.statistics
        if gathered is not None and statistics is not None:
            gathered.head = TokenStatistics(*(self._as_given(x) for x in statistics))
            gathered.keep(given, gathered.head)
        # A row without targets may have an infinite seed (1 / 0): no gradient, as of its logits.
        return self._as_given(loss).masked_fill(self.targets == IGNORE, 0.0)

    def _as_given(self, x: Tensor) -> Tensor:
        """Return one number per token in the shape of the targets."""
        return (self._row_map.apart(x) if self._by_row else x).reshape(self.targets.shape)

    def part(self, g: Tensor, layout: Layout) -> HeadPart:
        """Return the gradient's part, by rows, from the gradient at the tokens' losses."""
        assert self.sums is not None, "the call was made"
        sums = self.sums
        if not self._by_row:
            lse, error_target, error_sq = (
                self._by_rows(x.reshape(self.targets.shape), layout)
                for x in (sums.lse, sums.error_target, sums.error_sq)
            )
            sums = sums._replace(lse=lse, error_target=error_target, error_sq=error_sq)
        hidden = layout.rows_first(self.saved.get())
        hidden = hidden.reshape(len(hidden), -1, hidden.shape[-1])
        g = g.masked_fill(self.targets == IGNORE, 0.0)
        targets, seeds = self._by_rows(self.targets, layout, IGNORE), self._by_rows(g, layout)
        hidden = self._row_map.end_to_end(hidden, 1)
        return HeadPart(
            hidden, self.weight, self.bias, targets, sums, seeds,
            self._directions, self._wants.sketch,
        )  # fmt: skip

    def _by_rows(self, x: Tensor, layout: Layout, fill: int = 0) -> Tensor:
        x = layout.rows_first(x)
        return self._row_map.end_to_end(x.reshape(len(x), -1), 1, fill)


def head_wants(
    name: str,
    readouts: Sequence[Readout],
    alignment: bool,
    looked_up: Int[Tensor, "s u"] | None,
    row_map: RowMap,
) -> HeadWants:
    """Return the sums over the vocabulary from which these readouts of a head's weight are made.

    `looked_up` are the ids of the one look-up in the same matrix, where it is tied.
    """
    wants = HeadWants(aligned=alignment, gram=alignment or sq_norm in readouts)
    if sq_norm in readouts and looked_up is not None:
        wants = replace(wants, columns=row_map.end_to_end(looked_up, 1))
    for read in readouts:
        if isinstance(read, TwoSidedSketch):
            wants = replace(wants, sketch=(read.keys(name)[0], read.k[0]))
    if directions := head_directions(name, readouts):
        # One set as it is: the copy may be large.
        together = directions[0] if len(directions) == 1 else torch.cat(directions)
        wants = replace(wants, directions=together)
    return wants


def head_directions(name: str, readouts: Sequence[Readout]) -> list[Float[Tensor, "_ v d"]]:
    """Return the directions of each readout that takes inner products with a head's weight."""
    return [read.directions[name] for read in readouts if isinstance(read, Dots)]


def linear_cross_entropy(
    param: Lookup, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Use | None:
    """Read a call of the head with its loss."""
    w, b = param(weight), param(bias)
    if w is None or w.transposed or param(hidden):
        return None
    call = HeadCall(hidden, weight, bias, targets)

    def parts(g: Tensor, layout: Layout, roles: frozenset[str]) -> dict[str, Part]:
        out: dict[str, Part] = {}
        part = call.part(g, layout)
        if "weight" in roles:
            out["weight"] = part
        if "bias" in roles:
            out["bias"] = Full(part.bias_gradient(), by_row=True)
        return out

    params = by_role(weight=w, bias=b)
    return Use("linear_head", params, parts, _first, [call.saved], call=call)


def _first(axis: int, axes: int) -> bool:
    return axis == 0
