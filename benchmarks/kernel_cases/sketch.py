"""Two-sided sketches at the shapes of a classifier's head, of small and of large language models.

Shapes: s samples, t tokens, o rows and i columns of the matrix, k x k outputs.
"""

from math import sqrt

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.rademacher import signs, stream_key
from curate.kernels.sketch import sketch, sketch_left, sketch_side

KEYS = stream_key(0, "w", "rows"), stream_key(0, "w", "columns")


def _case(s: int, t: int, o: int, i: int, k: int, *, is_small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        left, right = torch.randn(s, 1, t, o), torch.randn(s, 1, t, i)
        return left.to(device, dtype), right.to(device, dtype)

    def run(left: Tensor, right: Tensor) -> Tensor:
        return sketch(left, right, KEYS, (k, k))

    def plain(left: Tensor, right: Tensor) -> Tensor:
        """With sign matrices made on every call, as a projector without a kernel must."""
        at = [torch.arange(n, device=left.device) for n in (o, i)]
        rows, columns = (
            signs(key, n, k, dtype=left.dtype) for key, n in zip(KEYS, at, strict=True)
        )
        tall, wide = left[:, 0] @ rows, right[:, 0] @ columns
        return torch.bmm(tall.mT, wide).flatten(1) / k

    return Case(
        op="sketch",
        shape=f"s{s} t{t} o{o} i{i} k{k}x{k}",
        inputs=inputs,
        run=run,
        plain=plain,
        # Both sides, then their outer product.
        flops=2 * s * t * (o + i) * k + 2 * s * t * k * k,
        elements=s * t * (o + i) + s * k * k,
        is_small=is_small,
    )


def _half(s: int, t: int, o: int, i: int, k: int, *, is_small: bool = False) -> Case:
    """The forward's part (right is projected and dropped) and the backward's, one after another."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        left, right = torch.randn(s, 1, t, o), torch.randn(s, 1, t, i)
        return left.to(device, dtype), right.to(device, dtype)

    def run(left: Tensor, right: Tensor) -> Tensor:
        return sketch_left(left, sketch_side(right, KEYS[1], k), KEYS[0], (k, k))

    def plain(left: Tensor, right: Tensor) -> Tensor:
        grad = torch.bmm(left[:, 0].mT, right[:, 0])
        rows = signs(KEYS[0], torch.arange(o, device=left.device), k, dtype=left.dtype)
        columns = signs(KEYS[1], torch.arange(i, device=left.device), k, dtype=left.dtype)
        return (rows.T @ grad @ columns).flatten(1) / sqrt(k * k)

    return Case(
        op="sketch_left",
        shape=f"s{s} t{t} o{o} i{i} k{k}x{k}",
        inputs=inputs,
        run=run,
        plain=plain,
        flops=2 * s * t * (o + i) * k + 2 * s * t * k * k,
        # The projected side is written in the forward and read in the backward.
        elements=s * t * (o + i + 2 * k) + s * k * k,
        is_small=is_small,
    )


CASES = [
    _case(16, 128, 1024, 256, 32, is_small=True),
    _case(64, 1, 1000, 512, 32, is_small=True),
    _case(16, 1024, 768, 3072, 32),
    _case(16, 1024, 768, 3072, 64),
    _case(8, 2048, 4096, 4096, 32),
    _case(8, 2048, 4096, 4096, 128),
    _case(1, 32768, 4096, 11008, 32),
    _half(16, 128, 1024, 256, 32, is_small=True),
    _half(8, 2048, 4096, 4096, 32),
]
