"""What a kernel benchmark is made of; the runner checks the result first, then times it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `run` is the public function of kernels/ on what `inputs(device, dtype)` makes; called on the
    same inputs in float64 it gives the truth, since float64 always takes the torch form. `plain` is
    what one would write in torch without the kernel (it may write what the kernel never does).
    `flops` counts multiplications and additions; `elements` counts what must be read or written
    once, in elements of the input's dtype.
    """

    op: str
    shape: str
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    flops: int
    elements: int
    is_small: bool = False
    """Fits a CPU: a fraction of a second there."""
