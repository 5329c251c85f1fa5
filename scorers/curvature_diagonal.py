"""Diagonal curvature: E[g^2], entry by entry, over rows; any parameter has one.

Shapes: B rows, M directions, r and c the sides of a parameter as a matrix, U different entries
looked up by a row, D the width of a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.grad_tiles import grad_weighted_sq_norm
from curate.kernels.summation import accumulable, chunks
from curate.scorers.curvature import inverse
from curate.scorers.curvature_layers import Layer
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Gradient, Indexed


@dataclass(frozen=True, eq=False)
class DiagonalCurvature:
    """(diag(E[g^2]) + λI)^-1 of the layers' parameters; `squares` by parameter, as a matrix."""

    layers: Mapping[str, Layer]
    squares: Mapping[str, Float[Tensor, "r c"]]
    damping: float | int | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.squares)

    def __call__(self, gradient: Gradient) -> Float[Tensor, " b"]:
        weight = self._inverses[gradient.name]
        pair, indexed, full = gradient.pair, gradient.indexed, gradient.full
        if pair is not None and indexed is None and full is None and not isinstance(pair, HeadPart):
            return grad_weighted_sq_norm(pair.left, pair.right, weight)
        if indexed is not None and pair is None and full is None:
            row, entry, g = looked_up(indexed)
            each = (g.square() * weight[entry]).sum(1)
            return each.new_zeros(len(indexed.index)).index_add_(0, row, each)
        found = [
            (gradient.materialised(rows).square_() * weight).flatten(1).sum(1)
            for rows in chunks(gradient.rows, gradient.shape.numel())
        ]
        return torch.cat(found)

    def solve(self, directions: Mapping[str, Float[Tensor, "m ..."]]) -> dict[str, Tensor]:
        """Return v / (E[g^2] + λ) by parameter."""
        return {
            name: directions[name] * self._inverses[name].reshape(directions[name].shape[1:])
            for name in self.squares
        }

    @cached_property
    def _inverses(self) -> dict[str, Float[Tensor, "r c"]]:
        found: dict[str, Tensor] = {}
        for layer in self.layers.values():
            names = [name for name in layer.names if name in self.squares]
            if not names:
                continue
            mean = torch.cat([self.squares[name].double().flatten() for name in names]).mean()
            for name in names:
                d = self.squares[name]
                found[name] = inverse(d.double(), self.damping, mean).to(d.dtype)
        return found


def squares(gradient: Gradient) -> Float[Tensor, "1 r c"]:
    """Return sum g^2 over the batch's rows, entry by entry."""
    r, c = gradient.matrix_shape
    if gradient.indexed is not None and gradient.pair is None and gradient.full is None:
        _, entry, g = looked_up(gradient.indexed)
        return g.new_zeros(r, c).index_add_(0, entry, g.square())[None]
    found = [gradient.materialised(rows).square_().sum(0) for rows in chunks(gradient.rows, r * c)]
    return torch.stack(found).sum(0)[None]


def looked_up(
    indexed: Indexed,
) -> tuple[Int[Tensor, " u"], Int[Tensor, " u"], Float[Tensor, "u d"]]:
    """Return the entries of a table that have a gradient: their row, place and gradient."""
    most = int(indexed.index.max()) + 1 if indexed.index.numel() else 1
    row = torch.arange(len(indexed.index), device=indexed.index.device)[:, None]
    where, place = torch.unique(row * most + indexed.index, return_inverse=True)
    right = accumulable(indexed.right).flatten(0, 1)
    g = right.new_zeros(len(where), right.shape[1]).index_add_(0, place.flatten(), right)
    return where // most, where % most, g
