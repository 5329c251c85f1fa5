"""The factors of a parameter's per-row gradient.

Shapes: B rows, S sequences, T tokens, g groups, O and I the sides of a matrix.

A `Part` is what one use of a parameter contributes, sequences first. `join` adds the uses of one
backward pass exactly, and the sequences of a row, before anything is squared. What is read off the
sum is said in `readouts.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.conv import Geometry, split, unfold
from curate.kernels.grad_norm import accumulable
from curate.scorers.head_part import HeadPart
from curate.scorers.row_map import RowMap


@dataclass(frozen=True)
class Layout:
    """Where the sequences are in a tensor.

    dense: along `axis`. flat: axis 0 is S * f, sequence by sequence. interleaved: axis 0 is f * S,
    the sequence running fastest. shared: the same for all sequences, spread over a leading axis of
    size 1, or (`shared_new`) over a new leading axis.
    """

    kind: Literal["dense", "flat", "interleaved", "shared", "shared_new"]
    axis: int = 0
    sequences: int = 0

    def rows_first(self, x: Tensor) -> Tensor:
        """Return x with the sequences along axis 0; a flat axis becomes two."""
        if self.kind == "flat":
            return x.reshape(self.sequences, -1, *x.shape[1:])
        if self.kind == "interleaved":
            return x.reshape(-1, self.sequences, *x.shape[1:]).transpose(0, 1)
        return x.movedim(self.axis, 0)

    def spread(self, x: Tensor) -> Tensor:
        """Return a shared tensor once per sequence; any other as it is."""
        if self.kind == "shared_new":
            x = x.unsqueeze(0)
        if self.kind.startswith("shared"):
            return x.expand(self.sequences, *x.shape[1:])
        return x

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape can be laid out so."""
        if self.kind == "shared_new":
            return True
        if self.kind == "shared":
            return len(shape) > 0 and shape[0] == 1
        if len(shape) <= self.axis:
            return False
        size = shape[self.axis]
        return size == self.sequences if self.kind == "dense" else size % self.sequences == 0


@dataclass(frozen=True)
class Pair:
    """sum_t left_t right_t^T per group: the gradient of a matrix of g * O rows and I columns."""

    left: Float[Tensor, "s g t o"]
    right: Float[Tensor, "s g t i"]
    swapped: bool | None = False
    """Whether the layer's inputs are on the left, its parameter stored as [inputs, outputs]. None:
    in some of its uses."""


@dataclass(frozen=True)
class Convolved:
    """A pair whose right factors are the patches of an input, made only if somebody looks."""

    grad: Float[Tensor, "s o *y"]
    input: Float[Tensor, "s c *x"]
    geometry: Geometry

    @cached_property
    def left(self) -> Float[Tensor, "s g t o"]:
        return split(self.grad, self.geometry)

    @cached_property
    def right(self) -> Float[Tensor, "s g t i"]:
        return unfold(self.input, self.geometry)


@dataclass(frozen=True)
class Indexed:
    """sum_t unit(index_t) right_t^T: the gradient of a table of rows."""

    index: Int[Tensor, "s t"]
    right: Float[Tensor, "s t d"]


@dataclass(frozen=True)
class Full:
    """The gradient itself: of vectors, and of what has no factors."""

    grad: Float[Tensor, "s ..."]
    by_row: bool = False
    """The sequences of a row are summed already."""


@dataclass(frozen=True)
class Sketched:
    """A two-sided sketch of the gradient, where nothing else of it is wanted."""

    value: Float[Tensor, "s kk"]


Part = Pair | Convolved | HeadPart | Indexed | Full | Sketched


def is_by_row(part: Part) -> bool:
    """Return whether the sequences of a row are together in it already."""
    return isinstance(part, HeadPart) or (isinstance(part, Full) and part.by_row)


@dataclass(frozen=True)
class Gradient:
    """The per-row gradient of one parameter as a sum of at most three parts, rows first."""

    name: str
    shape: torch.Size
    pair: Pair | Convolved | HeadPart | None = None
    indexed: Indexed | None = None
    full: Full | None = None

    @property
    def rows(self) -> int:
        """How many rows it is of."""
        if self.full is not None:
            return len(self.full.grad)
        if self.indexed is not None:
            return len(self.indexed.index)
        assert self.pair is not None, "a gradient without parts"
        return len(self.pair.right)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The parameter as a matrix: axis 0 against all others (a vector is one row)."""
        if len(self.shape) < 2:
            return 1, self.shape.numel()
        return self.shape[0], self.shape[1:].numel()

    def materialised(self, rows: slice) -> Float[Tensor, "b r c"]:
        """Return the gradients of some rows as matrices."""
        r, c = self.matrix_shape
        total: Tensor | None = None
        if self.full is not None:
            total = accumulable(self.full.grad[rows]).reshape(-1, r, c).clone()
        if self.pair is not None:
            if isinstance(self.pair, HeadPart):
                left = self.pair.error(rows)[:, None]
            else:
                left = accumulable(self.pair.left[rows])
            right = accumulable(self.pair.right[rows])
            grad = (left.mT @ right).flatten(1, 2)
            total = grad if total is None else total.add_(grad)
        if self.indexed is not None:
            index, right = self.indexed.index[rows], accumulable(self.indexed.right[rows])
            if total is None:
                total = right.new_zeros(len(right), r, c)
            total.scatter_add_(1, index[..., None].expand_as(right), right)
        assert total is not None, "a gradient without parts"
        return total


def join(name: str, shape: torch.Size, parts: Sequence[Part], row_map: RowMap) -> Gradient:
    """Return the sum of the uses' parts, with the sequences of each row brought together."""
    pairs = [p for p in parts if isinstance(p, (Pair, Convolved, HeadPart))]
    indexed = [p for p in parts if isinstance(p, Indexed)]
    fulls = [p for p in parts if isinstance(p, Full)]
    gradient = Gradient(name, shape)
    if len(pairs) == 1 and (row_map.ids is None or isinstance(pairs[0], HeadPart)):
        gradient = replace(gradient, pair=pairs[0])
    elif pairs:
        sides = [
            (p.left, p.right)
            if isinstance(p, HeadPart)
            else (row_map.end_to_end(p.left, 2), row_map.end_to_end(p.right, 2))
            for p in pairs
        ]
        left, right = (_concat([side[i] for side in sides], 2) for i in (0, 1))
        swapped = {p.swapped if isinstance(p, Pair) else False for p in pairs}
        way = swapped.pop() if len(swapped) == 1 else None
        gradient = replace(gradient, pair=Pair(left, right, way))
    if indexed:
        index = row_map.end_to_end(_concat([p.index for p in indexed], 1), 1)
        right = row_map.end_to_end(_concat([p.right for p in indexed], 1), 1)
        gradient = replace(gradient, indexed=Indexed(index, right))
    if fulls:
        grads = [p.grad if p.by_row else row_map.add(p.grad) for p in fulls]
        total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
        gradient = replace(gradient, full=Full(total, by_row=True))
    return gradient


def _concat(tensors: list[Tensor], axis: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.to(torch.promote_types(tensors[0].dtype, t.dtype)) for t in tensors], axis)


def alone(name: str, shape: torch.Size, part: Part) -> Gradient:
    """Return the gradient that one part is, sequences first."""
    if isinstance(part, (Pair, Convolved, HeadPart)):
        return Gradient(name, shape, pair=part)
    if isinstance(part, Indexed):
        return Gradient(name, shape, indexed=part)
    assert isinstance(part, Full), "a sketch is read off already"
    return Gradient(name, shape, full=part)
