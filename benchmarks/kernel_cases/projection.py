"""One-sided dense projections: O(s o i (t + k)) by nature, so shapes stay modest.

Shapes: s samples, t tokens, o rows and i columns of the matrix, k outputs.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.projection import project
from curate.kernels.rademacher import signs, stream_key

KEY = stream_key(0, "w", "whole")


def _case(s: int, t: int, o: int, i: int, k: int, *, is_small: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        left, right = torch.randn(s, 1, t, o), torch.randn(s, 1, t, i)
        return left.to(device, dtype), right.to(device, dtype)

    def run(left: Tensor, right: Tensor) -> Tensor:
        return project(left, right, KEY, k)

    def plain(left: Tensor, right: Tensor) -> Tensor:
        """What TRAK does: gradients in memory, signs made anew in blocks of coordinates."""
        grad = torch.bmm(left[:, 0].mT, right[:, 0]).flatten(1)
        out = grad.new_zeros(s, k)
        for at in torch.arange(o * i, device=grad.device).split(1 << 14):
            sign = signs(KEY, at % i, k, rows=at // i, dtype=grad.dtype)
            out += grad[:, at[0] : at[-1] + 1] @ sign
        return out / k**0.5

    return Case(
        op="project",
        shape=f"s{s} t{t} o{o} i{i} k{k}",
        inputs=inputs,
        run=run,
        plain=plain,
        flops=2 * s * o * i * (t + k),
        elements=s * t * (o + i) + s * k,
        is_small=is_small,
    )


CASES = [
    _case(16, 128, 256, 256, 2048, is_small=True),
    _case(16, 128, 1024, 256, 2048),
    _case(16, 128, 3072, 768, 4096),
    _case(16, 1024, 3072, 768, 4096),
]
