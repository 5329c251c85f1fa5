"""What is read off a parameter's per-row gradient: norms, sketches, projections, inner products.

Shapes: B rows, k sketch size, M directions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.conv import conv_dot, conv_sketch, conv_sq_norm, conv_sums
from curate.kernels.dot import grad_dot, grad_dot_matrix, grad_dot_rows
from curate.kernels.embedding import embedding_cross, embedding_sq_norm
from curate.kernels.grad_norm import accumulable, accumulator, chunks, grad_sq_norm, inner
from curate.kernels.projection import project, project_matrix, project_rows
from curate.kernels.rademacher import Key, Side, stream_key
from curate.kernels.sketch import sketch, sketch_matrix, sketch_rows, sketch_vector
from curate.kernels.sparse_projection import (
    sparse_project,
    sparse_project_matrix,
    sparse_project_rows,
)
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Convolved, Gradient, Pair

Readout = Callable[[Gradient], Tensor]
"""From a parameter's gradient to [B] or [B, k]."""


def is_linear(readout: Readout) -> bool:
    """Return whether what is read off a sum is the sum of what is read off its parts."""
    return isinstance(readout, (TwoSidedSketch, Projection, Dots))


def read_together(
    gradient: Gradient, readouts: Mapping[str, Readout]
) -> dict[str, Float[Tensor, "b ..."]]:
    """Return what each readout gives, those that share work on this gradient taken together."""
    sketches = [key for key, read in readouts.items() if isinstance(read, TwoSidedSketch)]
    norms = [key for key, read in readouts.items() if read is sq_norm]
    pair, found = gradient.pair, dict[str, Tensor]()
    alone = gradient.indexed is None and gradient.full is None
    if isinstance(pair, Convolved) and alone and norms and sketches:
        read = readouts[sketches[0]]
        assert isinstance(read, TwoSidedSketch), "picked above"
        sketch = read.keys(gradient.name), read.k
        sums = conv_sums(pair.grad, pair.input, pair.geometry, square=True, sketch=sketch)
        assert sums.sq_norm is not None and sums.sketch is not None, "asked for"
        found = {norms[0]: sums.sq_norm, sketches[0]: sums.sketch}
    return found | {key: read(gradient) for key, read in readouts.items() if key not in found}


def sq_norm(gradient: Gradient) -> Float[Tensor, " b"]:
    """Return the squared norm; cross terms between the uses included."""
    pair, indexed, full = gradient.pair, gradient.indexed, gradient.full
    if full is not None and (pair is not None or indexed is not None):
        return _sq_norm_materialised(gradient)
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
        if isinstance(pair, HeadPart) and pair.keeps(indexed.index):
            cross = pair.cross(indexed.right)
        else:
            cross = embedding_cross(
                indexed.index, indexed.right, pair.left.squeeze(1), pair.right.squeeze(1)
            )
        total = (total + 2 * cross).clamp_(min=0)
    return total


def _sq_norm_materialised(gradient: Gradient) -> Tensor:
    squares = []
    for part in chunks(gradient.rows, gradient.shape.numel()):
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
        elif isinstance(pair, HeadPart) and (made := pair.sketch(keys, self.k)) is not None:
            total.append(made)
        elif pair is not None:
            total.append(_of_pair(pair, lambda a, b: sketch(a, b, keys, self.k)))
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
    """The whole parameter one-sided to k: a sparse Johnson-Lindenstrauss map, or a dense one.

    Inner products have the same mean and at most the same variance by either; the dense map takes
    k multiplications per weight (`kernels/projection.py`), the sparse one does not.
    """

    seed: int
    k: int
    is_sparse: bool = False

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b k"]:
        stream: Side = "sparse" if self.is_sparse else "whole"
        key, total = stream_key(self.seed, gradient.name, stream), list[Tensor]()
        pair_to_k, rows_to_k, matrix_to_k = (
            (sparse_project, sparse_project_rows, sparse_project_matrix)
            if self.is_sparse
            else (project, project_rows, project_matrix)
        )
        if gradient.pair is not None:
            total.append(_of_pair(gradient.pair, lambda a, b: pair_to_k(a, b, key, self.k)))
        if gradient.indexed is not None:
            index, right = gradient.indexed.index, gradient.indexed.right
            total.append(rows_to_k(index, right, key, self.k))
        if gradient.full is not None:
            grad = gradient.full.grad.reshape(-1, *gradient.matrix_shape)
            total.append(matrix_to_k(grad, key, self.k))
        return torch.stack(total).sum(0)


def _of_pair(
    pair: Pair | Convolved | HeadPart, read: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "b k"]:
    """Return something linear in the gradient, from a few of a head's errors at a time."""
    if not isinstance(pair, HeadPart):
        return read(pair.left, pair.right)
    parts: dict[int, Tensor] = {}
    for rows, left, right in pair.pieces():
        value = read(left, right)
        parts[rows.start] = parts[rows.start] + value if rows.start in parts else value
    return torch.cat(list(parts.values()))


@dataclass(frozen=True, eq=False)
class Dots:
    """Inner products with M directions per parameter, {name: [M, *shape]}; others count as 0."""

    directions: dict[str, Tensor]

    def __call__(self, gradient: Gradient) -> Float[Tensor, "b m"]:
        given, total = self.directions[gradient.name], list[Tensor]()
        v = given.reshape(len(given), *gradient.matrix_shape)
        pair = gradient.pair
        if isinstance(pair, HeadPart) and (made := pair.dots(given)) is not None:
            total.append(made)
        elif isinstance(pair, Convolved):
            total.append(conv_dot(pair.grad, pair.input, pair.geometry, v))
        elif pair is not None:
            total.append(_of_pair(pair, lambda a, b: grad_dot(a, b, v)))
        if gradient.indexed is not None:
            total.append(grad_dot_rows(gradient.indexed.index, gradient.indexed.right, v))
        if gradient.full is not None:
            grad = gradient.full.grad.reshape(-1, *gradient.matrix_shape)
            total.append(grad_dot_matrix(grad, v.to(accumulator(grad))))
        return torch.stack(total).sum(0)
