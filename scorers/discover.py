"""Finds out how a model uses its parameters, by running two and three of its rows.

Where the rows are in a tensor is told by how its shape grows from two rows to three, and is
believed only if the values agree too: the first two of three rows, and the three in reverse, must
be found where that layout says. A flat axis (rows and tokens together) is believed only inside a
module whose inputs and outputs carry the rows on an axis of their own and that does no routing:
otherwise rows might sit elsewhere in another batch.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from curate.scorers.find_head import find_head
from curate.scorers.parts import Layout
from curate.scorers.plan import WHOLE, CallAxes, Path, Plan
from curate.scorers.prepared import canonical_name, named_parameters
from curate.scorers.recording import Call, Recording, Seen
from curate.scorers.taps import UseKey

MOST_OWNERS = 3  # larger modules cost nearly as much as the whole model


def make_plan(
    names: list[str], model: nn.Module, two: Recording, three: Recording, reverse: Recording
) -> Plan:
    """Return the plan for these parameters from runs of rows (a, b), (a, b, c) and (c, b, a)."""
    hidden = two.hidden_names | three.hidden_names | reverse.hidden_names
    plan = Plan(leaf_axes=_call_axes(two, three, reverse), hidden=frozenset(hidden))
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
    plan.head = find_head(three, {id(p): n for n, p in named_parameters(model).items()})
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
    # In both, since the number of pieces joined may be that of the rows by chance.
    if (a.after_reorder and b.after_reorder) or b.shape != c.shape:
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
            None
            if x.after_reorder and y.after_reorder
            else _axes_of_call(x, y, two.sequences, three.sequences)
            for x, y in zip(runs[0][name], calls, strict=True)
        }
        found[name] = axes.pop() if len(axes) == 1 else None
    return {name: axes for name, axes in found.items() if axes is not None}


def _axes_of_call(small: Call, large: Call, n: int, m: int) -> CallAxes | None:
    if small.after_reorder and large.after_reorder:
        return None
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
