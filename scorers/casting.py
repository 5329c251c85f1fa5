"""Automatic casting, as it was at one point of a forward pass, and what it does to precision."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Casting:
    """Whether `torch.autocast` is on, and to what, for the CPU and a device."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: torch.device) -> "Casting":
        kinds = sorted({"cpu", device.type})
        return cls(
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in kinds
            )
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within: as it was then."""
        with ExitStack() as stack:
            for kind, is_on, dtype in self.states:
                # Nothing cached: casts of frozen weights never are, and others must not outlive us.
                stack.enter_context(torch.autocast(kind, dtype, enabled=is_on, cache_enabled=False))
            yield


class Coarsest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest rounding error of any floating-point type computed in within.

    Types of one byte are stored in, not computed in.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize > 1:
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
        return out
