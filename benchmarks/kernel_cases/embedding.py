"""Squared norms and cross terms of look-ups.

Shapes: S samples, T look-ups of D features in a table of V rows; U tokens of a tied head.
"""

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.embedding import embedding_cross_at, embedding_sq_norm

# (S, T, D, V, fits a CPU): a small model, GPT-2, Llama 1B, a long context.
_SHAPES = [
    (16, 128, 256, 8192, True), (16, 512, 768, 50257, True), (64, 1024, 768, 50257, False),
    (8, 2048, 2048, 128256, False), (1, 32768, 2048, 128256, False),
]  # fmt: skip


def _look_ups(s: int, t: int, v: int, device: torch.device) -> Tensor:
    """Return ids as frequent as words are: Zipf's law, by inversion."""
    make = torch.Generator(device).manual_seed(s + t)
    return (v ** torch.rand(s, t, generator=make, device=device)).long() - 1


def _plain_norm(index: Tensor, right: Tensor) -> Tensor:
    same = index[:, :, None] == index[:, None]
    return ((right @ right.mT).float() * same).sum((1, 2))


def _plain_cross(at: Tensor, right: Tensor, other: Tensor) -> Tensor:
    return ((other @ right.mT) * at).sum((1, 2), dtype=torch.float32)


def _norm(s: int, t: int, d: int, v: int, is_small: bool) -> Case:
    """Each row is added to its place once, and each place squared: 3 operations an element."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(d)
        right = torch.randn(s, t, d, generator=make, device=device).to(dtype)
        return _look_ups(s, t, v, device), right

    shape = f"S={s} T={t} D={d} V={v}"
    return Case(
        "embedding_sq_norm", shape, inputs, embedding_sq_norm, _plain_norm,
        flops=3 * s * t * d, elements=s * t * d, is_small=is_small,
    )  # fmt: skip


def _cross(s: int, t: int, d: int, is_small: bool) -> Case:
    """Every pair of a look-up and a token: a dot product over D, one multiplication, one sum."""

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(d)
        sizes = (s, t, t), (s, t, d), (s, t, d)
        return tuple(torch.randn(n, generator=make, device=device).to(dtype) for n in sizes)

    return Case(
        "embedding_cross_at", f"S={s} T=U={t} D={d}", inputs, embedding_cross_at, _plain_cross,
        flops=2 * s * t * t * (d + 1), elements=s * (t * t + 2 * t * d), is_small=is_small,
    )  # fmt: skip


CASES = [_norm(*shape) for shape in _SHAPES] + [
    _cross(s, t, d, is_small) for s, t, d, _, is_small in _SHAPES[:4]
]
