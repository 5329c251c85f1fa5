"""Cross entropy per token, and what else the error vector e = p - y tells, exact on confident rows.

Shapes: *t any leading axes (sequences, tokens), n their product, c classes or vocabulary size.

Written through the log-sum over the *other* classes (`kernels/online_softmax.py`), so that

    loss = softplus(o - z_y)        e_y = -sigmoid(o - z_y) = -sum_{k != y} p_k        e_k = p_k
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from curate.kernels.launch import uses_triton
from curate.kernels.online_softmax import (
    IGNORE,
    LOG2E,
    OnlineSoftmax,
    TokenStatistics,
    TokenSums,
)
from curate.kernels.softmax_tiles import exponentials, partial_sums, totals

__all__ = [
    "IGNORE",
    "Gathered",
    "TokenStatistics",
    "TokenSums",
    "gathering",
    "token_cross_entropy",
    "token_statistics",
    "token_sums",
]

# Elements of logits worked on at a time: the float32 scratch (twice 1 Mi elements) stays in a
# CPU's cache, and 64 Mi fill a GPU.
CHUNK_CPU = 1 << 20
CHUNK_GPU = 1 << 26


def token_cross_entropy(
    logits: Float[Tensor, "*t c"], targets: Int[Tensor, "*t"]
) -> Float[Tensor, "*t"]:
    """Return -log softmax(logits)[target] of every token, 0 where the target is IGNORE (-100).

    The backward pass is exact on confident tokens and 0 on ignored ones, whatever their logits
    hold. Computes and returns float32 (float64 for float64 logits); scratch memory is one chunk.
    Differentiable once. Within `gathering()` the statistics are taken in the same pass.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


def token_statistics(logits: Float[Tensor, "*t c"], targets: Int[Tensor, "*t"]) -> TokenStatistics:
    """Return the statistics of every token in float32 (float64 for float64 logits).

    Scratch memory is one chunk, never another [*t, c]. Carries no gradient.
    """
    return token_sums(logits, targets).statistics


def token_sums(
    logits: Float[Tensor, "*t c"], targets: Int[Tensor, "*t"], *, wants_statistics: bool = True
) -> TokenSums:
    """Return loss, error at the target, log-sum-exp and the statistics, from one pass.

    Without statistics only the first three mean anything. Carries no gradient.
    """
    flat, target = rows_of(logits.detach()), targets.reshape(-1).contiguous()
    if uses_triton(flat):
        values, index = totals(partial_sums(flat, target), target)
        shaped = values.view(len(values), *targets.shape)
        return TokenSums._make((*shaped[:-1], index.view(targets.shape)))
    dtype = float_of(logits)
    out = torch.zeros(len(TokenSums._fields) - 1, target.numel(), dtype=dtype, device=logits.device)
    argmax = torch.zeros_like(target)
    chunk = chunk_rows(flat)
    z, weights = flat.new_empty(2, min(chunk, len(flat)), flat.shape[1], dtype=dtype).unbind()
    for start in range(0, len(flat), chunk):
        rows = slice(start, min(start + chunk, len(flat)))
        here, ignored = rows.stop - start, target[rows] == IGNORE
        online = OnlineSoftmax(target[rows].masked_fill(ignored, 0), wants_statistics)
        online.add(z[:here].copy_(flat[rows]), (weights if wants_statistics else z)[:here])
        sums, _ = online.sums()
        out[:, rows] = torch.stack(sums[:-1]).masked_fill_(ignored, 0.0)
        argmax[rows] = sums.argmax.masked_fill(ignored, 0)
    each = out.view(len(out), *targets.shape)
    return TokenSums._make((*each, argmax.view(targets.shape)))


@dataclass
class Gathered:
    """The statistics that were computed beside the losses while `gathering()` was active."""

    head: TokenStatistics | None = None
    """Of the last `linear_cross_entropy`"""
    _kept: list[tuple["_Identity", TokenStatistics]] = field(default_factory=list)

    def statistics(self, logits: Tensor) -> TokenStatistics | None:
        """Return the statistics that belong to this very tensor, unchanged since; else None."""
        for identity, statistics in reversed(self._kept):
            if identity == _Identity.of(logits):
                return statistics
        return None

    def keep(self, logits: Tensor, statistics: TokenStatistics) -> None:
        self._kept.append((_Identity.of(logits), statistics))


@dataclass(frozen=True)
class _Identity:
    """Which tensor it was, without holding it: a storage's address is not used again meanwhile."""

    storage: StorageWeakRef
    version: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> "_Identity":
        version = -1 if x.is_inference() else x._version
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        return _Identity(storage, version, int(x.storage_offset()), tuple(x.shape), x.stride())


_ACTIVE: ContextVar[Gathered | None] = ContextVar("gathered", default=None)


@contextmanager
def gathering() -> Iterator[Gathered]:
    """Have the losses computed inside keep the statistics of their logits, read in the same pass.

    Holds no logits: what has been freed is forgotten.
    """
    token = _ACTIVE.set(gathered := Gathered())
    try:
        yield gathered
    finally:
        _ACTIVE.reset(token)


def active_gathering() -> Gathered | None:
    """Return where statistics are to be kept now, if anywhere."""
    return _ACTIVE.get()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gathered = active_gathering()
        sums = token_sums(logits, targets, wants_statistics=gathered is not None)
        if gathered is not None:
            gathered.keep(logits, sums.statistics)
        ctx.save_for_backward(logits, targets, sums.error_target, sums.lse)
        return sums.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, e_y, lse = ctx.saved_tensors
        flat, target = rows_of(logits), targets.reshape(-1).contiguous()
        seed, e_y, lse = grad.reshape(-1).contiguous(), e_y.reshape(-1), lse.reshape(-1)
        error = flat.new_empty(flat.shape)
        if uses_triton(flat):
            exponentials(flat, target, lse, e_y, error, seed=seed)
            return error.view(logits.shape), None
        chunk = chunk_rows(flat)
        is_direct = flat.dtype == lse.dtype
        for start in range(0, len(flat), chunk):
            rows = slice(start, min(start + chunk, len(flat)))
            ignored = target[rows] == IGNORE
            y = target[rows].masked_fill(ignored, 0)[:, None]
            z = flat[rows] if is_direct else flat[rows].to(lse.dtype)
            # 2^x first, scale after: z - lse is at most 0, so nothing overflows.
            e = torch.sub(z, lse[rows, None], out=error[rows] if is_direct else z)
            e.mul_(LOG2E).exp2_().scatter_(1, y, e_y[rows, None])
            e.mul_(seed[rows, None].to(e.dtype))
            if bool(ignored.any()):
                e.masked_fill_(ignored[:, None], 0.0)
            if not is_direct:
                error[rows] = e
        return error.view(logits.shape), None


def rows_of(logits: Float[Tensor, "*t c"]) -> Float[Tensor, "n c"]:
    """Return the logits as one row per token, the classes of a token side by side."""
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def float_of(logits: Tensor) -> torch.dtype:
    """Return the dtype that results and scratch have."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def chunk_rows(flat: Float[Tensor, "n c"]) -> int:
    """Return how many tokens' logits are worked on at a time."""
    budget = CHUNK_GPU if flat.is_cuda else CHUNK_CPU
    return max(1, budget // max(1, flat.shape[1]))
