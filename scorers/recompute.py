"""Blocks that run again in the backward pass, so that a long row's activations need not be kept.

The graph is that of a plain pass, and so are all gradients; only what autograd and the taps would
keep of a repeated block is left out. When the backward pass first asks for any of it, the block is
run once more on the inputs it had, and everything asked for is taken from that run. Kept are the
blocks' inputs and one block's activations, instead of all blocks' activations.

A custom autograd Function around each block would keep as little, but cuts the graph: gradients
would not reach tensors that a block has by closure, nor weights that are differentiated beside it.
What cannot be run twice (a block that keeps a cache, or that behaves otherwise the second time) is
noticed, and kept as in a plain pass from then on.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from curate.scorers.casting import Casting
from curate.scorers.memory import is_out_of_memory
from curate.scorers.prepared import canonical_name
from curate.scorers.taps import Replan, Taps, Tracer, UseKey, anchored
from curate.scorers.uses import Use

log = logging.getLogger("curate.engine")

_LISTS = (nn.ModuleList, nn.ModuleDict)
Again = Callable[[], AbstractContextManager[None]]


@dataclass
class Recompute:
    """Whether a model's blocks run twice, and what was learnt of them."""

    on: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    """Blocks that are not run twice, and why."""
    overwritten: dict[str, set[int]] = field(default_factory=dict)
    """Blocks some of whose inputs are changed in place: a copy is kept of those."""

    @contextmanager
    def listening(
        self, model: nn.Module, taps: Taps, tracer: Tracer, again: Again
    ) -> Iterator[None]:
        """Within: the model's blocks run without what they would keep for the backward pass.

        `again` is entered whenever a block runs again.
        """
        found = repeated_blocks(model) if self.on else {}
        blocks = {name: m for name, m in found.items() if name not in self.refused}
        own = {name: m.__dict__.get("forward") for name, m in blocks.items()}
        for name, m in blocks.items():
            m.__dict__["forward"] = self._twice(name, m.forward, taps, tracer, again)
        try:
            yield
        finally:
            for name, m in blocks.items():
                del m.__dict__["forward"]
                if own[name] is not None:
                    m.__dict__["forward"] = own[name]

    def _twice(
        self,
        name: str,
        forward: Callable[..., Any],
        taps: Taps,
        tracer: Tracer,
        again: Again,
    ) -> Callable[..., Any]:
        @wraps(forward)
        def first(*args: Any, **kwargs: Any) -> Any:
            # Inside another block, that one runs again with all that is in it.
            if taps.later is not None or not torch.is_grad_enabled() or _caches((args, kwargs)):
                return forward(*args, **kwargs)
            return _Run(self, name, forward, args, kwargs, taps, tracer, again).first()

        return first

    def refuse(self, name: str, reason: str) -> Replan:
        """Return what to raise so that the pass is made again with this block as it is."""
        self.refused[name] = reason
        log.warning("%s is not run twice: %s", name, reason)
        return Replan(f"{name} cannot be run twice")


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the model's outermost lists of modules, by canonical name.

    A list counts if no member has more than half of all their weights (of two, two thirds): that is
    a chain of equals, not a model with its head. A list's only member may be used many times.
    Members without modules of their own are left out: they keep little but their input.
    """
    found: dict[int, tuple[str, nn.Module]] = {}

    def look(module: nn.Module, path: str) -> None:
        blocks = _blocks(module)
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if name in blocks:
                found.setdefault(id(child), (canonical_name(inner), child))
            else:
                look(child, inner)

    look(model, "")
    return dict(found.values())


def _blocks(module: nn.Module) -> set[str]:
    if not isinstance(module, (*_LISTS, nn.Sequential)):
        return set()
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in module.named_children()
        if any(True for _ in child.children())
        and not isinstance(child, (*_LISTS, torch.jit.ScriptModule))
    }
    sizes = {name: size for name, size in sizes.items() if size}
    if len(sizes) == 1 and isinstance(module, _LISTS):
        return set(sizes)
    most = 2 / 3 if len(sizes) == 2 else 1 / 2
    return set(sizes) if sizes and max(sizes.values()) <= most * sum(sizes.values()) else set()


def _is_cache(value: object) -> bool:
    return type(value).__name__.endswith("Cache")


def _caches(values: Any) -> bool:
    """Tell whether there is a cache of keys and values: a second run would find its own in it."""
    return any(_is_cache(x) for x in tree_flatten(values, is_leaf=_is_cache)[0])


class _Held:
    """Stands for a tensor that autograd would keep."""

    __slots__ = ("__weakref__", "looks", "run", "tensor", "version")

    def __init__(self, run: "_Run", tensor: Tensor) -> None:
        self.run, self.looks = run, _looks(tensor)
        self.tensor: Tensor | None = None
        self.version = 0

    def fill(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor is None:
            self.run.again()
        assert self.tensor is not None, "the second run gave all that the first had"
        if self.tensor._version != self.version:  # autograd does not look where it has hooks
            raise RuntimeError(
                "a tensor needed for the gradient was modified by an inplace operation "
                f"in {self.run.name}"
            )
        return self.tensor


class _Run:
    """One call of a block: how to make it again, and what the backward pass takes from that.

    It is the listener of the second run.
    """

    def __init__(
        self,
        owner: Recompute,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        taps: Taps,
        tracer: Tracer,
        again: Again,
    ) -> None:
        self.owner, self.name, self.forward = owner, name, forward
        self.taps, self.tracer, self._contexts = taps, tracer, again
        self._given, self._spec = tree_flatten((args, kwargs))
        self._seen, self._casting = tracer.seen, Casting.now(taps.anchor.device)
        self._held: list[weakref.ref[_Held]] = []
        self._promised: set[UseKey] = set()
        self._uses: dict[UseKey, Use] = {}
        self._is_first, self._is_over = True, False

    def first(self) -> Any:
        leaves = list(self._given)
        for i in self.owner.overwritten.get(self.name, ()):
            self._given[i] = _copy(leaves[i], self.taps.anchor)
        self._versions = [_version(x) for x in self._given]
        args, kwargs = tree_unflatten(leaves, self._spec)
        self.taps.later = self._promise
        try:
            with saved_tensors_hooks(self._drop, _Held.get):
                out = self.forward(*args, **kwargs)
        except RuntimeError as error:
            if "saved tensor hooks" in str(error):  # torch.func inside the block will have none
                raise self.owner.refuse(self.name, "it takes gradients itself") from None
            raise
        finally:
            self.taps.later = None
        self._keep_inputs()
        self._is_first = False
        return out

    def again(self) -> None:
        """Run the block a second time, for everything that was left out of the first."""
        if self._is_first or self._is_over:
            raise self.owner.refuse(self.name, "its gradients are asked for more than once")
        self._is_over = True
        self._keep_inputs()
        self._awaited = iter(self._held)
        args, kwargs = tree_unflatten(self._given, self._spec)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._casting.again())
            stack.enter_context(self._contexts())
            stack.enter_context(saved_tensors_hooks(self._fill, _same))
            stack.enter_context(self.tracer.again(self, self._seen))
            try:
                self.forward(*args, **kwargs)
            except Exception as error:
                if isinstance(error, (Replan, torch.AcceleratorError)) or is_out_of_memory(error):
                    raise
                # It ran before: whatever it says now comes from being run again.
                raise self.owner.refuse(self.name, str(error).strip().split("\n")[0]) from None
        if next(self._awaited, None) is not None or self._promised - self._uses.keys():
            raise self._differs()
        self._given = []

    def _promise(self, key: UseKey) -> Callable[[], Use]:
        self._promised.add(key)
        return partial(self._use, key)

    def _use(self, key: UseKey) -> Use:
        if not self._is_over:
            self.again()
        return self._uses.pop(key)

    def _drop(self, tensor: Tensor) -> _Held:
        held = _Held(self, tensor)
        self._held.append(weakref.ref(held))
        return held

    def _fill(self, tensor: Tensor) -> Tensor:
        reference = next(self._awaited, None)
        if reference is None:
            raise self._differs()
        held = reference()
        if held is not None:  # its node may have been done without it
            if held.looks != _looks(tensor):
                raise self._differs()
            held.fill(tensor)
        return tensor.detach()

    def _keep_inputs(self) -> None:
        """Make the pass again, with copies, if inputs are no longer what they were."""
        now = [_version(x) for x in self._given]
        changed = {
            i for i, (a, b) in enumerate(zip(self._versions, now, strict=True)) if a != b
        } - self.owner.overwritten.get(self.name, set())
        if changed:
            self.owner.overwritten.setdefault(self.name, set()).update(changed)
            log.info("%s: an input is overwritten; a copy is kept from now on", self.name)
            raise Replan(f"{self.name} was given an input that is overwritten")

    def _differs(self) -> Replan:
        return self.owner.refuse(self.name, "it does something else the second time")

    # -- the listener of the second run

    def before(self, key: UseKey, use: Use) -> None:
        self.taps.before(key, use)

    def after(self, key: UseKey, use: Use, out: Tensor) -> Tensor:
        if key in self._promised:
            self._uses[key] = use
        return self.taps.after_again(key, use, out)

    def unknown(self, names: set[str], func: Callable[..., Any]) -> None:
        self.taps.unknown(names, func)

    def hidden(self, names: set[str]) -> None:
        self.taps.hidden(names)

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _looks(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _copy(value: Any, anchor: Tensor) -> Any:
    """Return a copy that may be changed in place, and needs a gradient if the value does."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    return anchored(copy, anchor) if value.requires_grad else copy
