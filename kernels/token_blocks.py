"""The tokens that have a target, brought together: ignored ones cost nothing.

Shapes: b rows of t tokens, r rows of p places in a block, n = r p, d width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curate.kernels.online_softmax import IGNORE


def token_blocks(targets: Int[Tensor, "b t"], tokens: int, by_row: bool) -> Iterator["TokenBlock"]:
    """Yield the target tokens in blocks of at most `tokens`; of whole rows (or one) if `by_row`.

    Rows with as many target tokens lie together, so that few places are empty.
    """
    is_target = targets != IGNORE
    t = targets.shape[1]
    if not by_row:
        for index in torch.split(is_target.flatten().nonzero()[:, 0], tokens):
            if len(index):
                yield TokenBlock(index // t, 1, index, None)
        return
    counts = is_target.sum(1)
    order = counts.argsort(descending=True, stable=True)
    first = (~is_target).byte().argsort(dim=1, stable=True)
    sizes, start = counts[order].tolist(), 0
    while start < len(sizes) and (places := sizes[start]) > 0:
        stop = min(start + max(1, tokens // places), len(sizes))
        while sizes[stop - 1] == 0:
            stop -= 1
        rows = order[start:stop]
        index = rows[:, None] * t + first[rows, :places]
        is_real = None
        if sizes[stop - 1] < places:
            place = torch.arange(places, device=targets.device)
            is_real = (place < counts[rows, None]).flatten()
        yield TokenBlock(rows, places, index.flatten(), is_real)
        start = stop


@dataclass(frozen=True)
class TokenBlock:
    """The target tokens of r rows, p places each; a row with fewer leaves its last places empty."""

    rows: Int[Tensor, " r"]
    places: int
    index: Int[Tensor, " n"]
    """Position in the flattened [b * t], anything for an empty place"""
    is_real: Bool[Tensor, " n"] | None
    """Which places are no empty ones [n]; None: all"""

    def fill(self, x: Float[Tensor, "b t d"], dtype: torch.dtype) -> Float[Tensor, "n d"]:
        """Return what x holds for these tokens; 0 in empty places, whatever it holds there."""
        taken = x.reshape(-1, x.shape[-1])[self.index].to(dtype)
        return taken if self.is_real is None else taken.masked_fill_(~self.is_real[:, None], 0.0)
