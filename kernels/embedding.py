"""Squared norms where the gradient of a matrix comes from a table look-up.

Shapes: s samples, t look-ups, d the row's size, v the number of rows. G = sum_t unit(index_t)
right_t^T, so rows looked up several times add up before the norm. No [s, v, d] tensor exists.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.grad_norm import accumulable, accumulator, chunks, inner


def embedding_sq_norm(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t d"]
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample: gradients of equal (sample, index) are added, then squared."""
    s, _, d = right.shape
    sample = torch.arange(s, device=index.device)[:, None]
    stride = int(index.max()) + 1 if index.numel() else 1
    pairs, slot = torch.unique(sample * stride + index, return_inverse=True)
    rows = torch.zeros(len(pairs), d, dtype=accumulator(right), device=right.device)
    rows.index_add_(0, slot.flatten(), accumulable(right).flatten(0, 1))
    out = torch.zeros(s, dtype=rows.dtype, device=right.device)
    return out.index_add_(0, pairs // stride, rows.square().sum(1))


def embedding_cross(
    index: Int[Tensor, "s t"],
    right: Float[Tensor, "s t d"],
    other_left: Float[Tensor, "s u v"],
    other_right: Float[Tensor, "s u d"],
) -> Float[Tensor, " s"]:
    """Return <G, sum_u other_left_u other_right_u^T> per sample: the cross term of a tied matrix.

    = sum_{t, u} other_left[u, index_t] (right_t . other_right_u)
    """
    s, u, _ = other_left.shape
    out = torch.empty(s, dtype=accumulator(right), device=right.device)
    for rows in chunks(s, 2 * u * index.shape[1]):
        at = index[rows, None].expand(-1, u, -1)
        error = accumulable(other_left[rows].gather(2, at))
        products = torch.bmm(accumulable(other_right[rows]), accumulable(right[rows]).mT)
        out[rows] = inner(error, products)
    return out
