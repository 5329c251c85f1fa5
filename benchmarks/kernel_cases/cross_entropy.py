"""Loss and statistics from stored logits, and the error that goes back.

Shapes: N tokens, C classes.
"""

import torch
import torch.nn.functional as F
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.cross_entropy import token_cross_entropy, token_sums

# (N, C, fits a CPU)
_SHAPES = [
    (65536, 10, True), (4096, 1000, True), (1024, 8192, True), (65536, 1000, False),
    (8192, 50257, False), (4096, 128256, False), (8, 262144, False),
]  # fmt: skip


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    sums = token_sums(logits, targets)
    return torch.stack([sums.loss, sums.el2n, sums.entropy])


def _plain_sums(logits: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.log_softmax(-1, dtype=dtype)
    p = logp.exp()
    loss, entropy = F.nll_loss(logp, targets, reduction="none"), -(p * logp).sum(-1)
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    return torch.stack([loss, p.norm(dim=-1), entropy])


def _error(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    loss = token_cross_entropy(logits, targets)
    return torch.autograd.grad(loss.sum(), logits)[0]


def _plain_error(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.autograd.grad(loss, logits)[0]


def _cases(n: int, c: int, is_small: bool) -> list[Case]:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(n + c)
        logits = torch.randn(n, c, generator=make, device=device).mul_(3)
        targets = torch.randint(0, c, (n,), generator=make, device=device)
        return logits.to(dtype), targets

    shape = f"N={n} C={c}"
    return [
        # A subtraction, an exponential, and a product and a sum for each of three totals.
        Case("token_sums", shape, inputs, _sums, _plain_sums, 8 * n * c, n * c, is_small),
        # The loss reads the logits; the error reads them again and is written: 5 and 3 operations.
        Case("cross_entropy", shape, inputs, _error, _plain_error, 8 * n * c, 3 * n * c, is_small),
    ]


CASES = [case for shape in _SHAPES for case in _cases(*shape)]
