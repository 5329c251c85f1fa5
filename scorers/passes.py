"""One forward pass over a batch and at most one backward pass of its loss, for all signals.

Where the gradient of the target logit is asked for, it has a backward pass of its own.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_unflatten

from curate.kernels.cross_entropy import Gathered, gathering
from curate.kernels.grad_norm import SCRATCH, accumulable
from curate.scorers.fallback import Catcher, Replay, whole_model_rows
from curate.scorers.head import HeadWatch, probabilities, row_statistics
from curate.scorers.head_uses import HeadCall, head_directions, head_wants
from curate.scorers.logit_grad import Given, LogitGradient, logit_gradient
from curate.scorers.needs import Harvest, Needs
from curate.scorers.parts import (
    Full,
    Gradient,
    Layout,
    Part,
    Sketched,
    alone,
    is_by_row,
)
from curate.scorers.plan import Plan
from curate.scorers.prepared import named_parameters, prepared
from curate.scorers.protocol import Outputs
from curate.scorers.readouts import Readout, TwoSidedSketch, is_linear, read_together
from curate.scorers.recompute import Recompute
from curate.scorers.row_map import RowMap
from curate.scorers.rows import count_rows, sequences_of
from curate.scorers.taps import Lookups, Replan, Taps, Tracer, UseKey, anchored
from curate.scorers.uses import Use

log = logging.getLogger("curate.engine")


@dataclass
class Passes:
    """Runs passes of one model by one plan."""

    model: nn.Module
    outputs: Callable[[nn.Module, Any], Outputs | Tensor]
    plan: Plan
    recompute: Recompute = field(default_factory=Recompute)

    def run(self, batch: Any, needs: Needs) -> Harvest:
        """Return what is needed of the batch; the plan may change where it does not hold."""
        if self.recompute.on and needs.logit_grad and needs.of_loss:
            # A block that runs again does so for one backward pass, and is let go after it.
            harvest = self.run(batch, replace(needs, logit_grad=False))
            harvest.logit_grad = self.run(batch, Needs(logit_grad=True)).logit_grad
            return harvest
        if needs.logit_norm and not self.plan.sees_head and needs != Needs(logit_norm=True):
            # Its pass goes by way of all parameters, past the taps of the others.
            harvest = self.run(batch, replace(needs, logit_norm=False))
            harvest.logit_norm = self.run(batch, Needs(logit_norm=True)).logit_norm
            return harvest
        while True:
            one = _Pass(self, batch, needs)
            try:
                return one.run()
            except Replan as change:
                self.replan(change)
            finally:
                one.release()

    def replan(self, change: Replan) -> None:
        if change.copy is not None:
            log.info("%s: %s; a copy is kept from now on", ", ".join(change.copy[1]), change.reason)
            self.plan.copies.add(change.copy)
        new = self.plan.names("unused", change.names)
        self.plan.seen_for_the_first_time(new)
        self.plan.demote(change.names - new, change.reason)

    def evaluate(self, batch: Any) -> Outputs:
        """Return the outputs with one loss per row.

        Raises:
            ValueError: the loss is not one number per row.
        """
        outputs = self.outputs(self.model, batch)
        loss = outputs if isinstance(outputs, Tensor) else outputs.loss
        rows, shape = count_rows(batch), tuple(loss.shape)
        if shape != (rows,):
            raise ValueError(
                f"the loss must be one number per row, shape ({rows},), but has shape {shape}; "
                "use reduction='none' and average over tokens only"
            )
        return Outputs(loss) if isinstance(outputs, Tensor) else outputs


class _Pass:
    def __init__(self, passes: Passes, batch: Any, needs: Needs) -> None:
        self.passes, self.batch, self.needs = passes, batch, needs
        self.model, self.plan = passes.model, passes.plan
        self.params = named_parameters(self.model)
        self.rows = count_rows(batch)
        self.sequences, row_ids = sequences_of(batch)
        self.row_map = RowMap(self.rows, row_ids)
        self.results: dict[str, dict[str, list[Tensor]]] = {key: {} for key in needs.readouts}
        self.sums: dict[str, dict[str, Tensor]] = {key: {} for key in needs.readouts}
        device = next((p.device for p in self.params.values()), torch.device("cpu"))
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.inputs: dict[str, Given] = {}
        self.first: str | None = None
        self.pointers: dict[int, str] = {}
        self.taps: Taps | None = None

    def release(self) -> None:
        """Let go of the graph, so that its memory is free before the next batch."""
        if self.taps is not None:
            self.taps.release()
        self.inputs.clear()

    def run(self) -> Harvest:
        unused = self.plan.names("unused", self.needs.params)
        # With no head to start from, the gradient at the logits is had by way of all parameters.
        everything = self.needs.logit_norm and not self.plan.sees_head
        free = self.params.keys() if everything else unused
        with prepared(self.model, free):
            if not self.needs.differentiates and not self.needs.head:
                with torch.no_grad(), self._gathering() as gathered:
                    outputs = self.passes.evaluate(self.batch)
                return self._harvest(outputs, gathered)
            with self._gathering() as gathered:
                outputs, taps, catcher, watch = self._forward()
            harvest = self._harvest(outputs, gathered)
            del gathered
            if self.needs.logit_grad:
                harvest.logit_grad = self._logit_backward(outputs, taps, catcher)
            if self.needs.of_loss:
                self._backward(outputs, taps, unused, harvest)
            if watch is not None:
                harvest.alignment = watch.alignment
                if watch.logit_norm is not None:
                    harvest.logit_norm = watch.logit_norm
                harvest.hidden = watch.hidden
            self._fall_back(catcher)
        harvest.readouts = {
            key: {name: torch.cat(parts) for name, parts in of.items()} | self.sums[key]
            for key, of in self.results.items()
        }
        return harvest

    def _gathering(self) -> AbstractContextManager[Gathered]:
        return gathering() if self.needs.statistics else nullcontext(Gathered())

    def _forward(self) -> tuple[Outputs, Taps, Catcher, HeadWatch | None]:
        paths = {name: self.plan.path(name) for name in self.needs.params}
        analytic = self.plan.names("analytic", paths)
        owners = {p.module for p in paths.values() if p.module is not None}
        catcher = Catcher(self.model, sorted(owners), self.anchor)
        watch, watched = self._head_watch(), {}
        if self.plan.head is not None and self.plan.head.key is not None and watch is not None:
            watched[self.plan.head.key] = watch
        self.taps = taps = Taps(
            layouts=self.plan.layouts,
            counts={name: self.plan.counts[name] for name in analytic},
            absent=frozenset(self.plan.names("unused", paths)),
            known_hidden=self.plan.hidden,
            copies=frozenset(self.plan.copies),
            shapes={name: p.shape for name, p in self.params.items()},
            sequences=self.sequences,
            row_map=self.row_map,
            anchor=self.anchor,
            consume=self._consume,
            read_part=self._read_part,
            by_part=self._linear_only(analytic),
            prepare_head=self._prepare_head,
            watched=watched,
            on_embedding=self._embedding if self.needs.inputs else None,
        )
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(catcher.listening())
            if self.needs.inputs:
                stack.enter_context(self._watching_inputs())
            tracer = stack.enter_context(Tracer(self.params, taps))
            stack.enter_context(
                self.passes.recompute.listening(self.model, taps, tracer, catcher.again)
            )
            outputs = self.passes.evaluate(self.batch)
        taps.check()
        return outputs, taps, catcher, watch

    def _head_watch(self) -> HeadWatch | None:
        head = self.plan.head
        if not (self.needs.head or self.needs.logit_norm) or head is None or head.key is None:
            return None
        names = head.key[1]
        weight = self.params[names[0]].detach()
        bias = self.params[names[1]].detach() if len(names) > 1 else None
        return HeadWatch(weight, bias, self.row_map, self.needs.alignment)

    def _backward(self, outputs: Outputs, taps: Taps, unused: set[str], harvest: Harvest) -> None:
        names = sorted(unused)
        wanted: dict[str, Tensor | GradientEdge] = {"anchor": self.anchor}
        wanted |= {name: self.params[name] for name in names}
        head = self.plan.head
        fused = head is not None and head.key is not None and head.key[0] == "linear_head"
        if self.needs.logit_norm and not (fused and self.plan.sees_head):
            wanted["logits"] = _logits_of(outputs)
        inputs = self.inputs if self.needs.input_grad else {}
        wanted |= {f"input {name}": x.edge for name, x in inputs.items()}
        grads: dict[str, Tensor | None] = dict.fromkeys(wanted)
        if outputs.loss.requires_grad:
            # The sum of the rows' losses: no row has a part in another's, so each sees its own.
            values = torch.autograd.grad(
                outputs.loss.sum(),
                list(wanted.values()),  # type: ignore[arg-type]  # typed as all of one kind
                allow_unused=True,
            )
            grads = dict(zip(wanted, values, strict=True))
        taps.flush()
        if used := {name for name in names if grads[name] is not None}:
            raise Replan("used for the first time", used)
        if "logits" in grads:
            harvest.logit_norm = self._norm_of(grads["logits"])
        for name, x in inputs.items():
            g = grads[f"input {name}"]
            harvest.input_grad[name] = x.zeros.contiguous() if g is None else g

    def _logit_backward(self, outputs: Outputs, taps: Taps, catcher: Catcher) -> LogitGradient:
        """Go back from the target logits, on the graph that the loss goes back on afterwards."""
        given = None if self.first is None else self.inputs.get(self.first)
        with taps.asleep():
            found = logit_gradient(
                outputs, given, self.batch, self.row_map, keep_graph=self.needs.of_loss
            )
        for caught in itertools.chain(*catcher.calls.values()):
            caught.grads.clear()
        return found

    def _norm_of(self, grad: Tensor | None) -> Tensor:
        if grad is None:
            raise ValueError(
                "the loss does not depend on the tensor given as Outputs.logits; "
                "compute the loss from that very tensor"
            )
        return self.row_map.total(accumulable(grad).square()).sqrt()

    def _harvest(self, outputs: Outputs, gathered: Gathered) -> Harvest:
        harvest = Harvest(
            accumulable(outputs.loss.detach()),
            {},
            targets=outputs.targets,
            row_ids=self.row_map.ids,
        )
        if self.needs.statistics:
            harvest.statistics = row_statistics(outputs, gathered, self.row_map)
        if self.needs.probs:
            harvest.probs = probabilities(outputs, self.rows)
        return harvest

    def _consume(self, gradient: Gradient) -> None:
        wanted = {
            k: read for k, (names, read) in self.needs.readouts.items() if gradient.name in names
        }
        for key, value in read_together(gradient, wanted).items():
            self.results[key].setdefault(gradient.name, []).append(value)

    def _linear_only(self, names: set[str]) -> dict[str, TwoSidedSketch | None]:
        """Return the parameters that are read off part by part, none of them kept for the sum."""
        found: dict[str, TwoSidedSketch | None] = {}
        for name in names:
            wanted = [read for among, read in self.needs.readouts.values() if name in among]
            if all(is_linear(read) for read in wanted):
                only = wanted[0] if len(wanted) == 1 else None
                found[name] = only if isinstance(only, TwoSidedSketch) else None
        return found

    def _read_part(self, name: str, part: Part) -> None:
        for key, (names, read) in self.needs.readouts.items():
            if name not in names:
                continue
            if isinstance(part, Sketched):
                value = part.value
            else:
                value = read(alone(name, self.params[name].shape, part))
            if not is_by_row(part):
                value = self.row_map.add(value)
            so_far = self.sums[key].get(name)
            self.sums[key][name] = value if so_far is None else so_far + value

    def _prepare_head(self, key: UseKey, use: Use, lookups: Lookups) -> None:
        """Ask a head with its loss for what will be read off its gradient."""
        layout, call = self.plan.layouts.get(key), use.call
        assert isinstance(call, HeadCall), "the only use that is called its own way"
        name, found = use.params["weight"].name, list[Readout]()
        if self.plan.path(name).kind == "analytic":
            found = [read for names, read in self.needs.readouts.values() if name in names]
        is_head = self.plan.head is not None and self.plan.head.key == key
        ids = lookups.get(name, [])
        wants = head_wants(
            name,
            found,
            self.needs.alignment and is_head,
            ids[0] if len(ids) == 1 else None,
            self.row_map,
        )
        wants = replace(wants, statistics=self.needs.statistics)
        call.prepare(layout, self.row_map, wants, head_directions(name, found))

    # -- the slower paths

    def _fall_back(self, catcher: Catcher) -> None:
        paths = {name: self.plan.path(name) for name in self.needs.params}
        for path in sorted(set(paths.values()), key=str):
            params = {name: self.params[name] for name in paths if paths[name] == path}
            if path.kind in ("analytic", "unused"):
                continue
            if path.module is None:
                self._whole(params)
                continue
            replay = Replay(
                path.module, catcher, self.plan.leaf_axes[path.module],
                params, self.rows, self.row_map.ids, self._consume,
            )  # fmt: skip
            replay.by_vmap() if path.kind == "vmap" else replay.by_rows()

    def _whole(self, params: dict[str, Tensor]) -> None:
        step = max(1, 4 * SCRATCH // max(1, sum(p.numel() for p in params.values())))
        waiting: list[list[Tensor]] = []
        rows = whole_model_rows(self.batch, lambda b: self.passes.evaluate(b).loss, params)
        for row, (_, grads) in enumerate(rows, start=1):
            waiting.append(grads)
            if len(waiting) == step or row == self.rows:
                stacked = [torch.stack(g) for g in zip(*waiting, strict=True)]
                for (name, p), grad in zip(params.items(), stacked, strict=True):
                    self._consume(Gradient(name, p.shape, full=Full(grad)))
                waiting.clear()

    # -- gradients of inputs

    @contextmanager
    def _watching_inputs(self) -> Iterator[None]:
        """Make the model's float inputs differentiable and remember its token inputs."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.pointers or self.inputs:
                raise ValueError(
                    "gradients of inputs need a loss function that calls the model once"
                )
            leaves, spec = tree_flatten((args, kwargs))
            names = [str(i) for i in range(len(tree_flatten(args)[0]))]
            names += [str(k) for k, v in kwargs.items() for _ in tree_flatten(v)[0]]
            for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
                if not isinstance(leaf, Tensor):
                    continue
                self.first = self.first or name
                if leaf.is_floating_point():
                    leaves[i] = anchored(leaf.detach().clone(), self.anchor)
                    self.inputs[name] = Given.now(leaves[i])
                else:
                    self.pointers[leaf.data_ptr()] = name
            return tree_unflatten(leaves, spec)

        handle = self.model.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _embedding(self, use: Use, out: Tensor, layout: Layout) -> None:
        name = self.pointers.pop(use.saved[0].get().data_ptr(), None)
        if name is not None:
            self.inputs[name] = Given.now(out, layout)


def _logits_of(outputs: Outputs) -> Tensor:
    if outputs.logits is None:
        raise ValueError(
            "el2n_seq needs Outputs with the logits that the loss is computed from; "
            "a loss function that returns only the loss has none"
        )
    if not outputs.logits.requires_grad:
        raise ValueError("el2n_seq needs Outputs.logits to be the tensor the loss is computed from")
    return outputs.logits
