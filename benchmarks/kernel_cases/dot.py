"""Dots of per-sample matrix gradients with directions, in the form that the shape chooses.

Shapes: S samples, T tokens, O rows and I columns, M directions; a table of V rows.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.dot import grad_dot, grad_dot_rows, output_dot

# (S, T, O, I, M, fits a CPU)
_SHAPES = [
    (8, 128, 256, 256, 1, True), (8, 128, 256, 256, 8, True), (64, 16, 768, 768, 1, False),
    (64, 128, 768, 3072, 8, False), (8, 2048, 2048, 2048, 1, False),
]  # fmt: skip
# (S, T, O, fits a CPU)
_FREE = [(8, 128, 768, True), (64, 512, 3072, False)]
# (S, T, I, V, M, fits a CPU)
_TABLES = [(8, 128, 256, 5000, 2, True), (64, 512, 768, 50257, 4, False)]


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device
    )


def _plain(left: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    grad = (left.mT @ right).flatten(1).to(torch.promote_types(left.dtype, torch.float32))
    return grad @ directions.flatten(1).to(grad.dtype).T


def _plain_free(grad: Tensor, output: Tensor, bias: Tensor) -> Tensor:
    return (grad * (output - bias)).sum(
        (1, 2), dtype=torch.promote_types(grad.dtype, torch.float32)
    )


def _plain_rows(index: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    return torch.stack([(v[index] * right).sum((1, 2)) for v in directions], 1)


def _dot(s: int, t: int, o: int, i: int, m: int, is_small: bool) -> Case:
    """The cheaper of m products of t o i, and of making G once and reading it with m directions."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        left, right = (_random(device, s, 1, t, k).to(dtype) for k in (o, i))
        return left, right, _random(device, m, o, i)

    return Case(
        "grad_dot", f"S={s} T={t} O={o} I={i} M={m}", inputs, grad_dot, _plain,
        flops=2 * s * o * i * min(m * t, t + m), elements=s * t * (o + i) + m * o * i,
        is_small=is_small,
    )  # fmt: skip


def _free(s: int, t: int, o: int, is_small: bool) -> Case:
    """A difference, a product and a sum for each of s t o numbers; two tensors are read."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        grad = _random(device, s, t, o).to(dtype)
        return grad, _random(device, s, t, o + 1)[..., 1:].contiguous().to(dtype), grad[0, 0]

    return Case(
        "output_dot", f"S={s} T={t} O={o}", inputs, output_dot, _plain_free,
        flops=3 * s * t * o, elements=2 * s * t * o + o, is_small=is_small,
    )  # fmt: skip


def _rows(s: int, t: int, i: int, v: int, m: int, is_small: bool) -> Case:
    """A product and a sum for each of s t i numbers and direction, as many reads of the tables."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(v)
        index = torch.randint(0, v, (s, t), generator=make, device=device)
        return index, _random(device, s, t, i).to(dtype), _random(device, m, v, i)

    return Case(
        "grad_dot_rows", f"S={s} T={t} I={i} V={v} M={m}", inputs, grad_dot_rows, _plain_rows,
        flops=2 * m * s * t * i, elements=(1 + m) * s * t * i, is_small=is_small,
    )  # fmt: skip


CASES = [
    *(_dot(*shape) for shape in _SHAPES),
    *(_free(*shape) for shape in _FREE),
    *(_rows(*shape) for shape in _TABLES),
]
