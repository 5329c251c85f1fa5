"""One-sided random projection of each sample's whole gradient, made tile by tile.

Shapes as in `kernels/sketch.py`. Coordinate (r, c) of the matrix has the k signs of its own:

    projection_j = sum_{r, c} sign(r, c, j) G[r, c] / sqrt(k)

Projections of several parameters (with different keys) add up to that of the whole gradient
(Johnson-Lindenstrauss; what TRAK and LESS store).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.grad_norm import accumulable, accumulator, chunks
from curate.kernels.rademacher import Key, signs


def project(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"], key: Key, k: int
) -> Float[Tensor, "s k"]:
    """Return the projection of sum_t left_t right_t^T; one tile of rows of G exists at a time."""
    s, g, _, o = left.shape
    out = left.new_zeros(s, k, dtype=accumulator(left))
    r = accumulable(right)
    for group in range(g):
        for tile in chunks(o, right.shape[3] * (s + 8 * k)):
            grad = accumulable(left[:, group, :, tile]).mT @ r[:, group]
            first = group * o + tile.start
            at = torch.arange(first, first + grad.shape[1], device=left.device)
            out += _project_rows(grad, at, key, k)
    return out / math.sqrt(k)


def project_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], key: Key, k: int
) -> Float[Tensor, "s k"]:
    """Return the projection where left_t is the unit vector of row index_t."""
    s, _, i = right.shape
    out = right.new_zeros(s, k, dtype=accumulator(right))
    ids, slot = torch.unique(index, return_inverse=True)
    samples = torch.arange(s, device=index.device)[:, None].expand_as(slot)
    for tile in chunks(ids.numel(), i * (s + 8 * k)):
        width = tile.stop - tile.start
        inside = (slot >= tile.start) & (slot < tile.stop)
        grad = torch.zeros(s * width, i, dtype=out.dtype, device=out.device)
        at = samples[inside] * width + slot[inside] - tile.start
        grad.index_add_(0, at, accumulable(right[inside]))
        out += _project_rows(grad.view(s, width, i), ids[tile], key, k)
    return out / math.sqrt(k)


def project_matrix(grad: Float[Tensor, "s o i"], key: Key, k: int) -> Float[Tensor, "s k"]:
    """Return the projection of gradients that are at hand; a vector counts as one row."""
    out = grad.new_zeros(grad.shape[0], k, dtype=accumulator(grad))
    for tile in chunks(grad.shape[1], grad.shape[2] * 8 * k):
        at = torch.arange(tile.start, tile.stop, device=grad.device)
        out += _project_rows(accumulable(grad[:, tile]), at, key, k)
    return out / math.sqrt(k)


def _project_rows(grad: Tensor, rows: Tensor, key: Key, k: int) -> Tensor:
    """Return the unscaled projection of some rows of G, columns in tiles where k is large."""
    columns = torch.arange(grad.shape[2], device=grad.device)
    out = grad.new_zeros(grad.shape[0], k)
    for part in chunks(grad.shape[2], 8 * k * len(rows)):
        c = columns[part].repeat(len(rows))
        r = rows.repeat_interleave(part.stop - part.start)
        out += grad[:, :, part].flatten(1) @ signs(key, c, k, rows=r, dtype=grad.dtype)
    return out
