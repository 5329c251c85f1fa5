"""Finds out how a model uses its parameters, by running two and three of its rows.

Where the rows are in a tensor is told by how its shape grows from two rows to three, and is
believed only if the values agree too: the first two of three rows, and the three in reverse, must
be found where that layout says. A flat axis (rows and tokens together) is believed only inside a
module whose inputs and outputs carry the rows on an axis of their own and that does no routing:
otherwise rows might sit elsewhere in another batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curate.kernels.rademacher import signs, stream_key
from curate.scorers.parts import Layout
from curate.scorers.plan import WHOLE, CallAxes, HeadPlan, Path, Plan
from curate.scorers.prepared import canonical_name, named_parameters
from curate.scorers.protocol import Outputs
from curate.scorers.taps import Tracer, UseKey, anchored
from curate.scorers.uses import Use

MOST_OWNERS = 3  # larger modules cost nearly as much as the whole model
_T = Tensor
_ROUTES = {
    torch.gather, _T.gather, torch.index_select, _T.index_select, torch.take_along_dim,
    torch.scatter, _T.scatter, _T.scatter_, _T.scatter_add_, torch.scatter_add, _T.scatter_add,
    torch.index_add, _T.index_add, _T.index_add_, _T.index_copy_, _T.index_put_, torch.index_put,
    torch.masked_select, _T.masked_select, _T.masked_scatter, _T.masked_scatter_, torch.take,
}  # fmt: skip
_REORDERS = {
    torch.sort, _T.sort, torch.argsort, _T.argsort, torch.topk, _T.topk, torch.msort,
    torch.nonzero, _T.nonzero, torch.unique, _T.unique, torch.randperm,
    torch._VF._pack_padded_sequence,
}  # fmt: skip


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
        self.unknown_by: dict[str, str] = {}
        self.calls: list[Call] = []
        self._stack: list[int] = []
        self.outputs: Outputs | None = None

    def before(self, key: UseKey, use: Use) -> None: ...

    def after(self, key: UseKey, use: Use, out: Tensor) -> Tensor:
        print_ = _fingerprint(out.detach())
        seen = Seen(use, out.shape, print_, tuple(self._stack), self._reordered())
        self.uses[key] = seen
        out = anchored(out, self._anchor)
        assert out.grad_fn is not None, "an anchored value has a history"
        _marks(out.grad_fn).append((key, out.data_ptr()))
        return out

    def unknown(self, names: set[str], func: Callable[..., Any]) -> None:
        for name in names:
            self.unknown_in[name].append(tuple(self._stack))
            self.unknown_by[name] = torch.overrides.resolve_name(func) or repr(func)

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        routes = func in _ROUTES or func in _REORDERS or _indexes(func, args, kwargs)
        if routes:
            for i in self._stack:
                self.calls[i].routes = True
        if self._stack and func in _REORDERS and self._along_rows(args, kwargs):
            self.calls[self._stack[-1]].reordered = True

    def _reordered(self) -> bool:
        return any(self.calls[i].reordered for i in self._stack)

    def _along_rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Sorting along the row axis puts rows where only this batch's values say."""
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or x.dim() == 0:
            return False
        dims = [a for a in args[1:] if type(a) is int] + [kwargs.get("dim")]
        dim = next((d for d in reversed(dims) if d is not None), -1)
        return x.dim() == 1 or (-x.dim() <= dim < x.dim() and x.shape[dim] == self.sequences)

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


def make_plan(
    names: list[str], model: nn.Module, two: Recording, three: Recording, reverse: Recording
) -> Plan:
    """Return the plan for these parameters from runs of rows (a, b), (a, b, c) and (c, b, a)."""
    plan = Plan(leaf_axes=_call_axes(two, three, reverse))
    for key in three.uses:
        layout = _layout(key, two, three, reverse, plan.leaf_axes)
        if layout is not None:
            plan.layouts[key] = layout
    uses: dict[str, list[UseKey]] = defaultdict(list)
    for key in {**two.uses, **three.uses, **reverse.uses}:
        for name in set(key[1]):
            uses[name].append(key)
    owners = {canonical_name(n): m for n, m in model.named_modules()}
    for name in names:
        plan.counts[name] = sum(p.name == name for k in uses[name] if k in three.uses
                                for p in three.uses[k].use.params.values())  # fmt: skip
        plan.choices[name] = _choices(name, uses[name], plan, three, owners)
    plan.head = _find_head(three, {id(p): n for n, p in named_parameters(model).items()})
    return plan


