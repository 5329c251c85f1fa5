"""The factors of a parameter's per-row gradient, and what is read off them.

Shapes: B rows, S sequences, T tokens, g groups, O and I the sides of a matrix.

A `Part` is what one use of a parameter contributes, sequences first. `join` adds the uses of one
backward pass exactly, and the sequences of a row, before anything is squared; a `Readout` turns
the sum into a number or a vector per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curate.kernels.conv import Geometry, conv_sketch, conv_sq_norm, split, unfold
from curate.kernels.dot import grad_dot, grad_dot_matrix, grad_dot_rows
from curate.kernels.embedding import embedding_cross, embedding_sq_norm
from curate.kernels.grad_norm import accumulable, accumulator, chunks, grad_sq_norm, inner
from curate.kernels.projection import project, project_matrix, project_rows
from curate.kernels.rademacher import Key, stream_key
from curate.kernels.sketch import sketch, sketch_matrix, sketch_rows, sketch_vector
from curate.scorers.head_part import HeadPart


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


def join(
    name: str, shape: torch.Size, parts: Sequence[Part], rows: int, row_ids: Tensor | None
) -> Gradient:
    """Return the sum of the uses' parts, with the sequences of each row brought together."""
    groups = None if row_ids is None else group_rows(row_ids, rows)
    pairs = [p for p in parts if isinstance(p, (Pair, Convolved, HeadPart))]
    indexed = [p for p in parts if isinstance(p, Indexed)]
    fulls = [p for p in parts if isinstance(p, Full)]
    gradient = Gradient(name, shape)
    if len(pairs) == 1 and (groups is None or isinstance(pairs[0], HeadPart)):
        gradient = replace(gradient, pair=pairs[0])
    elif pairs:
        sides = [(p.left, p.right) for p in pairs]
        if groups is not None:
            sides = [
                (left, right)
                if isinstance(p, HeadPart)
                else (regroup(left, groups, 2), regroup(right, groups, 2))
                for p, (left, right) in zip(pairs, sides, strict=True)
            ]
        left, right = (_concat([side[i] for side in sides], 2) for i in (0, 1))
        gradient = replace(gradient, pair=Pair(left, right))
    if indexed:
        index, right = (
            _concat([p.index for p in indexed], 1),
            _concat([p.right for p in indexed], 1),
        )
        if groups is not None:
            index, right = regroup(index, groups, 1), regroup(right, groups, 1)
        gradient = replace(gradient, indexed=Indexed(index, right))
    if fulls:
        grads = [p.grad if p.by_row else by_row(p.grad, rows, row_ids) for p in fulls]
        total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
        gradient = replace(gradient, full=Full(total, by_row=True))
    return gradient


def by_row(x: Float[Tensor, "s ..."], rows: int, row_ids: Tensor | None) -> Float[Tensor, "b ..."]:
    """Return the sum over each row's sequences."""
    return x if row_ids is None else x.new_zeros(rows, *x.shape[1:]).index_add_(0, row_ids, x)


def _concat(tensors: list[Tensor], axis: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.to(torch.promote_types(tensors[0].dtype, t.dtype)) for t in tensors], axis)


RowGroups = tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]


def group_rows(row_ids: Int[Tensor, " s"], rows: int) -> RowGroups:
    """Return the sequences of each row [B, M] (0 where there is none) and which are real [B, M]."""
    counts = torch.bincount(row_ids, minlength=rows)
    order = row_ids.argsort(stable=True)
    place = torch.arange(len(order), device=order.device)
    place = place - (counts.cumsum(0) - counts)[row_ids[order]]
    index = torch.zeros(rows, int(counts.max()), dtype=torch.long, device=order.device)
    index[row_ids[order], place] = order
    return index, torch.arange(index.shape[1], device=order.device) < counts[:, None]


def regroup(x: Tensor, groups: RowGroups, axis: int, fill: int = 0) -> Tensor:
    """Return x with a row's sequences laid end to end along its token axis, `fill` between them.

    Both factors are filled: 0 times another row's infinity would not be 0.
    """
    index, real = groups
    y = x[index]  # [B, M, ...]
    y = y.masked_fill(~real.view(*real.shape, *(1,) * (y.dim() - 2)), fill)
    return y.movedim(1, axis).flatten(axis, axis + 1)


def ungroup(x: Float[Tensor, "b mt"], groups: RowGroups, sequences: int) -> Float[Tensor, "s t"]:
    """Return the sequences that `regroup` laid end to end along axis 1."""
    index, real = groups
    place = torch.empty(sequences, dtype=torch.long, device=x.device)
    place[index[real]] = real.flatten().nonzero().flatten()
    return x.reshape(index.numel(), -1)[place]


def alone(name: str, shape: torch.Size, part: Part) -> Gradient:
    """Return the gradient that one part is, sequences first."""
    if isinstance(part, (Pair, Convolved, HeadPart)):
        return Gradient(name, shape, pair=part)
    if isinstance(part, Indexed):
        return Gradient(name, shape, indexed=part)
    assert isinstance(part, Full), "a sketch is read off already"
    return Gradient(name, shape, full=part)


