"""Two-sided random sketch of each sample's gradient of a weight matrix.

Shapes: s samples, g groups, t tokens, o rows and i columns within a group; the whole matrix has
g * o rows. S_o [g * o, k_o] and S_i [i, k_i] are sign matrices of `kernels/rademacher.py`.

    sketch = S_o^T G S_i / sqrt(k_o k_i) = sum_t (S_o^T left_t)(S_i^T right_t)^T / sqrt(k_o k_i)

The constant does not depend on o or i, so inner products of sketches estimate <G, H> without bias
and sketches of several layers may be concatenated.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.grad_norm import accumulable, accumulator, chunks
from curate.kernels.rademacher import Key, signs


def sketch(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    keys: tuple[Key, Key],
    k: tuple[int, int],
) -> Float[Tensor, "s kk"]:
    """Return the flattened k_o x k_i sketch; `keys` are the streams of the rows and the columns."""
    _, g, _, o = left.shape
    dtype = accumulator(left)
    rows = signs(keys[0], torch.arange(g * o, device=left.device), k[0], dtype=dtype)
    columns = signs(keys[1], torch.arange(right.shape[3], device=left.device), k[1], dtype=dtype)
    tall = accumulable(left) @ rows.view(g, o, k[0])
    wide = accumulable(right) @ columns
    return _outer(tall.flatten(1, 2), wide.flatten(1, 2), k)


def sketch_rows(
    index: Int[Tensor, "s t"],
    right: Float[Tensor, "s t i"],
    keys: tuple[Key, Key],
    k: tuple[int, int],
) -> Float[Tensor, "s kk"]:
    """Return the sketch where left_t is the unit vector of row index_t (embeddings)."""
    dtype = accumulator(right)
    tall = signs(keys[0], index.flatten(), k[0], dtype=dtype).view(*index.shape, k[0])
    columns = signs(keys[1], torch.arange(right.shape[2], device=index.device), k[1], dtype=dtype)
    return _outer(tall, accumulable(right) @ columns, k)


def sketch_matrix(
    grad: Float[Tensor, "s o i"], keys: tuple[Key, Key], k: tuple[int, int]
) -> Float[Tensor, "s kk"]:
    """Return the sketch of gradients that are at hand."""
    dtype = accumulator(grad)
    rows = signs(keys[0], torch.arange(grad.shape[1], device=grad.device), k[0], dtype=dtype)
    columns = signs(keys[1], torch.arange(grad.shape[2], device=grad.device), k[1], dtype=dtype)
    return (rows.T @ accumulable(grad) @ columns).flatten(1) / math.sqrt(k[0] * k[1])


def sketch_vector(grad: Float[Tensor, "s p"], key: Key, k: int) -> Float[Tensor, "s k"]:
    """Return the one-sided sketch of a vector's gradient: `grad @ S / sqrt(k)`."""
    out = grad.new_zeros(grad.shape[0], k, dtype=accumulator(grad))
    for part in chunks(grad.shape[1], 8 * k):  # the hash works on int64
        at = torch.arange(part.start, part.stop, device=grad.device)
        out += accumulable(grad[:, part]) @ signs(key, at, k, dtype=out.dtype)
    return out / math.sqrt(k)


def _outer(tall: Tensor, wide: Tensor, k: tuple[int, int]) -> Tensor:
    return torch.bmm(tall.mT, wide).flatten(1) / math.sqrt(k[0] * k[1])
