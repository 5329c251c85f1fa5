"""Weighted norms, and norm, weighted norm and dots of per-sample matrix gradients at once.

Shapes: S samples, T tokens, O rows and I columns, M directions.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.grad_tiles import grad_tile_sums, grad_weighted_sq_norm, rotated_sq_norm

# (S, T, O, I, M, fits a CPU)
_SHAPES = [
    (8, 128, 256, 256, 4, True), (64, 128, 768, 768, 4, False), (16, 1024, 768, 3072, 8, False),
    (8, 2048, 2048, 2048, 1, False),
]  # fmt: skip


def _factors(s: int, t: int, o: int, i: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    make = torch.Generator(device).manual_seed(s + t + o + i)
    return tuple(torch.randn(s, 1, t, k, generator=make, device=device).to(dtype) for k in (o, i))


def _random(device: torch.device, *shape: int) -> Tensor:
    """Weights and directions: float32 or float64, whatever the factors are."""
    make = torch.Generator(device).manual_seed(sum(shape))
    return torch.rand(shape, generator=make, device=device)


def _grad(left: Tensor, right: Tensor) -> Tensor:
    return (left.mT @ right)[:, 0].to(torch.promote_types(left.dtype, torch.float32))


def _all(left: Tensor, right: Tensor, weight: Tensor, directions: Tensor) -> Tensor:
    sums = grad_tile_sums(left, right, square=True, weight=weight, directions=directions)
    assert sums.square is not None and sums.weighted is not None and sums.dots is not None
    return torch.cat([sums.square[:, None], sums.weighted[:, None], sums.dots], 1)


def _plain_all(left: Tensor, right: Tensor, weight: Tensor, directions: Tensor) -> Tensor:
    grad = _grad(left, right)
    square, weighted = grad.square().sum((1, 2)), (grad.square() * weight).sum((1, 2))
    dots = grad.flatten(1) @ directions.flatten(1).to(grad.dtype).T
    return torch.cat([square[:, None], weighted[:, None], dots], 1)


def _plain_weighted(left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    return (_grad(left, right).square() * weight).sum((1, 2))


def _plain_rotated(left: Tensor, right: Tensor, q: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    grad = _grad(left, right)
    turned = q.to(grad.dtype).T @ grad @ p.to(grad.dtype)
    return (turned.square() * weight).sum((1, 2))


def _cases(s: int, t: int, o: int, i: int, m: int, is_small: bool) -> list[Case]:
    """G: 2 t o i operations; a square and a weight: 4 o i; a direction: 2 o i; per sample."""
    made, read = 2 * s * t * o * i, s * t * (o + i)

    def weighted(device: torch.device, dtype: torch.dtype) -> Inputs:
        return *_factors(s, t, o, i, device, dtype), _random(device, o, i)

    def everything(device: torch.device, dtype: torch.dtype) -> Inputs:
        return *weighted(device, dtype), _random(device, m, o, i) - 0.5

    def rotated(device: torch.device, dtype: torch.dtype) -> Inputs:
        bases = (_random(device, k, k) / k**0.5 for k in (o, i))
        return *_factors(s, t, o, i, device, dtype), *bases, _random(device, o, i)

    shape = f"S={s} T={t} O={o} I={i}"
    return [
        Case(
            "grad_weighted_sq_norm", shape, weighted, grad_weighted_sq_norm, _plain_weighted,
            flops=made + 3 * s * o * i, elements=read + o * i, is_small=is_small,
        ),
        Case(
            "grad_tile_sums", f"{shape} M={m}", everything, _all, _plain_all,
            flops=made + (4 + 2 * m) * s * o * i, elements=read + (1 + m) * o * i,
            is_small=is_small,
        ),
        Case(
            "rotated_sq_norm", shape, rotated, rotated_sq_norm, _plain_rotated,
            flops=made + 3 * s * o * i + 2 * s * t * (o * o + i * i),
            elements=read + o * o + i * i + o * i, is_small=is_small,
        ),
    ]  # fmt: skip


CASES = [case for shape in _SHAPES for case in _cases(*shape)]
