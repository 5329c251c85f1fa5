"""Where a kernel runs, and what every kernel file needs of Triton.

Triton runs CUDA tensors of 16 or 32 bits, torch all others. `CURATE_KERNELS` overrides that:

    torch       the torch form everywhere
    triton      the Triton form, or an error where it cannot run
    interpret   the Triton form on CPU tensors, interpreted (slow: for tests and for debugging)

Triton decides when a kernel is defined whether it is interpreted: set `CURATE_KERNELS=interpret`
(or TRITON_INTERPRET=1) before the first import of a kernel.
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

if os.environ.get("CURATE_KERNELS") == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

tl: Any
try:
    import triton
    from triton import language

    tl = language
    HAS_TRITON = True
    IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # no Triton for this platform: the kernels below are never called
    tl, HAS_TRITON, IS_INTERPRETED = SimpleNamespace(constexpr=object), False, False


def jit(fn: Callable[..., Any]) -> Any:
    """Return the function as a Triton kernel; as it is where there is no Triton to launch it."""
    # Shape checkers wrap functions before this sees them, and a wrapper has another module's names.
    return triton.jit(inspect.unwrap(fn)) if HAS_TRITON else fn


log = logging.getLogger("curate.kernels")
_TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def uses_triton(*tensors: Tensor) -> bool:
    """Return whether the Triton form of a kernel runs on these tensors; the floats decide.

    Raises:
        ValueError: `CURATE_KERNELS` has no meaning, or asks for Triton where it cannot run.
    """
    setting = os.environ.get("CURATE_KERNELS", "")
    if setting not in ("", "torch", "triton", "interpret"):
        raise ValueError(f"CURATE_KERNELS={setting!r}: choose torch, triton or interpret, or unset")
    fits = all(x.dtype in _TRITON_DTYPES for x in tensors if x.is_floating_point())
    on_gpu = all(x.is_cuda for x in tensors)
    if setting == "torch" or not fits:
        return False
    if setting == "interpret":
        if not IS_INTERPRETED:
            raise ValueError("CURATE_KERNELS=interpret must be set before curate is imported")
        return True
    if setting == "triton" and not (on_gpu and HAS_TRITON):
        raise ValueError("CURATE_KERNELS=triton needs CUDA tensors and the package triton")
    if on_gpu and not HAS_TRITON:
        _say_once("triton is not installed: the kernels run in torch, slower and with more memory")
    return on_gpu and HAS_TRITON


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def precision(x: Tensor) -> str:
    """Return how `tl.dot` multiplies float32: exactly, or in tf32 where torch was told to."""
    allowed = x.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


@cache
def architecture(device: torch.device) -> int:
    """Return the compute capability as 80, 90 …; 90 for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@dataclass(frozen=True)
class Config:
    """Block sizes (constexprs of the kernel) and how it is compiled."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the kernel's arguments."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Variant:
    """One shipped specialisation of a kernel, to be compiled ahead of time in the tests.

    `types` gives every argument that is no constexpr its Triton type, such as "*bf16" or "i64";
    pointers are taken as aligned to 16 bytes, as torch's are.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3


Variants = Callable[[int], Iterator[Variant]]
"""What a kernel file's `variants(architecture)` is: everything that it may launch there."""
