"""One-sided sparse projections at the shapes of small and of large language models.

Shapes: s samples, t tokens, o rows and i columns of the matrix, k outputs.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.rademacher import stream_key
from curate.kernels.sparse_projection import places, sparse_project

KEY = stream_key(0, "w", "sparse")


def _case(s: int, t: int, o: int, i: int, k: int, *, is_small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        left, right = torch.randn(s, 1, t, o), torch.randn(s, 1, t, i)
        return left.to(device, dtype), right.to(device, dtype)

    def run(left: Tensor, right: Tensor) -> Tensor:
        return sparse_project(left, right, KEY, k)

    def plain(left: Tensor, right: Tensor) -> Tensor:
        """Gradients in memory, then a scatter (in no fixed order on a GPU)."""
        grad = torch.bmm(left[:, 0].mT, right[:, 0])
        rows = torch.arange(o, device=grad.device)
        at, sign = places(rows, slice(0, i), KEY, k, 0, grad.dtype)
        out = grad.new_zeros(s, k)
        return out.index_add_(1, at.flatten(), grad.mul_(sign).flatten(1))

    return Case(
        op="sparse_project",
        shape=f"s{s} t{t} o{o} i{i} k{k}",
        inputs=inputs,
        run=run,
        plain=plain,
        # The gradient itself, then one signed addition per coordinate.
        flops=2 * s * o * i * (t + 1),
        elements=s * t * (o + i) + s * k,
        is_small=is_small,
    )


CASES = [
    _case(16, 128, 1024, 256, 2048, is_small=True),
    _case(16, 128, 256, 256, 512, is_small=True),
    _case(16, 1024, 3072, 768, 2048),
    _case(16, 1024, 3072, 768, 4096),
    _case(8, 2048, 4096, 4096, 4096),
    _case(8, 2048, 4096, 4096, 16384),
]
