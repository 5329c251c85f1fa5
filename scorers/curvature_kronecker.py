"""Kronecker-factored curvature, K-FAC and EK-FAC: what it is estimated from, and how it is applied.

Shapes: B rows, M directions, g groups of a convolution (else 1), t tokens or positions, l and r the
sides of a layer's matrix within a group, n tokens of all rows.

A layer's gradient of a row is G = sum_t delta_t a_t^T with a the input, 1 appended where there is a
bias, and delta the gradient at its output. With A = E[a a^T] over tokens, S = E[sum_t delta_t
delta_t^T] over rows, and their eigenvectors Q_A, Q_S,

    K-FAC   E[vec(G) vec(G)^T] ~ A x S        eigenvalues   lambda_S lambda_A^T
    EK-FAC  the same eigenvectors             eigenvalues   Lambda = E[(Q_S^T G Q_A)^2] over rows

(Martens and Grosse 2015, arXiv 1503.05671; Grosse and Martens 2016, arXiv 1602.01407, for
convolutions; George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296). Eigen-
vectors are the same whatever S is divided by; dividing by rows makes A x S the Fisher information
of rows, as Lambda is. Groups of a convolution are layers of their own.

Sides are named as the parameter has them: where it is stored as [inputs, outputs] (Hugging Face's
Conv1D), a stands on the left.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curate.kernels.grad_tiles import grad_weighted_sq_norm
from curate.kernels.summation import accumulable, chunks
from curate.scorers.curvature import inverse
from curate.scorers.curvature_layers import Layer
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Convolved, Gradient, Pair
from curate.scorers.row_map import RowMap


@dataclass(frozen=True, eq=False)
class Factors:
    """Eigenvectors in columns and eigenvalues of one layer."""

    left: Float[Tensor, "g l l"]
    right: Float[Tensor, "g r r"]
    eigenvalues: Float[Tensor, "g l r"]


@dataclass(frozen=True, eq=False)
class KroneckerCurvature:
    """(G + λI)^-1 of these layers. Others count as absent."""

    layers: Mapping[str, Layer]
    factors: Mapping[str, Factors]
    damping: float | int | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.layers)

    def __call__(self, gradient: Gradient) -> Float[Tensor, " b"]:
        own = self.factors[gradient.name]
        weight = self._inverses[gradient.name].flatten(0, 1)
        found = [
            grad_weighted_sq_norm(left, right, weight)
            for left, right in _rotated(gradient, self.layers[gradient.name], own)
        ]
        return torch.cat(found)

    def solve(self, directions: Mapping[str, Float[Tensor, "m ..."]]) -> dict[str, Tensor]:
        """Return (G + λI)^-1 v by parameter: Q_S [(Q_S^T V Q_A) / (Λ + λ)] Q_A^T, in float64."""
        solved: dict[str, Tensor] = {}
        for weight, layer in self.layers.items():
            own, v = self.factors[weight], directions[weight]
            bias = None if layer.bias is None else directions[layer.bias]
            matrix = _joined(v, bias, own)
            left, right = own.left.double(), own.right.double()
            inside = left.mT @ matrix @ right * self._inverses[weight].double()
            solved |= _split(left @ inside @ right.mT, layer, directions)
        return solved

    @cached_property
    def _inverses(self) -> dict[str, Float[Tensor, "g l r"]]:
        return {
            name: inverse(f.eigenvalues.double(), self.damping, f.eigenvalues.double().mean()).to(
                f.eigenvalues.dtype
            )
            for name, f in self.factors.items()
        }


def _joined(
    v: Float[Tensor, "m ..."], bias: Float[Tensor, "m ..."] | None, own: Factors
) -> Float[Tensor, "m g l r"]:
    """Return the directions of weight and bias as one matrix per group."""
    groups, left, right = own.eigenvalues.shape
    if bias is None:
        return v.reshape(len(v), groups, left, right).double()
    if left > v.shape[1]:  # the inputs and their 1 stand there
        whole = torch.cat([v.reshape(len(v), 1, left - 1, right), bias[:, None, None]], 2)
        return whole.double()
    column = bias.reshape(len(v), groups, left, 1)
    return torch.cat([v.reshape(len(v), groups, left, right - 1), column], 3).double()


def _split(
    matrix: Float[Tensor, "m g l r"], layer: Layer, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    v = like[layer.weight]
    bias: Tensor | None = None
    if layer.bias is not None and matrix.shape[2] > v.shape[1]:
        matrix, bias = matrix[:, :, :-1], matrix[:, :, -1]
    elif layer.bias is not None:
        matrix, bias = matrix[..., :-1], matrix[..., -1]
    out = {layer.weight: matrix.reshape(v.shape).to(v.dtype)}
    if layer.bias is not None and bias is not None:
        out[layer.bias] = bias.reshape(like[layer.bias].shape).to(v.dtype)
    return out


# -- estimation: readouts whose results are sums over the rows of a batch


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens of a layer's input are a row's own; padding is no part of A."""

    row_map: RowMap
    own: Bool[Tensor, "s t"] | None

    def of(self, side: Float[Tensor, "b g t i"]) -> Bool[Tensor, "b t"] | None:
        """Return the tokens that count, None for all.

        A layer over other tokens than the batch tells of (patches, a pooled state, experts)
        counts all of them, but for what fills a row of fewer sequences.
        """
        if self.own is not None:
            real = self.row_map.end_to_end(self.own, 1)
            uses, rest = divmod(side.shape[2], max(1, real.shape[1]))
            if rest == 0:
                return real.repeat(1, uses)
        if self.row_map.ids is None:
            return None
        return (side != 0).any(3).any(1)


