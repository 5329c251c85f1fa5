"""Documents end to end in windows of one length, for training.

Shapes: B documents, S windows, T tokens of a window, N tokens in all.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.pipeline.tasks.arrays import padded
from curate.scorers.protocol import IGNORE


@dataclass(frozen=True)
class Packed:
    """Documents end to end in windows of one length, for training; padding only at the very end.

    `targets[s, t]` follows `input_ids[s, t]`. `weights` and `row_ids` are those of the document
    that the target token belongs to.
    """

    input_ids: Int[Tensor, "s t"]
    targets: Int[Tensor, "s t"]
    weights: Float[Tensor, "s t"]
    row_ids: Int[Tensor, "s t"]

    def to(self, device: torch.device | str) -> "Packed":
        """Return the same on `device`."""
        moved = (self.input_ids, self.targets, self.weights, self.row_ids)
        return Packed(*(tensor.to(device) for tensor in moved))


def pack(
    values: Int[np.ndarray, " n"],
    offsets: Int[np.ndarray, " bounds"],
    weights: Float[Tensor, " b"] | None = None,
    *,
    context: int,
    end: int | None,
    fill: int = 0,
) -> Packed:
    """Return the documents values[offsets[i]:offsets[i + 1]] in windows of `context` tokens.

    Each is followed by `end`, unless it has it already or all documents begin with it. Every token
    but the stream's first is a target, with its document's weight (1 by default).
    """
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if end is not None and not (values[offsets[:-1]] == end).all():
        open_ended = np.flatnonzero(values[offsets[1:] - 1] != end)
        at = offsets[1:][open_ended]
        values, rows = np.insert(values, at, end), np.insert(rows, at, open_ended)
    starts = np.arange(0, len(values) - 1, context)
    lengths = np.minimum(len(values) - 1 - starts, context)
    row_ids = torch.from_numpy(padded(rows, starts + 1, lengths, 0))
    targets = torch.from_numpy(padded(values, starts + 1, lengths, IGNORE))
    each = torch.ones(len(offsets) - 1) if weights is None else weights.float().cpu()
    inputs = torch.from_numpy(padded(values, starts, lengths, fill))
    return Packed(inputs, targets, each[row_ids] * (targets != IGNORE), row_ids)
