"""Squared norms of per-sample matrix gradients, in the form that the shape chooses.

Shapes: S samples, T tokens, O rows and I columns; lengths from T / 8 to T where they are packed.
"""

import itertools

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.grad_norm import (
    grad_sq_norm,
    grad_sq_norm_gram,
    grad_sq_norm_packed,
    grad_sq_norm_tiles,
)

# (S, T, O, I, fits a CPU): layers of BERT, GPT-2, a ViT and Llama 1B; a head with its one token.
_SHAPES = [
    (8, 128, 256, 256, True), (8, 128, 768, 768, True), (64, 1, 1000, 2048, True),
    (64, 128, 768, 3072, False), (64, 197, 768, 768, False), (16, 1024, 768, 3072, False),
    (8, 2048, 2048, 2048, False), (8, 2048, 8192, 2048, False), (4096, 1, 1000, 2048, False),
]  # fmt: skip


def _plain(left: Tensor, right: Tensor) -> Tensor:
    return (left.mT @ right).square().sum((1, 2, 3), dtype=torch.float32)


def _plain_packed(left: Tensor, right: Tensor, starts: Tensor) -> Tensor:
    ends = starts.tolist()
    return torch.stack([
        (left[a:b].mT @ right[a:b]).square().sum(dtype=torch.float32)
        for a, b in itertools.pairwise(ends)
    ])  # fmt: skip


def _case(form: str, s: int, t: int, o: int, i: int, is_small: bool) -> Case:
    """The least count of the forms for `grad_sq_norm`; each form's own count for itself.

    Gram: both symmetric matrices' halves, t (t + 1) / 2 entries of o and of i terms.
    Tiles: o i entries of t terms.
    """

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(s + t + o + i)
        return tuple(
            torch.randn(s, 1, t, k, generator=make, device=device).to(dtype) for k in (o, i)
        )

    flops = {"gram": s * t * (t + 1) * (o + i), "tiles": 2 * s * t * o * i}
    run = {"gram": grad_sq_norm_gram, "tiles": grad_sq_norm_tiles, "norm": grad_sq_norm}[form]
    return Case(
        op=f"grad_sq_norm_{form}" if form != "norm" else "grad_sq_norm",
        shape=f"S={s} T={t} O={o} I={i}",
        inputs=inputs,
        run=run,
        plain=_plain,
        flops=flops.get(form, min(flops.values())),
        elements=s * t * (o + i),
        is_small=is_small,
    )


def _packed(s: int, t: int, o: int, i: int, is_small: bool) -> Case:
    lengths = torch.linspace(t / 8, t, s).int()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    n = int(starts[-1])

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(n)
        factors = (torch.randn(n, k, generator=make, device=device).to(dtype) for k in (o, i))
        return (*factors, starts.to(device))

    flops = [min(m * (m + 1) * (o + i), 2 * m * o * i) for m in lengths.tolist()]
    return Case(
        op="grad_sq_norm_packed",
        shape=f"S={s} T={t // 8}..{t} O={o} I={i}",
        inputs=inputs,
        run=grad_sq_norm_packed,
        plain=_plain_packed,
        flops=sum(flops),
        elements=n * (o + i),
        is_small=is_small,
    )


CASES = [
    *(_case("norm", *shape) for shape in _SHAPES),
    *(_case(form, 8, 512, 768, 768, False) for form in ("gram", "tiles")),
    _packed(8, 128, 256, 256, True),
    _packed(64, 512, 768, 3072, False),
]
