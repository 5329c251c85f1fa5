"""Which sequences make a row: one each, or the windows that a long document was cut into.

Shapes: S sequences, B rows, M sequences of a row at most, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowMap:
    """The row of each of S sequences; `ids` None means one sequence per row, in order."""

    rows: int
    ids: Int[Tensor, " s"] | None = None

    def add(self, x: Float[Tensor, "s ..."]) -> Float[Tensor, "b ..."]:
        """Return the sum over each row's sequences."""
        if self.ids is None:
            return x
        return x.new_zeros(self.rows, *x.shape[1:]).index_add_(0, self.ids, x)

    def total(self, x: Float[Tensor, "s ..."]) -> Float[Tensor, " b"]:
        """Return the sum over each row's sequences and everything in them."""
        return self.add(x.flatten(1).sum(1) if x.dim() > 1 else x)

    def end_to_end(self, x: Tensor, axis: int, fill: int = 0) -> Tensor:
        """Return x with a row's sequences laid end to end along its token axis, `fill` after them.

        Both factors of a gradient are filled: 0 times another row's infinity would not be 0.
        """
        if self.ids is None:
            return x
        index, real = self._groups
        y = x[index]  # [B, M, ...]
        y = y.masked_fill(~real.view(*real.shape, *(1,) * (y.dim() - 2)), fill)
        return y.movedim(1, axis).flatten(axis, axis + 1)

    def apart(self, x: Float[Tensor, "b mt"]) -> Float[Tensor, "s t"]:
        """Return the sequences that `end_to_end` laid along axis 1."""
        if self.ids is None:
            return x
        return x.reshape(self._groups[0].numel(), -1)[self._places]

    @property
    def most(self) -> int:
        """The largest number of sequences that a row has."""
        return 1 if self.ids is None else self._groups[0].shape[1]

    # Asked of the device once per batch: each of these waits for it.

    @cached_property
    def _groups(self) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """The sequences of each row (0 where there is none) and which are real."""
        assert self.ids is not None, "asked where there are several"
        counts = torch.bincount(self.ids, minlength=self.rows)
        order = self.ids.argsort(stable=True)
        place = torch.arange(len(order), device=order.device)
        place = place - (counts.cumsum(0) - counts)[self.ids[order]]
        index = torch.zeros(self.rows, int(counts.max()), dtype=torch.long, device=order.device)
        index[self.ids[order], place] = order
        return index, torch.arange(index.shape[1], device=order.device) < counts[:, None]

    @cached_property
    def _places(self) -> Int[Tensor, " s"]:
        """Where each sequence stands among the B * M."""
        assert self.ids is not None, "asked where there are several"
        index, real = self._groups
        places = torch.empty_like(self.ids)
        places[index[real]] = real.flatten().nonzero().flatten()
        return places
