"""Taps: every use of a parameter in a forward pass, seen where it happens.

A torch function mode sees each function that receives a tracked parameter, whichever module calls
it and however: no module hook would fire for `MultiheadAttention.out_proj`, a tied weight or a bare
parameter. The gradient of each use's output is read by a tensor hook in the backward pass, where
the parameter's gradient is put together and dropped again.
"""

import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from curate.scorers.parts import Gradient, Layout, Part, join
from curate.scorers.readers import read_alias, read_use
from curate.scorers.readouts import TwoSidedSketch
from curate.scorers.row_map import RowMap
from curate.scorers.uses import Overwritten, Param, Use

UseKey = tuple[str, tuple[str, ...], int]
"""Kind, parameter names, and which of such uses in this pass."""

Lookups = dict[str, list[Int[Tensor, "s t"]]]
"""What was looked up in each table so far, sequences first."""


class Replan(Exception):
    """The pass met something that the plan does not hold for; it is run again on a new plan."""

    def __init__(self, reason: str, names: Iterable[str] = (), copy: UseKey | None = None) -> None:
        super().__init__(reason)
        self.reason, self.names, self.copy = reason, frozenset(names), copy


@runtime_checkable
class Listener(Protocol):
    """What a tracer reports to."""

    def before(self, key: UseKey, use: Use) -> None: ...
    def after(self, key: UseKey, use: Use, out: Tensor) -> Tensor: ...
    def unknown(self, names: set[str], func: Callable[..., Any]) -> None: ...
    def hidden(self, names: set[str]) -> None: ...
    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...


class Tracer(TorchFunctionMode):
    """Reports each use of the tracked parameters to a listener, which may replace the output."""

    def __init__(self, tracked: Mapping[str, Tensor], listener: Listener) -> None:
        super().__init__()
        self._params = {id(p): Param(name, p.shape) for name, p in tracked.items()}
        self._alive: list[Tensor] = []  # derived tensors, so that no id is used again
        self._listener, self._seen = listener, Counter[tuple[str, tuple[str, ...]]]()

    @contextmanager
    def again(self, listener: Listener, seen: Mapping[Any, int]) -> Iterator[None]:
        """Within: uses are counted on from `seen` and told to another listener."""
        kept, alive = (self._listener, self._seen), len(self._alive)
        self._listener, self._seen = listener, Counter(seen)
        try:
            with self:
                yield
        finally:
            self._listener, self._seen = kept
            for derived in self._alive[alive:]:
                self._params.pop(id(derived), None)
            del self._alive[alive:]

    @property
    def seen(self) -> Mapping[Any, int]:
        """How many uses of each kind there were so far."""
        return self._seen.copy()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        hits = self._hits(args, kwargs)
        if not hits or not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            if not hits:
                self._listener.other(func, args, kwargs, out)
            elif _has_tensor(out):
                self._listener.hidden({p.name for p in hits})
            return out
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Inside the model's own vmap or grad, where outputs cannot be hooked.
            out = func(*args, **kwargs)
            self._listener.unknown({p.name for p in hits}, func)
            return out
        if opened := _opened(func):
            with self:
                return opened(*args, **kwargs)
        use = read_use(func, args, kwargs, self._lookup)
        return (
            self._derived(func, args, kwargs, hits)
            if use is None
            else self._used(use, func, args, kwargs)
        )

    def _used(
        self, use: Use, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        kind = use.kind, tuple(p.name for p in use.params.values())
        key = (*kind, self._seen[kind])
        self._seen[kind] += 1
        self._listener.before(key, use)
        out = func(*args, **kwargs) if use.call is None else use.call()
        return self._listener.after(key, use, out)

    def _derived(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        hits: list[Param],
    ) -> Any:
        """A function that we have no reader for: a new form of the parameter, or a use unknown."""
        out = func(*args, **kwargs)
        if func in _WITHOUT_GRADIENT or not _has_tensor(out) or self._lookup(out) is not None:
            return out
        first = self._lookup(args[0]) if args else None
        alias = read_alias(func, args, kwargs, first) if first and len(hits) == 1 else None
        if alias is not None:
            self._params[id(out)] = alias
            self._alive.append(out)
        else:
            self._listener.unknown({p.name for p in hits}, func)
        return out

    def _hits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Param]:
        found = []
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if (p := self._params.get(id(item))) is not None:
                    found.append(p)
        return found

    def _lookup(self, value: object) -> Param | None:
        return self._params.get(id(value))