@dataclass(frozen=True, eq=False)
class SideMoment:
    """The sum over the tokens of the batch's rows of x x^T, [1, g, i, i], x the left or the right
    factor: of the inputs a (with the 1 appended, padding left out), or of the deltas."""

    layers: Mapping[str, Layer]
    tokens: Tokens
    on_left: bool

    def __call__(self, gradient: Gradient) -> Float[Tensor, "1 g i i"]:
        pair = _pair(gradient)
        if self.on_left != _inputs_on_left(pair):
            return _of_outputs(pair)
        side = _inputs(pair)
        x, real = accumulable(side), self.tokens.of(side)
        if self.layers[gradient.name].bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:3], 1)], 3)
        return _second_moment(x if real is None else x.masked_fill(~real[:, None, :, None], 0.0))


@dataclass(frozen=True, eq=False)
class TokenCount:
    """How many tokens of a layer's inputs the batch's rows have, [1]."""

    tokens: Tokens

    def __call__(self, gradient: Gradient) -> Float[Tensor, " 1"]:
        side = _inputs(_pair(gradient))
        real = self.tokens.of(side)
        count = side.shape[0] * side.shape[2] if real is None else int(real.sum())
        return torch.full((1,), float(count), dtype=torch.float64, device=side.device)


@dataclass(frozen=True, eq=False)
class RotatedSquares:
    """sum (Q_S^T G Q_A)^2 over the batch's rows, [1, g, l, r]."""

    layers: Mapping[str, Layer]
    factors: Mapping[str, Factors]

    def __call__(self, gradient: Gradient) -> Float[Tensor, "1 g l r"]:
        own, total = self.factors[gradient.name], list[Tensor]()
        for left, right in _rotated(gradient, self.layers[gradient.name], own):
            for rows in chunks(len(left), left.shape[1] * left.shape[3] * right.shape[3]):
                total.append((left[rows].mT @ right[rows]).square().sum(0))
        return torch.stack(total).sum(0)[None]


def decomposed(covariance: Float[Tensor, "g i i"]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [g, i], not below 0, and eigenvectors in columns, [g, i, i].

    In float64, on the CPU: the same bits on every machine of one kind.
    """
    c = covariance.double().cpu()
    values, vectors = torch.linalg.eigh((c + c.mT) / 2)
    return values.clamp(min=0), vectors


def _of_outputs(pair: Pair | Convolved | HeadPart) -> Float[Tensor, "1 g o o"]:
    if isinstance(pair, HeadPart):
        return torch.stack([_second_moment(left) for _, left, _ in pair.pieces()]).sum(0)
    return _second_moment(accumulable(pair.right if _inputs_on_left(pair) else pair.left))


def _inputs(pair: Pair | Convolved | HeadPart) -> Float[Tensor, "b g t i"]:
    return pair.left if _inputs_on_left(pair) else pair.right


def _second_moment(x: Float[Tensor, "s g t i"]) -> Float[Tensor, "1 g i i"]:
    flat = x.transpose(0, 1).flatten(1, 2)
    return (flat.mT @ flat)[None]


def _rotated(gradient: Gradient, layer: Layer, own: Factors) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of Q_left^T G Q_right, [b, g, t, l] and [b, g, t, r]: of all rows, or of
    a few where they have to be made first."""
    pair = _pair(gradient)
    if isinstance(pair, HeadPart):
        rows, tokens = pair.targets.shape
        for some in chunks(rows, tokens * len(pair.weight)):
            part = Pair(pair.error(some)[:, None], pair.right[some])
            yield _turned(part, layer, own)
    else:
        yield _turned(Pair(pair.left, pair.right, _inputs_on_left(pair)), layer, own)


def _turned(pair: Pair, layer: Layer, own: Factors) -> tuple[Tensor, Tensor]:
    sides = []
    for side, basis, is_input in (
        (pair.left, own.left, bool(pair.swapped)),
        (pair.right, own.right, not pair.swapped),
    ):
        turned = accumulable(side)
        dtype = torch.promote_types(turned.dtype, basis.dtype)
        turned, basis = turned.to(dtype), basis.to(dtype)
        if is_input and layer.bias is not None:
            # [a 1] Q without a copy of a; where a row is padded, delta is 0.
            turned = turned @ basis[:, :-1] + basis[:, -1:]
        else:
            turned = turned @ basis
        sides.append(turned)
    return sides[0], sides[1]


def _pair(gradient: Gradient) -> Pair | Convolved | HeadPart:
    """Return the factors of a layer's gradient.

    Raises:
        ValueError: there are none any more, or they have no inputs on one side.
    """
    if gradient.pair is None or gradient.full is not None or gradient.indexed is not None:
        raise ValueError(
            f"{gradient.name} is not used as when its curvature was made: leave it out by params="
        )
    if isinstance(gradient.pair, Pair) and gradient.pair.swapped is None:
        raise ValueError(
            f"{gradient.name} is used both as it is and transposed: leave it out by params="
        )
    return gradient.pair


def _inputs_on_left(pair: Pair | Convolved | HeadPart) -> bool:
    return isinstance(pair, Pair) and bool(pair.swapped)
