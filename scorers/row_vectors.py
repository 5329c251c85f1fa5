"""Vectors of rows read off a pass: sketches of gradients, embeddings.

Shapes: B rows, k numbers of a sketch, D hidden size.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.grad_norm import accumulable
from curate.kernels.sparse_projection import MOST_OUTPUTS
from curate.scorers.needs import Harvest
from curate.scorers.protocol import IGNORE
from curate.scorers.readouts import Projection, TwoSidedSketch
from curate.scorers.watched_model import WatchedModel

Sketch = TwoSidedSketch | Projection
"""Two-sided per parameter, or one-sided of the whole gradient."""


def sketch_kind(k: int | tuple[int, ...], jl: str | None, seed: int) -> Sketch:
    """Return the sketch of that size: `k` or (k_o, k_i) two-sided, (k,) one-sided.

    A one-sided map is sparse where k is a power of two up to 16384, else dense, or as `jl` says.

    Raises:
        ValueError: no sketch has that size, or no such map exists.
    """
    sides = (k, k) if isinstance(k, int) else k
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        raise ValueError(f"sketch_dim must be k, (k_o, k_i) or (k,), not {k!r}")
    if len(sides) == 2:
        return TwoSidedSketch(seed, (sides[0], sides[1]))
    return Projection(seed, sides[0], _is_sparse(sides[0], jl))


def _is_sparse(k: int, jl: str | None) -> bool:
    fits = k.bit_count() == 1 and k <= MOST_OUTPUTS
    if jl not in (None, "sparse", "dense"):
        raise ValueError(f"jl must be 'sparse' or 'dense', not {jl!r}")
    if jl == "sparse" and not fits:
        raise ValueError(
            f"a sparse map needs a power of two up to {MOST_OUTPUTS} in sketch_dim, not {k}; "
            "choose one, or jl='dense'"
        )
    return fits if jl is None else jl == "sparse"


def sketches(
    harvest: Harvest, key: str, names: Sequence[str], kind: Sketch
) -> Float[Tensor, "b k"]:
    """Return what the readout `key` gave of these parameters: concatenated, or (one-sided) added.

    A parameter that the loss does not depend on counts as 0.
    """
    found, rows = harvest.readouts[key], len(harvest.loss)
    if isinstance(kind, Projection):
        zero = harvest.loss.new_zeros(rows, kind.k)
        return torch.stack([zero, *(found[n] for n in names if n in found)]).sum(0)
    zero = harvest.loss.new_zeros(rows, kind.k[0] * kind.k[1])
    return torch.cat([found.get(name, zero) for name in names], 1)


def embedding(harvest: Harvest, core: WatchedModel) -> Float[Tensor, "b d"]:
    """Return the head's input, averaged over target tokens where a row has several.

    Raises:
        ValueError: the targets do not lie on the positions of the head's input.
    """
    hidden, targets, head = harvest.hidden, harvest.targets, core.passes.plan.head
    assert hidden is not None and head is not None, "asked for"
    rows, row_ids = len(harvest.loss), harvest.row_ids
    hidden = hidden.flatten(1, -2) if hidden.dim() > 2 else hidden[:, None]
    tokens = hidden.new_ones(hidden.shape[:2])
    if targets is not None and hidden.shape[1] > 1:
        mask = (targets != IGNORE).reshape(len(targets), -1)
        if mask.shape[1] > hidden.shape[1] or not head.starts_at_token_0:
            raise ValueError(
                "embedding: the targets do not lie on the positions of the head's input; "
                "align Outputs.logits and targets with it, IGNORE (-100) where there is no target"
            )
        tokens[:] = 0
        tokens[:, : mask.shape[1]] = mask
    hidden = torch.einsum("std,st->sd", accumulable(hidden), accumulable(tokens))
    count = accumulable(tokens).sum(1)
    if row_ids is not None:
        hidden = hidden.new_zeros(rows, hidden.shape[1]).index_add_(0, row_ids, hidden)
        count = count.new_zeros(rows).index_add_(0, row_ids, count)
    return hidden / count[:, None]