Readout = Callable[[Gradient], Tensor]
"""From a parameter's gradient to [B] or [B, k]."""


def is_linear(readout: Readout) -> bool:
    """Return whether what is read off a sum is the sum of what is read off its parts."""
    return isinstance(readout, (TwoSidedSketch, Projection, Dots))


def sq_norm(gradient: Gradient) -> Float[Tensor, " b"]:
    """Return the squared norm; cross terms between the uses included."""
    pair, indexed, full = gradient.pair, gradient.indexed, gradient.full
    if full is not None and (pair is not None or indexed is not None):
        return _sq_norm_materialised(gradient, len(full.grad))
    if full is not None:
        grad = accumulable(full.grad).reshape(-1, *gradient.matrix_shape)
        return inner(grad, grad)
    if pair is None:
        assert indexed is not None, "a gradient without parts"
        return embedding_sq_norm(indexed.index, indexed.right)
    if isinstance(pair, Convolved):
        total = conv_sq_norm(pair.grad, pair.input, pair.geometry)
    elif isinstance(pair, HeadPart):
        total = pair.sq_norm()
    else:
        total = grad_sq_norm(pair.left, pair.right)
    if indexed is not None:
        total = total + embedding_sq_norm(indexed.index, indexed.right)
        if isinstance(pair, HeadPart) and pair.sums.columns is not None:
            cross = pair.cross(indexed.right)
        else:
            cross = embedding_cross(
                indexed.index, indexed.right, pair.left.squeeze(1), pair.right.squeeze(1)
            )
        total = (total + 2 * cross).clamp_(min=0)
    return total


def _sq_norm_materialised(gradient: Gradient, rows: int) -> Tensor:
    squares = []
    for part in chunks(rows, gradient.shape.numel()):
        grad = gradient.materialised(part)
        squares.append(inner(grad, grad))
    return torch.cat(squares)


@dataclass(frozen=True)
class TwoSidedSketch:
    """Matrices two-sided to k[0] x k[1], vectors one-sided to k[0] * k[1]."""

    seed: int
    k: tuple[int, int]

    def keys(self, name: str) -> tuple[Key, Key]:
        """The streams of a parameter's rows and columns."""
        return stream_key(self.seed, name, "rows"), stream_key(self.seed, name, "columns")

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b kk"]:
        name, total = gradient.name, list[Tensor]()
        keys = self.keys(name)
        if isinstance(pair := gradient.pair, Convolved):
            total.append(conv_sketch(pair.grad, pair.input, pair.geometry, keys, self.k))
        elif isinstance(pair, HeadPart) and pair.sums.sketch is not None:
            total.append(pair.sketch(keys, self.k))
        elif pair is not None:
            total.append(sketch(pair.left, pair.right, keys, self.k))
        if gradient.indexed is not None:
            total.append(sketch_rows(gradient.indexed.index, gradient.indexed.right, keys, self.k))
        if gradient.full is not None:
            grad = gradient.full.grad.reshape(-1, *gradient.matrix_shape)
            if len(gradient.shape) < 2:
                whole = stream_key(self.seed, name, "whole")
                total.append(sketch_vector(grad[:, 0], whole, self.k[0] * self.k[1]))
            else:
                total.append(sketch_matrix(grad, keys, self.k))
        return torch.stack(total).sum(0)


@dataclass(frozen=True)
class Projection:
    """The whole parameter one-sided to k."""

    seed: int
    k: int

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b k"]:
        key, total = stream_key(self.seed, gradient.name, "whole"), list[Tensor]()
        if gradient.pair is not None:
            total.append(project(gradient.pair.left, gradient.pair.right, key, self.k))
        if gradient.indexed is not None:
            index, right = gradient.indexed.index, gradient.indexed.right
            total.append(project_rows(index, right, key, self.k))
        if gradient.full is not None:
            grad = gradient.full.grad.reshape(-1, *gradient.matrix_shape)
            total.append(project_matrix(grad, key, self.k))
        return torch.stack(total).sum(0)


@dataclass(frozen=True, eq=False)
class Dots:
    """Inner products with M directions per parameter, {name: [M, *shape]}; others count as 0."""

    directions: dict[str, Tensor]

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b m"]:
        v, total = self.directions[gradient.name], list[Tensor]()
        v = v.reshape(len(v), *gradient.matrix_shape)
        if isinstance(pair := gradient.pair, HeadPart) and pair.sums.dots is not None:
            total.append(pair.dots())
        elif pair is not None:
            total.append(grad_dot(pair.left, pair.right, v))
        if gradient.indexed is not None:
            total.append(grad_dot_rows(gradient.indexed.index, gradient.indexed.right, v))
        if gradient.full is not None:
            grad = gradient.full.grad.reshape(-1, *gradient.matrix_shape)
            total.append(grad_dot_matrix(grad, v.to(accumulator(grad))))
        return torch.stack(total).sum(0)