_WITHOUT_GRADIENT = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]


def _has_tensor(out: object) -> bool:
    if isinstance(out, (list, tuple)):
        return any(_has_tensor(o) for o in out)
    return isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex())


@cache
def _opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a copy of a Python-level torch function that lets us see what it calls inside.

    `F.multi_head_attention_forward` and its like hand themselves over whole, because their first
    line asks whether a mode is active. In the copy that question is answered with no.
    """
    scope = getattr(func, "__globals__", None)
    if not isinstance(func, types.FunctionType) or scope is None:
        return None
    if not (scope.get("__name__") or "").startswith(("torch.nn.functional", "torch.functional")):
        return None
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    blind = {**scope, **dict.fromkeys(asks, lambda *_: False)}
    copy = types.FunctionType(
        func.__code__, blind, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


class _Anchor(torch.autograd.Function):
    """Makes a value that needs no gradient need one, in place, so that in-place ops may follow.

    `requires_grad_()` would make it a leaf, and a view of a leaf refuses in-place operations.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def anchored(value: Tensor, anchor: Tensor) -> Tensor:
    """Return the value with a gradient to be had, by way of `anchor`, a leaf that requires one."""
    if value.requires_grad:
        return value
    fresh = value.clone() if value._is_view() or value.is_inference() else value
    out: Tensor = _Anchor.apply(fresh, anchor)  # type: ignore[no-untyped-call]
    return out


def listen(out: Tensor, hook: Callable[[Tensor], None], own_base: bool = False) -> RemovableHandle:
    """Call the hook with the gradient of a value as it is now, whatever is done to it in place.

    A view that is changed in place gets a new history without the hook. With `own_base` nobody
    else has what it is a view of, as of the two axes in which torch multiplies three.
    """
    base = out._base
    _ = out.grad_fn  # asked for, or torch dies hooking a view that has been changed in place
    whole = base is not None and base.numel() == out.numel() and base.is_contiguous()
    if own_base and base is not None and whole and base.requires_grad and out.is_contiguous():
        shape = out.shape
        return base.register_hook(lambda g: hook(g.reshape(shape)))  # type: ignore[no-any-return,no-untyped-call]
    return out.register_hook(hook)  # type: ignore[no-any-return,no-untyped-call]


