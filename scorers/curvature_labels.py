"""Labels drawn from the model's own prediction, for the Fisher information.

Shapes: S sequences, T tokens, C classes or vocabulary size, n target positions.

Each position takes one number u in [0, 1) and the label at which the cumulated probabilities first
exceed it. u is a function of (seed, row, position in the row) alone, so batches, workers and
padding change no label (but where u falls within the rounding of a probability).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from curate.kernels.rademacher import stream_key, words
from curate.kernels.summation import chunks
from curate.scorers.protocol import IGNORE, Batch, Outputs


def relabelled(batch: Batch, outputs: Outputs, numbers: Sequence[int], seed: int = 0) -> Batch:
    """Return the batch with each target drawn from softmax of the logits that `outputs` show.

    `numbers` are the rows' numbers in the corpus.

    Raises:
        ValueError: the outputs do not tell the prediction of the batch's own targets.
    """
    targets = outputs.targets
    if targets is None or (outputs.logits is None and outputs.head is None):
        raise ValueError("its task gives no Outputs with targets and logits")
    if targets.is_floating_point() or not _same(targets, batch.targets):
        raise ValueError("its task's Outputs.targets are not the batch's targets")
    u = uniforms(batch, numbers, seed)[targets != IGNORE]
    drawn = targets.clone()
    drawn[targets != IGNORE] = _draw(outputs, targets != IGNORE, u).to(targets.dtype)
    return replace(batch, targets=drawn)


def uniforms(batch: Batch, numbers: Sequence[int], seed: int) -> Float64[Tensor, "..."]:
    """Return the number u of every position of the batch's targets.

    A position counts from the beginning of its row, whose sequences lie one after another.
    """
    targets = batch.targets
    each = targets[0].numel() if len(targets) else 1
    row = torch.arange(batch.rows, device=targets.device)
    row = row if batch.row_ids is None else batch.row_ids.long()
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=batch.rows)
    nth = torch.empty_like(row)
    nth[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    position = nth[:, None] * each + torch.arange(each, device=row.device)
    number = torch.as_tensor(numbers, dtype=torch.int64, device=row.device)[row][:, None]
    key = stream_key(seed, "\0labels", "whole")
    high, low = (words(key, position, w, rows=number).long() & 0xFFFFFFFF for w in (0, 1))
    u = ((high >> 5) * (1 << 26) + (low >> 6)).double() / (1 << 53)
    return u.view(targets.shape)


def _draw(outputs: Outputs, is_target: Tensor, u: Float64[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the label of each target position, some of their logits at a time."""
    given = outputs.hidden if outputs.logits is None else outputs.logits
    assert given is not None, "checked above"
    flat = given.detach()[:, : is_target.shape[1]] if is_target.dim() > 1 else given.detach()
    flat = flat[is_target] if is_target.dim() > 1 else flat.reshape(len(is_target), -1)[is_target]
    head = outputs.head if outputs.logits is None else None
    classes = flat.shape[-1] if head is None else head.out_features
    found = [u.new_zeros(0, dtype=torch.long)]
    with torch.no_grad():
        for some in chunks(len(u), classes):
            logits = flat[some] if head is None else head(flat[some])
            below = logits.double().softmax(-1).cumsum(-1)
            below = below / below[:, -1:]
            label = torch.searchsorted(below, u[some, None], right=True)[:, 0]
            found.append(label.clamp(max=classes - 1))
    return torch.cat(found)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y.to(x.dtype))
