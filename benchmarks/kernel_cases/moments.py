"""The spread over checkpoints at the last of them.

Shapes: B samples of D entries.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.moments import finish_moments

_COUNT = 10
# (B, D, fits a CPU): CIFAR images, ImageNet images, embeddings of 512 tokens.
_SHAPES = [(64, 3072, True), (64, 150528, True), (256, 150528, False), (64, 512 * 768, False)]


def _finish(mean: Tensor, m2: Tensor, x: Tensor) -> Tensor:
    return finish_moments(mean, m2, x, _COUNT)


def _plain(mean: Tensor, m2: Tensor, x: Tensor) -> Tensor:
    before = x.to(mean.dtype) - mean
    mean = mean + before / _COUNT
    return ((m2 + before * (x.to(mean.dtype) - mean)) / _COUNT).sqrt().mean(1)


def _case(b: int, d: int, is_small: bool) -> Case:
    """Two differences, two products, a sum, a root, a scale and a sum per entry; three reads.

    Mean and M2 are float32 whatever the inputs: read as two elements of 16 bits.
    """

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(b + d)
        mean, m2, x = (torch.randn(b, d, generator=make, device=device) for _ in range(3))
        kept = torch.promote_types(dtype, torch.float32)
        return mean.to(kept), m2.abs().to(kept), x.to(dtype)

    return Case(
        "finish_moments", f"B={b} D={d}", inputs, _finish, _plain,
        flops=8 * b * d, elements=3 * b * d, is_small=is_small,
    )  # fmt: skip


CASES = [_case(*shape) for shape in _SHAPES]
