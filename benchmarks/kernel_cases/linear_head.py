"""The linear head from hidden states: loss and EL2N alone, and all that a sketch pass wants.

Shapes: B rows, T tokens, D width, V classes.
"""

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.linear_head import HeadWants, head_sq_norm, head_sums
from curate.kernels.rademacher import signs, stream_key

# (B, T, D, V, fits a CPU)
_SHAPES = [
    (4, 128, 256, 8192, True), (2, 256, 512, 32000, True), (16, 512, 768, 50257, False),
    (4, 2048, 2048, 128256, False), (2, 2048, 4096, 151936, False),
]  # fmt: skip
_KEY, _K = stream_key(0, "head.weight", "rows"), 32


def _inputs(b: int, t: int, d: int, v: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    make = torch.Generator(device).manual_seed(b + t + d + v)
    hidden = torch.randn(b, t, d, generator=make, device=device)
    weight = torch.randn(v, d, generator=make, device=device).mul_(2 / d**0.5)
    targets = torch.randint(0, v, (b, t), generator=make, device=device)
    return hidden.to(dtype), weight.to(dtype), targets


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    sums = head_sums(hidden, weight, None, targets, HeadWants(statistics=True))
    assert sums.statistics is not None
    return torch.stack([sums.loss, sums.statistics.el2n])


def _plain_forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp, error = _plain_error(hidden, weight, targets)
    loss = F.nll_loss(logp.flatten(0, 1), targets.flatten(), reduction="none")
    return torch.stack([loss.view_as(targets), error.norm(dim=-1)])


def _plain_error(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp = F.linear(hidden, weight).log_softmax(-1, dtype=dtype)
    error, y = logp.exp(), targets[..., None]
    return logp, error.scatter_add_(-1, y, torch.full_like(y, -1.0, dtype=dtype))


def _everything(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    wants = HeadWants(statistics=True, gram=True, hidden_grad=True, sketch=(_KEY, _K))
    sums = head_sums(hidden, weight, None, targets, wants)
    assert sums.hidden_grad is not None and sums.gram is not None and sums.sketch is not None
    return torch.cat([sums.hidden_grad, sums.gram, sums.sketch], 2)


def _plain_everything(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    error = _plain_error(hidden, weight, targets)[1].to(hidden.dtype)
    at = torch.arange(len(weight), device=weight.device)
    s = signs(_KEY, at, _K, dtype=hidden.dtype)
    return torch.cat([error @ weight, torch.bmm(error, error.mT), error @ s], 2)


def _norm(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    sums = head_sums(hidden, weight, None, targets, HeadWants())
    seeds = torch.ones_like(sums.loss)
    return head_sq_norm(hidden, weight, None, targets, sums.lse, sums.error_target, seeds)


def _plain_norm(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    error = _plain_error(hidden, weight, targets)[1].to(hidden.dtype)
    squares = [(e.mT @ h).float().square().sum() for e, h in zip(error, hidden, strict=True)]
    return torch.stack(squares)


def _cases(b: int, t: int, d: int, v: int, is_small: bool) -> list[Case]:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return _inputs(b, t, d, v, device, dtype)

    shape, n = f"B={b} T={t} D={d} V={v}", b * t
    read = n * d + v * d
    return [
        # Logits, and eight operations on each.
        Case(
            "head_forward", shape, inputs, _forward, _plain_forward,
            2 * n * v * d + 8 * n * v, read, is_small,
        ),
        # Logits, e W, e e^T and e S; the gradient and the Gram matrices are written.
        Case(
            "head_everything", shape, inputs, _everything, _plain_everything,
            2 * n * v * (2 * d + t + _K) + 8 * n * v, read + n * (d + t + _K), is_small,
        ),
        # Logits twice (the second time with their log-sum known), and e^T h.
        Case(
            "head_sq_norm", shape, inputs, _norm, _plain_norm,
            3 * 2 * n * v * d + 10 * n * v, 2 * read, is_small,
        ),
    ]  # fmt: skip


CASES = [case for shape in _SHAPES for case in _cases(*shape)]
