"""What the machine reaches at best, measured: a large matrix product and a large copy."""

from dataclasses import dataclass
from functools import cache

import torch
from timing import milliseconds

# Sides of the product and bytes of the copy: large enough to fill a GPU; tenths of a second on a
# CPU core, and several times what its cache holds.
_SIDE = {"cpu": 1536, "cuda": 8192}
_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Ceilings:
    """Operations (a multiply-add is two) and bytes, read and written, per second."""

    flops: float
    bandwidth: float
    size: int
    """Bytes of an element."""

    def seconds(self, multiplications: float, elements: float) -> float:
        """Return the least time for this many multiply-adds, on elements that move once."""
        return max(2 * multiplications / self.flops, elements * self.size / self.bandwidth)

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:.3g} GB/s"


@cache
def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Return the ceilings for a dtype with the number of threads torch has now."""
    side = _SIDE[device.type] // (4 if quick else 1)
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    product = milliseconds(lambda: a @ b, device)
    source = torch.ones(_BYTES[device.type] // (16 if quick else 1) // 4, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    return Ceilings(
        2 * side**3 / (product * 1e-3), 2 * source.nbytes / (copy * 1e-3), a.element_size()
    )
