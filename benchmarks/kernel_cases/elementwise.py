"""Sums of products over tokens and positions: gradients of norm layers' weights.

Shapes: S samples, T tokens of D features; C channels of P positions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.elementwise import channel_products, norm_products, token_products

# (S, T, D, fits a CPU): a small model, BERT, GPT-2, Llama 1B.
_TOKENS = [
    (16, 128, 256, True), (16, 512, 768, True), (64, 1024, 768, False), (8, 2048, 2048, False),
]  # fmt: skip
# (S, C, P, fits a CPU): a small ResNet, ResNet-50 on 224 x 224.
_CHANNELS = [
    (64, 32, 1024, True), (64, 128, 64, True), (256, 64, 3136, False), (256, 2048, 49, False),
]  # fmt: skip


def _case(
    op: str,
    shape: str,
    sizes: tuple[int, int, int],
    run: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    operations: int,
    is_small: bool,
) -> Case:
    """Count `operations` per element, of which two are read."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(sum(sizes))
        return tuple(torch.randn(sizes, generator=make, device=device).to(dtype) for _ in range(2))

    numel = sizes[0] * sizes[1] * sizes[2]
    return Case(op, shape, inputs, run, plain, operations * numel, 2 * numel, is_small)


def _layer_norm(g: Tensor, x: Tensor) -> Tensor:
    return norm_products(g, x, eps=1e-5, centred=True)


def _plain_layer_norm(g: Tensor, x: Tensor) -> Tensor:
    return (g * F.layer_norm(x, x.shape[2:])).sum(1, dtype=torch.float32)


def _sum_of_products(axis: int) -> Callable[..., Tensor]:
    return lambda x, y: (x * y).sum(axis, dtype=torch.float32)


CASES = [
    case
    for s, t, d, is_small in _TOKENS
    for case in (
        _case("token_products", f"S={s} T={t} D={d}", (s, t, d), token_products,
              _sum_of_products(1), 2, is_small),
        # The mean, the deviation, its square and their sum, the scale, the product and its sum.
        _case("norm_products", f"S={s} T={t} D={d}", (s, t, d), _layer_norm, _plain_layer_norm,
              7, is_small),
    )
] + [
    _case("channel_products", f"S={s} C={c} P={p}", (s, c, p), channel_products,
          _sum_of_products(2), 2, is_small)
    for s, c, p, is_small in _CHANNELS
]  # fmt: skip
