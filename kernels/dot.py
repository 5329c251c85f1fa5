"""Inner products of each sample's gradient of a weight matrix with given directions.

Shapes as in `kernels/sketch.py`; m directions of the matrix's shape.

    <G, V> = sum_t left_t^T V right_t
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.grad_norm import accumulable, accumulator, chunks


def grad_dot(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    directions: Float[Tensor, "m r i"],
) -> Float[Tensor, "s m"]:
    """Return <sum_t left_t right_t^T, V_m> per sample and direction (r = g * o rows)."""
    s, g, t, o = left.shape
    v = directions.to(accumulator(left)).view(-1, g, o, right.shape[3])
    out = torch.empty(s, len(v), dtype=v.dtype, device=left.device)
    for rows in chunks(s, g * t * right.shape[3]):
        r = accumulable(right[rows])
        for m in range(len(v)):
            out[rows, m] = ((accumulable(left[rows]) @ v[m]) * r).sum((1, 2, 3))
    return out


def grad_dot_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], directions: Float[Tensor, "m r i"]
) -> Float[Tensor, "s m"]:
    """Return <G, V_m> where left_t is the unit vector of row index_t."""
    r = accumulable(right)
    dots = [(v.to(r.dtype)[index] * r).sum((1, 2)) for v in directions]
    return torch.stack(dots, 1)


def grad_dot_matrix(
    grad: Float[Tensor, "s o i"], directions: Float[Tensor, "m o i"]
) -> Float[Tensor, "s m"]:
    """Return <G, V_m> of gradients that are at hand."""
    return accumulable(grad).flatten(1) @ directions.to(accumulator(grad)).flatten(1).T