def _choices(
    name: str,
    keys: list[UseKey],
    plan: Plan,
    three: Recording,
    modules: Mapping[str, nn.Module],
) -> list[Path]:
    stacks = [three.uses[k].calls for k in keys if k in three.uses] + three.unknown_in[name]
    if not keys and not stacks:
        return [Path("unused"), *_through_owners(_static_owners(name, modules), plan)]
    paths = []
    if not three.unknown_in[name] and all(k in plan.layouts for k in keys):
        kinds = dict.fromkeys(k[0] for k in keys)
        paths.append(Path("analytic", detail=" + ".join(kinds)))
    chains = [[three.calls[i].module for i in reversed(stack)] for stack in stacks]
    common = [m for m in chains[0] if all(m in chain for chain in chains)] if chains else []
    return paths + _through_owners(common, plan)


def _static_owners(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that hold a parameter, smallest first."""
    parts = name.split(".")[:-1]
    return [m for n in range(len(parts), -1, -1) if (m := ".".join(parts[:n])) in modules]


def _through_owners(owners: list[str], plan: Plan) -> list[Path]:
    """The smallest module first, after those all of whose outputs are per row."""
    able = [m for m in owners if m in plan.leaf_axes]
    able = sorted(able, key=lambda m: None in plan.leaf_axes[m].outputs)[:MOST_OWNERS]
    return [p for m in able for p in (Path("vmap", m), Path("rows", m))] + [WHOLE]


# -- layouts -------------------------------------------------------------------------------------


def _layout(
    key: UseKey,
    two: Recording,
    three: Recording,
    reverse: Recording,
    axes: Mapping[str, CallAxes],
) -> Layout | None:
    if key not in two.uses or key not in reverse.uses:
        return None
    a, b, c = two.uses[key], three.uses[key], reverse.uses[key]
    if b.after_reorder or b.shape != c.shape:
        return None
    grown = _growing_axis(a.shape, b.shape, two.sequences, three.sequences)
    if grown is None:
        if not b.use.may_be_shared or a.shape != b.shape or not b.shape:
            return None
        # Positions [1, T] have a row axis to spread over; positions [T] are given one.
        layouts = [Layout("shared" if len(b.shape) > 2 and b.shape[0] == 1 else "shared_new")]
    elif not b.use.takes_row_axis(grown, len(b.shape)):
        return None
    elif b.shape[grown] == three.sequences:
        layouts = [Layout("dense", grown)]
    elif grown == 0 and _may_be_flat(b.calls, three, axes):
        layouts = [Layout("flat"), Layout("interleaved")]
    else:
        return None
    return next((x for x in layouts if _agrees(x, a, b, c, two.sequences, three.sequences)), None)


def _growing_axis(small: torch.Size, large: torch.Size, n: int, m: int) -> int | None:
    """Return the one axis that grows with the sequences, from n to m of them, if there is one."""
    if len(small) != len(large):
        return None
    differ = [d for d, (x, y) in enumerate(zip(small, large, strict=True)) if x != y]
    if len(differ) != 1 or small[differ[0]] * m != large[differ[0]] * n:
        return None
    return differ[0] if small[differ[0]] % n == 0 else None


def _may_be_flat(calls: tuple[int, ...], three: Recording, axes: Mapping[str, CallAxes]) -> bool:
    for i in reversed(calls):
        if three.calls[i].module in axes:
            return not three.calls[i].routes
    return False


def _agrees(layout: Layout, a: Seen, b: Seen, c: Seen, n: int, m: int) -> bool:
    if layout.kind.startswith("shared"):
        return _close(a.print, b.print)
    small, large, back = (
        Layout(layout.kind, layout.axis, s).rows_first(x.print) for x, s in ((a, n), (b, m), (c, m))
    )
    # The last rows of the reversed run need not be single sequences; whole rows are compared by
    # the probe. Here the reversed run is compared where one row is one sequence.
    return _close(small, large[:n]) and (m != 3 or _close(large.flip(0), back))


def _close(x: Tensor, y: Tensor) -> bool:
    # Loose, for it tells layouts apart, not roundings: other batch sizes take other kernels.
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.1
    scale = y.abs().amax() if y.numel() else y.new_zeros(())
    return bool(((x - y).abs() <= tolerance * scale).all())


def _fingerprint(out: Tensor) -> Tensor:
    """Return the output with its last axis folded by random signs: small, and as good for telling
    rows apart. Outputs of one or no axis stay whole."""
    out = out.float() if out.dtype != torch.float64 else out
    if out.dim() < 2:
        return out.clone()
    key = stream_key(0, "fingerprint", "whole")
    fold = signs(key, torch.arange(out.shape[-1], device=out.device), 1, dtype=out.dtype)
    return out @ fold


# -- modules -------------------------------------------------------------------------------------


def _call_axes(two: Recording, three: Recording, reverse: Recording) -> dict[str, CallAxes]:
    """Return the row axes of the modules through which rows may be taken one at a time."""
    found: dict[str, CallAxes | None] = {}
    runs = [defaultdict[str, list[Call]](list) for _ in range(3)]
    for run, recording in zip(runs, (two, three, reverse), strict=True):
        for call in recording.calls:
            run[call.module].append(call)
    for name, calls in runs[1].items():
        if len(runs[0][name]) != len(calls) or len(runs[2][name]) != len(calls):
            continue
        axes = {
            None if y.after_reorder else _axes_of_call(x, y, two.sequences, three.sequences)
            for x, y in zip(runs[0][name], calls, strict=True)
        }
        found[name] = axes.pop() if len(axes) == 1 else None
    return {name: axes for name, axes in found.items() if axes is not None}


def _axes_of_call(small: Call, large: Call, n: int, m: int) -> CallAxes | None:
    sides: list[tuple[int | None, ...]] = []
    for x, y in ((small.inputs, large.inputs), (small.outputs, large.outputs)):
        if len(x) != len(y):
            return None
        axes = [None if s == t else _growing_axis(s, t, n, m) for s, t in zip(x, y, strict=True)]
        for s, t, axis in zip(x, y, axes, strict=True):
            if axis is None and s != t and x is small.inputs:
                return None
            if axis is not None and t[axis] != m and x is small.inputs:
                return None
        sides.append(
            tuple(None if a is None or t[a] != m else a for a, t in zip(axes, y, strict=True))
        )
    return CallAxes(*sides) if any(a is not None for a in sides[0]) and sides[1] else None


def _shapes(value: Any) -> list[torch.Size]:
    return [x.shape for x in tree_leaves(value) if isinstance(x, Tensor)]


def _indexes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the call indexes by a tensor."""
    if func in (torch.where, _T.where):
        return len(args) + len(kwargs) == 1
    if func not in (_T.__getitem__, _T.__setitem__):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, (Tensor, list)) for i in index)


