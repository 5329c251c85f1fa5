"""Cross entropy per token, and what else the error vector e = p - y tells, exact on confident rows.

Shapes: *t any leading axes (sequences, tokens), N their product, C classes or vocabulary size.

Written through the log-sum over the *other* classes, o = log sum_{k != y} exp(z_k):

    loss = softplus(o - z_y)        e_y = -sigmoid(o - z_y) = -sum_{k != y} p_k        e_k = p_k

Autograd's p_y - 1 cancels where p_y is near 1 (4 % off at ||e|| = 8e-5 in float32); this does not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
# Elements of logits worked on at a time: the float32 scratch stays in a core's cache on a CPU
# (1 Mi elements = 4 MiB), and is large enough to fill a GPU.
CHUNK_CPU = 1 << 20
CHUNK_GPU = 1 << 26


def token_cross_entropy(
    logits: Float[Tensor, "*t c"], targets: Int[Tensor, "*t"]
) -> Float[Tensor, "*t"]:
    """Return -log softmax(logits)[target] of every token, 0 where the target is IGNORE (-100).

    The backward pass is exact on confident tokens and 0 on ignored ones, whatever their logits
    hold. Computes and returns float32 (float64 for float64 logits); scratch memory is one chunk.
    Differentiable once.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


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


def token_statistics(logits: Float[Tensor, "*t c"], targets: Int[Tensor, "*t"]) -> TokenStatistics:
    """Return the statistics of every token in float32 (float64 for float64 logits).

    Scratch memory is one chunk, never another [*t, c]. Carries no gradient.
    """
    flat, target = logits.detach().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    out = torch.zeros(4, target.numel(), dtype=_float_of(logits), device=logits.device)
    for rows in _chunks(flat):
        z, y = _others(flat[rows], target[rows])
        top, top_index = z.max(-1)
        z_y = flat[rows].gather(-1, y[:, None]).squeeze(-1).to(z.dtype)
        # One exponential: with w = z - shift and E = exp(w), p = E * exp(shift - lse).
        shift = _finite(top)
        w = z.sub_(shift[:, None])
        e = w.exp()
        total = e.sum(-1)
        loss, e_y, lse = _finish(total, shift, z_y)
        scale = (shift - lse).exp()
        el2n = torch.hypot(scale * torch.linalg.vecdot(e, e).sqrt(), e_y)  # squares underflow
        # sum p (lse - z) over the other classes, in two sums of one sign: nothing cancels.
        # 0 * -inf: a class with probability 0 adds nothing.
        spread = torch.linalg.vecdot(e, w.clamp_(min=-1e4))
        surprise = scale * ((lse - shift) * total - spread)
        margin = z_y - top
        correct = (margin > 0) | ((margin == 0) & (y < top_index))
        values = (el2n, surprise.add_((1 + e_y) * loss), margin, correct.to(z.dtype))
        ignored = target[rows] == IGNORE
        for column, value in zip(out, values, strict=True):
            column[rows] = value.masked_fill(ignored, 0.0)
    return TokenStatistics(*(column.reshape(targets.shape) for column in out))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        flat, target = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        zeros = torch.zeros(3, target.numel(), dtype=_float_of(logits), device=logits.device)
        loss, e_y, lse = zeros.unbind()
        for rows in _chunks(flat):
            z, y = _others(flat[rows], target[rows])
            z_y = flat[rows].gather(-1, y[:, None]).squeeze(-1).to(z.dtype)
            shift = _finite(z.amax(-1))
            total = z.sub_(shift[:, None]).exp_().sum(-1)
            loss[rows], e_y[rows], lse[rows] = _finish(total, shift, z_y)
        ctx.save_for_backward(logits, targets, e_y, lse)
        return loss.masked_fill(target == IGNORE, 0.0).reshape(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, e_y, lse = ctx.saved_tensors
        flat, target = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        seed = grad.reshape(-1)
        error = torch.empty_like(flat)
        for rows in _chunks(flat):
            ignored = target[rows] == IGNORE
            y = target[rows].masked_fill(ignored, 0)[:, None]
            # exp first, scale after: z - lse is at most 0, so nothing overflows.
            e = flat[rows].to(lse.dtype).sub(lse[rows, None]).exp_()
            e.scatter_(-1, y, e_y[rows, None]).mul_(seed[rows, None].to(e.dtype))
            error[rows] = e.masked_fill_(ignored[:, None], 0.0)
        return error.reshape(logits.shape), None


def _others(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return a working copy of the logits with the target's set to -inf, and safe targets."""
    y = targets.masked_fill(targets == IGNORE, 0)
    z = logits.to(_float_of(logits), copy=True)
    return z.scatter_(-1, y[:, None], -torch.inf), y


def _finite(top: Tensor) -> Tensor:
    """Return what to shift the logits by; nothing where there is but one class."""
    return top.masked_fill(top == -torch.inf, 0.0)


def _finish(total: Tensor, shift: Tensor, z_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, e_y and the log-sum-exp over all classes; `total` is over the others."""
    gap = z_y - (total.log() + shift)
    loss = -F.logsigmoid(gap)
    return loss, -torch.sigmoid(-gap), z_y + loss


def _float_of(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(flat: Tensor) -> Iterator[slice]:
    budget = CHUNK_GPU if flat.is_cuda else CHUNK_CPU
    step = max(1, budget // max(1, flat.shape[-1]))
    for start in range(0, flat.shape[0], step):
        yield slice(start, start + step)
