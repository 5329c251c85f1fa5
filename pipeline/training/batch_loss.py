"""The one number that a training step descends.

Shapes: B rows, S sequences, T tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import IGNORE, Batch, Outputs


def batch_loss(outputs: Outputs, batch: Batch, row_loss: str) -> Float[Tensor, ""]:
    """Return the batch's loss with each row's weight w (1 without weights).

    One target a row: `sum(w_i l_i) / B`. Weights have mean 1 over the selection, not over the
    batch, so this keeps the gradient's expectation. Token targets: `sum(w_d l_dt) / sum(w_d n_d)`
    over documents d with n_d target tokens, whatever `row_loss` ("mean" or "sum" over a document's
    tokens) the scores are about; without weights this is the usual mean over tokens.
    """
    loss, weights = outputs.loss, batch.weights
    if outputs.targets is None or outputs.targets.dim() < 2:
        return (loss if weights is None else loss * weights).sum() / len(loss)
    tokens = row_tokens(outputs)
    sums = loss if row_loss == "sum" else loss * tokens
    if weights is None:
        return sums.sum() / tokens.sum().clamp(min=1)
    total = (weights * tokens).sum()
    return (weights * sums).sum() / torch.where(total > 0, total, 1)


def row_tokens(outputs: Outputs) -> Float[Tensor, " b"]:
    """Return the number of target tokens of each row."""
    assert outputs.targets is not None, "rows without targets have no tokens"
    counts = (outputs.targets != IGNORE).flatten(1).sum(1).to(outputs.loss.dtype)
    if outputs.row_ids is None:
        return counts
    return torch.zeros_like(outputs.loss).index_add(0, outputs.row_ids, counts)