def _marks(node: Any) -> list[tuple[UseKey, int]]:
    """Return the uses whose output a node of the autograd graph made, with their addresses."""
    marks: list[tuple[UseKey, int]] = node.metadata.setdefault("curate", [])
    return marks


# -- head ----------------------------------------------------------------------------------------


def _find_head(recording: Recording, names: Mapping[int, str]) -> HeadPlan | None:
    """Return the use that the logits come from: the nearest on the way back through the graph."""
    outputs = recording.outputs
    assert outputs is not None, "recorded before the pass ended"
    if outputs.head is not None:
        own = tuple(names[id(p)] for p in outputs.head.parameters() if id(p) in names)
        uses = [k for k in recording.uses if own and k[0] == "linear" and own[0] in k[1]]
        return HeadPlan(uses[0] if len(uses) == 1 else None, own, False) if own else None
    if outputs.logits is None or outputs.logits.grad_fn is None:
        return None
    products: dict[UseKey, int] = {}
    others: list[str] = []
    queue: list[Any] = [outputs.logits.grad_fn]
    met = set[Any]()
    while queue:
        node = queue.pop(0)
        if node is None or node in met:
            continue
        met.add(node)
        marks = _marks(node)
        for key, pointer in marks:
            if key[0] in ("shift", "scale", "expand"):
                others += key[1]
            else:
                products[key] = pointer
        if not marks or all(key[0] in ("shift", "scale") for key, _ in marks):
            queue += [n for n, _ in node.next_functions]
    classes = outputs.logits.shape[-1]
    if len(products) != 1:
        return None
    ((key, pointer),) = products.items()
    seen = recording.uses[key]
    if seen.use.kind == "embedding" or classes not in (
        seen.shape[-1],
        seen.shape[min(1, len(seen.shape) - 1)],
    ):
        return None
    first = [p.name for p in seen.use.params.values()]
    return HeadPlan(key, tuple(dict.fromkeys(first + others)), pointer == outputs.logits.data_ptr())
