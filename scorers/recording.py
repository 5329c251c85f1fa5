"""What one forward pass does with the parameters: their uses, and the modules they happen in."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curate.kernels.rademacher import signs, stream_key
from curate.scorers.prepared import canonical_name
from curate.scorers.protocol import Outputs
from curate.scorers.row_moves import RowMoves
from curate.scorers.taps import Tracer, UseKey, anchored
from curate.scorers.uses import Use


@dataclass
class Call:
    """One call of one module."""

    module: str
    inputs: list[torch.Size] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)
    routes: bool = False
    reordered: bool = False
    after_reorder: bool = False
    """It began after an enclosing module had sorted the rows."""


@dataclass
class Seen:
    """One use of parameters, with its output's shape and a fingerprint of its values."""

    use: Use
    shape: torch.Size
    print: Tensor
    calls: tuple[int, ...]
    after_reorder: bool


class Recording:
    """The listener of a discovery pass."""

    def __init__(self, sequences: int, anchor: Tensor) -> None:
        self.sequences, self._anchor = sequences, anchor
        self.uses: dict[UseKey, Seen] = {}
        self.unknown_in: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self.hidden_names: set[str] = set()
        """Parameters used where no gradient is recorded, as inside custom autograd Functions."""
        self.calls: list[Call] = []
        self._stack: list[int] = []
        self._moves, self._reordered_outside = RowMoves(sequences), False
        self.outputs: Outputs | None = None

    def before(self, key: UseKey, use: Use) -> None: ...

    def after(self, key: UseKey, use: Use, out: Tensor) -> Tensor:
        print_ = _fingerprint(out.detach())
        seen = Seen(use, out.shape, print_, tuple(self._stack), self._reordered())
        self.uses[key] = seen
        out = anchored(out, self._anchor)
        assert out.grad_fn is not None, "an anchored value has a history"
        marks(out.grad_fn).append((key, out.data_ptr()))
        return out

    def unknown(self, names: set[str], func: Callable[..., Any]) -> None:
        for name in names:
            self.unknown_in[name].append(tuple(self._stack))

    def hidden(self, names: set[str]) -> None:
        self.hidden_names |= names

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        self._moves.made(func, args, out)
        if self._moves.routes(func, args, kwargs):
            for i in self._stack:
                self.calls[i].routes = True
        if self._moves.reorders(func, args, kwargs):
            if self._stack:
                self.calls[self._stack[-1]].reordered = True
            else:
                self._reordered_outside = True

    def _reordered(self) -> bool:
        return self._reordered_outside or any(self.calls[i].reordered for i in self._stack)

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Keep the stack of module calls while the model runs."""
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter, leave = self._hooks(canonical_name(name))
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(name, _shapes((args, kwargs)), after_reorder=self._reordered())
            self._stack.append(len(self.calls))
            self.calls.append(call)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls[self._stack.pop()].outputs = _shapes(output)

        return enter, leave


def record(
    model: nn.Module,
    tracked: Mapping[str, Tensor],
    run: Callable[[], Outputs],
    sequences: int,
    device: torch.device,
) -> Recording:
    """Return what one forward pass does with the tracked parameters."""
    recording = Recording(sequences, torch.zeros((), device=device, requires_grad=True))
    with torch.enable_grad(), recording.listening(model), Tracer(tracked, recording):
        recording.outputs = run()
    return recording


def _fingerprint(out: Tensor) -> Tensor:
    """Return the output with its last axis folded by random signs: small, and as good for telling
    rows apart. Outputs of one or no axis stay whole."""
    out = torch.view_as_real(out).flatten(-2) if out.is_complex() else out
    out = out.float() if out.dtype != torch.float64 else out
    if out.dim() < 2:
        return out.clone()
    key = stream_key(0, "fingerprint", "whole")
    fold = signs(key, torch.arange(out.shape[-1], device=out.device), 1, dtype=out.dtype)
    return out @ fold


def _shapes(value: Any) -> list[torch.Size]:
    return [x.shape for x in tree_leaves(value) if isinstance(x, Tensor)]


def marks(node: Any) -> list[tuple[UseKey, int]]:
    """Return the uses whose output a node of the autograd graph made, with their addresses."""
    made: list[tuple[UseKey, int]] = node.metadata.setdefault("curate", [])
    return made
