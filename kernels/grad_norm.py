"""Squared norm of each sample's gradient of a weight matrix, without the gradient.

Shapes: s samples, g groups (of a grouped convolution, else 1), t tokens (or positions), o rows and
i columns of the matrix within a group. A sample has the gradient G_g = sum_t left_gt right_gt^T.

Two forms, both exact:
    Gram    sum_{t, t'} (left_t . left_t') (right_t . right_t')       t^2 (o + i) multiplications
    tiles   rows of G, squared and added as they are made             t o i
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Elements of scratch at a time: 4 Mi float32 = 16 MiB.
SCRATCH = 1 << 22


def grad_sq_norm(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """Return sum_g ||sum_t left_t right_t^T||_F^2 per sample, in the cheaper of the two forms.

    Accumulates in float32 (float64 for float64 inputs). Never negative: a Gram sum that rounds
    below zero is zero. Scratch is bounded; no [s, o, i] tensor exists in the Gram form.
    """
    form = cheaper_form(left.shape[2], left.shape[3], right.shape[3])
    return grad_sq_norm_gram(left, right) if form == "gram" else grad_sq_norm_tiles(left, right)


def cheaper_form(t: int, o: int, i: int) -> Literal["gram", "tiles"]:
    """Return the form with fewer multiplications, counting the passes over what each writes.

    An element of scratch is written and read back twice; on a CPU that costs about as much as 16
    multiply-adds of a matrix product.
    """
    gram = t * t * (o + i) + 2 * 16 * t * t
    tiles = t * o * i + 16 * o * i
    return "gram" if gram <= tiles else "tiles"


def grad_sq_norm_gram(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """The Gram form: <left left^T, right right^T> over tokens, clamped at 0."""
    s, g, t, _ = left.shape
    if t == 1:
        squares = accumulable(left).square().sum((2, 3)) * accumulable(right).square().sum((2, 3))
        return squares.sum(1)
    out = left.new_zeros(s, dtype=accumulator(left))
    for rows in chunks(s, 2 * g * t * t):
        gram = [_gram(accumulable(x[rows]).flatten(0, 1)) for x in (left, right)]
        out[rows] = inner(gram[0], gram[1]).view(-1, g).sum(1)
    return out.clamp_(min=0)


def grad_sq_norm_tiles(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """The direct form: as many rows of G at a time as the scratch holds."""
    s, g, _, o = left.shape
    i = right.shape[3]
    out = left.new_zeros(s, dtype=accumulator(left))
    for rows in chunks(s, g * o * i):
        r = accumulable(right[rows])
        for tile in chunks(o, (rows.stop - rows.start) * g * i):
            grad = accumulable(left[rows, :, :, tile]).mT @ r
            out[rows] += inner(grad, grad)
    return out


def _gram(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT)


def inner(x: Float[Tensor, "s ..."], y: Float[Tensor, "s ..."]) -> Float[Tensor, " s"]:
    """Return the inner product of each sample's tensors.

    Along the last axis first, then over the rest: one dot product over millions of elements would
    lose three digits in float32, since BLAS adds them up one after another.
    """
    along: Tensor = torch.linalg.vecdot(x, y)
    return along.flatten(1).sum(1)


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over x are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulable(x: Tensor) -> Tensor:
    """Return x in the dtype its sums are taken in."""
    return x.to(accumulator(x))


def chunks(count: int, cost: int) -> list[slice]:
    """Return slices of range(count) that keep count * cost elements of scratch within SCRATCH."""
    step = max(1, SCRATCH // max(1, cost))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]