@dataclass
class Taps:
    """The listener of a scoring pass: collects the wanted parameters' gradients, use by use."""

    layouts: Mapping[UseKey, Layout]
    counts: Mapping[str, int]
    """The parameters to be collected here and how often each is used."""
    absent: frozenset[str]
    """Parameters that the plan holds for unused."""
    known_hidden: frozenset[str]
    """Parameters that the probe met where no gradient is recorded, and found right all the same."""
    copies: frozenset[UseKey]
    shapes: Mapping[str, torch.Size]
    sequences: int
    row_map: RowMap
    anchor: Tensor
    consume: Callable[[Gradient], None]
    read_part: Callable[[str, Part], None]
    """What to do with a part of a parameter in `by_part`, instead of adding it up."""
    by_part: Mapping[str, TwoSidedSketch | None]
    """Parameters of which only linear things are wanted, and the sketch where that is all."""
    prepare_head: Callable[[UseKey, Use, Lookups], None]
    """Called before a head with its loss is, with the look-ups made so far."""
    watched: Mapping[UseKey, "Watch"] = field(default_factory=dict)
    on_embedding: Callable[[Use, Tensor, Layout], None] | None = None

    def __post_init__(self) -> None:
        self.later: Callable[[UseKey], Callable[[], Use]] | None = None
        """While a block runs that will be run again: gives the use that is met then."""
        self._parts: dict[str, list[Part]] = defaultdict(list)
        self._pending = Counter[str]()
        self._lookups: Lookups = defaultdict(list)
        self._is_asleep = False
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Within: a backward pass goes by unseen; another one of the same graph follows it."""
        self._is_asleep = True
        try:
            yield
        finally:
            self._is_asleep = False

    def before(self, key: UseKey, use: Use) -> None:
        if use.call is not None:
            self.prepare_head(key, use, self._lookups)
        if key in self.copies:
            for saved in use.saved:
                saved.keep_copy()

    def after(self, key: UseKey, use: Use, out: Tensor) -> Tensor:
        found = self._tapped(key, use, out)
        if found is None:
            return out
        layout, roles, watch = found
        out = layout.spread(anchored(out, self.anchor))
        if watch is not None:
            watch.saw(use, out, layout)
        if self.on_embedding is not None and use.kind == "embedding":
            self.on_embedding(use, out, layout)
        if use.kind == "embedding" and roles:
            index = layout.rows_first(layout.spread(use.saved[0].get()))
            self._lookups[use.params["weight"].name].append(index.reshape(len(index), -1))
        for role in roles:
            self._pending[use.params[role].name] += 1
        weight, is_small = use.params.get("weight"), False
        if weight is not None and "weight" in roles and watch is None and use.shrink is not None:
            if (sketch := self.by_part.get(weight.name)) is not None:
                use.shrink(layout, sketch)
                is_small = True
        if roles or watch is not None:
            is_kept = is_small or watch is not None
            use_of = partial(_itself, use) if is_kept or self.later is None else self.later(key)
            hook = partial(self._backward, key, use_of, layout, roles, watch)
            self._handles.append(listen(out, hook, own_base=use.kind == "linear"))
        return out

    def release(self) -> None:
        """Take the taps off a graph that has been gone through, or will not be.

        A hook holds what listens, which holds places in the graph, which holds the hook: a circle
        that Python's collector does not see, since it goes through the graph's C++ side.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def after_again(self, key: UseKey, use: Use, out: Tensor) -> Tensor:
        """Return what `after` made of this use's output the first time, without a tap."""
        found = self._tapped(key, use, out)
        return out if found is None else found[0].spread(anchored(out, self.anchor))

    def _tapped(
        self, key: UseKey, use: Use, out: Tensor
    ) -> tuple[Layout, frozenset[str], "Watch | None"] | None:
        """Return the use's layout, the roles to be collected and its watch, if it has a tap."""
        names = {p.name for p in use.params.values()}
        if names & self.absent:
            raise Replan("used for the first time", names & self.absent)
        roles = frozenset(role for role, p in use.params.items() if p.name in self.counts)
        watch = self.watched.get(key)
        if not roles and watch is None and self.on_embedding is None:
            return None
        layout = self._layout(key, names, out)
        return None if layout is None else (layout, roles, watch)

    def _layout(self, key: UseKey, names: set[str], out: Tensor) -> Layout | None:
        layout = self.layouts.get(key)
        if layout is not None:
            layout = replace(layout, sequences=self.sequences)
            if layout.fits(out.shape):
                return layout
        collected = names & self.counts.keys()
        if collected:
            raise Replan("used in a form that the probe did not meet", collected)
        return None

    def unknown(self, names: set[str], func: Callable[..., Any]) -> None:
        if names := names & (self.counts.keys() | self.absent):
            raise Replan(f"used by {torch.overrides.resolve_name(func)}", names)

    def hidden(self, names: set[str]) -> None:
        if names := (names & self.counts.keys()) - self.known_hidden:
            raise Replan("used where no gradient is recorded, as the probe did not", names)

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None: ...

    def check(self) -> None:
        """Compare the uses met in the forward pass with the plan's count."""
        changed = {name for name, n in self.counts.items() if self._pending[name] != n}
        if changed:
            raise Replan("used another number of times than in the probe", changed)

    def _backward(
        self,
        key: UseKey,
        use_of: Callable[[], Use],
        layout: Layout,
        roles: frozenset[str],
        watch: "Watch | None",
        g: Tensor,
    ) -> None:
        if self._is_asleep:
            return
        use = use_of()
        try:
            if watch is not None:
                watch.grad(g)
            parts = use.parts(g, layout, roles)
        except Overwritten:
            raise Replan("input overwritten in place", copy=key) from None
        for saved in use.saved:
            saved.drop()
        for role, part in parts.items():
            name = use.params[role].name
            self._pending[name] -= 1
            if name in self.by_part:
                self.read_part(name, part)
                continue
            self._parts[name].append(part)
            if self._pending[name] == 0:
                self._finish(name)

    def flush(self) -> None:
        """Finish the parameters some of whose uses had no part in the loss."""
        for name in list(self._parts):
            self._finish(name)

    def _finish(self, name: str) -> None:
        parts = self._parts.pop(name)
        self.consume(join(name, self.shapes[name], parts, self.row_map))


def _itself(use: Use) -> Use:
    return use


@runtime_checkable
class Watch(Protocol):
    """Looks at one use as a whole, beside the collection of its parameters."""

    def saw(self, use: Use, out: Tensor, layout: Layout) -> None: ...
    def grad(self, g: Tensor) -> None: ...
