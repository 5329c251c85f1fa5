"""One pass over a token's logits, tile by tile: all that cross entropy and its error tell.

Shapes: n tokens, w classes of a tile, c all classes, *t any leading axes.

The sums run over the *other* classes (k != y), from which everything follows without cancelling:

    o = log sum_{k != y} exp(z_k)     loss = softplus(o - z_y)     e_y = -sigmoid(o - z_y)

Autograd's p_y - 1 cancels where p_y is near 1 (4 % off at ||e|| = 8e-5 in float32); this does not.
A tile's weights E_k = exp(z_k - shift) are left to the caller: e_k = scale * E_k for k != y, where
scale = exp(shift - lse), so that sums over classes can be taken before lse is known.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100
# 2^x takes a quarter of the time of e^x: torch hands e^x to MKL, which rounds it correctly.
LOG2E = math.log2(math.e)


class TokenStatistics(NamedTuple):
    """What a token's logits say, each [*t], 0 where the target is IGNORE."""

    el2n: Tensor
    """||p - y||"""
    entropy: Tensor
    """-sum p log p, nats"""
    margin: Tensor
    """z_y - max_{k != y} z_k"""
    correct: Tensor
    """1 where the first largest logit is the target's, else 0"""


class TokenSums(NamedTuple):
    """All that one pass over a token's logits gives, each [*t], 0 where the target is IGNORE."""

    loss: Tensor
    error_target: Tensor
    """e_y = p_y - 1"""
    lse: Tensor
    """log sum_k exp(z_k)"""
    el2n: Tensor
    entropy: Tensor
    margin: Tensor
    correct: Tensor
    sq_prob: Tensor
    """||p||^2"""
    aligned: Tensor
    """sum_k e_k z_k"""
    argmax: Tensor
    """The first of the largest logits (int64)"""

    @property
    def statistics(self) -> TokenStatistics:
        return TokenStatistics(self.el2n, self.entropy, self.margin, self.correct)


class OnlineSoftmax:
    """The running sums of n tokens over tiles of classes, taken in order.

    What is one number per token is kept in float64: it costs nothing beside the tile.
    """

    def __init__(self, targets: Int[Tensor, " n"], wants_statistics: bool = True) -> None:
        self._targets = targets
        self._wants_statistics = wants_statistics
        zero = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        self.target_logit = torch.full_like(zero, -torch.inf)
        self.top = torch.full_like(zero, -torch.inf)
        self.top_index = torch.zeros_like(targets)
        self.total, self.squares, self.spread = zero, zero, zero
        self._is_empty = True

    @property
    def shift(self) -> Float[Tensor, " n"]:
        """What was subtracted from the logits of every E so far: the largest of the others."""
        return self.top.masked_fill(self.top == -torch.inf, 0.0)

    def add(
        self, z: Float[Tensor, "n w"], weights: Float[Tensor, "n w"], first: int = 0
    ) -> Float[Tensor, " n"] | None:
        """Take in the logits of classes first, first + 1, ... and write their E into `weights`.

        z is overwritten; it may be `weights` itself where no statistics are wanted. E of the target
        is 0. Returns what earlier tiles' E have to be multiplied by; None for the first tile.
        """
        place, inside = self._take_target(z, first)
        if self._wants_statistics:
            tile_top, tile_index = first_max(z)
            self.top_index = torch.where(tile_top > self.top, tile_index + first, self.top_index)
        else:
            tile_top = z.amax(-1)
        before = self.top
        self.top = torch.maximum(before, tile_top)
        z.sub_(self.shift.to(z.dtype)[:, None]).mul_(LOG2E)
        torch.exp2(z, out=weights)
        total = weights.sum(-1)
        norm = torch.linalg.vector_norm(weights, dim=-1).double()
        if self._wants_statistics:
            z.scatter_(1, place, torch.where(inside, 0.0, z.gather(1, place)))
            spread = z.mul_(weights).sum(-1)
            if not bool(spread.isfinite().all()):  # 0 * -inf: such a class adds nothing
                spread = z.nan_to_num_(nan=0.0).sum(-1)
        step = before - self.shift  # -inf as long as nothing but the target was seen
        factor = step.exp()
        if self._wants_statistics:
            moved = self.spread + step.clamp(min=-1e4) * self.total
            self.spread = factor * moved + spread.double() / LOG2E
        self.total = factor * self.total + total
        self.squares = factor.square() * self.squares + norm.square()
        was_empty, self._is_empty = self._is_empty, False
        return None if was_empty else factor.to(z.dtype)

    def _take_target(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keep the target's logit if this tile holds it, and put -inf in its place.

        Returns the place [n, 1], any one if it is not here, and whether it is here [n, 1].
        """
        place = (self._targets - first)[:, None]
        inside = (place >= 0) & (place < z.shape[1])
        place = place.clamp_(0, z.shape[1] - 1)
        found = z.gather(1, place)
        self.target_logit = torch.where(inside[:, 0], found[:, 0].double(), self.target_logit)
        z.scatter_(1, place, torch.where(inside, -torch.inf, found))
        return place, inside

    def sums(self) -> tuple[TokenSums, Float[Tensor, " n"]]:
        """Return what the tiles so far add up to, and the scale of E, in float64.

        The statistics mean nothing where they are not wanted.
        """
        z_y, shift = self.target_logit, self.shift
        others = self.total.log() + shift
        gap = z_y - others
        loss, e_y, p_y = -F.logsigmoid(gap), -torch.sigmoid(-gap), torch.sigmoid(gap)
        lse = torch.logaddexp(others, z_y)
        scale = (shift - lse).exp()
        sq_rest = scale.square() * self.squares
        # sum p (lse - z) over the other classes, in two sums of one sign: nothing cancels.
        surprise = scale * ((lse - shift) * self.total - self.spread)
        margin = z_y - self.top
        is_first = (margin > 0) | ((margin == 0) & (self._targets < self.top_index))
        # The errors add up to 0, so the logits may be shifted: no digits are lost to their mean.
        aligned = scale * self.spread + e_y * (z_y - shift)
        sums = TokenSums(
            loss=loss,
            error_target=e_y,
            lse=lse,
            el2n=torch.hypot(scale * self.squares.sqrt(), e_y),
            entropy=surprise + torch.where(p_y > 0, p_y * loss, 0.0),
            margin=margin,
            correct=is_first.double(),
            sq_prob=sq_rest + p_y.square(),
            aligned=aligned,
            argmax=torch.where(is_first, self._targets, self.top_index),
        )
        return sums, scale


def first_max(z: Float[Tensor, "n w"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return each row's largest element and the first place where it is.

    By blocks: torch's arg-max reads ten times slower than its maximum.
    """
    width = 256 if z.shape[1] >= 4096 else 64
    main = z.shape[1] // width * width
    if main <= width:
        top, at = z.max(1)
        return top, at
    blocks = z[:, :main].view(len(z), -1, width)
    _, block = blocks.amax(2).max(1)
    top, at = blocks[torch.arange(len(z), device=z.device), block].max(1)
    at = at + block * width
    if main < z.shape[1]:
        tail, tail_at = z[:, main:].max(1)
        top, at = torch.where(tail > top, tail, top), torch.where(tail > top, tail_at + main, at)
    return top, at
