"""Per-row gradients of what has no factors: through `torch.func`, or one row at a time.

The module that owns a parameter is caught in the main pass with its inputs and the gradients of
its outputs. Afterwards it is run again, alone, on one row after the other or on many at once under
`vmap`; a row's gradient is then the vector-Jacobian product of its own outputs. Exact wherever the
module's inputs and outputs carry everything that joins it to the loss, which the probe checks.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from curate.kernels.grad_norm import SCRATCH
from curate.scorers.casting import Casting
from curate.scorers.memory import is_out_of_memory
from curate.scorers.parts import Full, Gradient
from curate.scorers.plan import CallAxes
from curate.scorers.prepared import canonical_name
from curate.scorers.rows import count_rows, select_rows
from curate.scorers.split_head import handing_on, split_now, stand_in
from curate.scorers.taps import Replan, anchored, listen

Consume = Callable[[Gradient], None]


@dataclass
class Caught:
    """One call of a module: its inputs as they were, and the gradients of its outputs."""

    inputs: list[Any]
    spec: TreeSpec
    casting: Casting
    grads: dict[int, Tensor]
    """By position among the output's tensors."""
    split: nn.Linear | None
    """The head that handed its input on."""

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within: automatic casting and the head are as they were."""
        with self.casting.again(), handing_on(self.split):
            yield


class Catcher:
    """Catches the calls of some modules during the main pass."""

    def __init__(self, model: nn.Module, names: Sequence[str], anchor: Tensor) -> None:
        found = {canonical_name(name): m for name, m in model.named_modules()} if names else {}
        self.modules = {name: found[name] for name in names}
        self.calls: dict[str, list[Caught]] = defaultdict(list)
        self._anchor = anchor

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = []
        for name, module in self.modules.items():
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield from _until_done(handles)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within: outputs are as they were when caught, and nothing is caught."""
        leave = partial(self._outputs, None)
        handles = [m.register_forward_hook(leave) for m in self.modules.values()]
        yield from _until_done(handles)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        # Copies: the model may overwrite its activations before we come back to them.
        kept = [x.detach().clone() if isinstance(x, Tensor) else _plain(x) for x in leaves]
        casting = Casting.now(self._anchor.device)
        self.calls[name].append(Caught(kept, spec, casting, {}, split_now()))

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self._outputs(self.calls[name][-1], module, args, output)

    def _outputs(self, caught: Caught | None, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output so that gradients reach all of it, and catch them."""
        leaves, spec = tree_flatten(output)
        at = 0
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if leaf.is_floating_point():
                # A clone: an output may be one of the inputs, or a view that is changed later.
                if leaf._is_view() or not leaf.requires_grad:
                    leaf = stand_in(leaf, anchored(leaf.clone(), self._anchor))
                if caught is not None:
                    listen(leaf, partial(caught.grads.__setitem__, at))
                leaves[i] = leaf
            at += 1
        return tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class Replay:
    """Gives the gradients of some parameters of a caught module, some rows at a time."""

    module: str
    catcher: Catcher
    axes: CallAxes
    params: Mapping[str, Tensor]
    rows: int
    row_ids: Tensor | None
    consume: Consume

    def by_rows(self) -> None:
        """Loop over the rows with plain autograd.

        Raises:
            Replan: the module cannot be run again on its own.
        """
        with self._refusing("running"):
            self._in_chunks(self._each)

    def by_vmap(self) -> None:
        """Take many rows at once under `vmap`.

        Raises:
            Replan: the module does something that `torch.func` cannot.
        """
        with self._refusing("vmap over"):
            self._in_chunks(self._many)

    @contextmanager
    def _refusing(self, doing: str) -> Iterator[None]:
        """Turn what a module says when it cannot be run so into a change of plan."""
        try:
            yield
        except Exception as error:  # whatever a module says when it is given its rows alone
            if isinstance(error, (Replan, torch.AcceleratorError)) or is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise Replan(f"{doing} {self.module!r} failed: {reason}", self.params) from None

    def _each(self, rows: list[Tensor]) -> list[Tensor]:
        grads = [self._row(index) for index in rows]
        return [torch.stack(g) for g in zip(*grads, strict=True)]

    def _in_chunks(self, gradients: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Deliver [B, ...] to the consumer, made from chunks that keep the scratch bounded."""
        numel = sum(p.numel() for p in self.params.values())
        step = max(1, 4 * SCRATCH // max(1, numel))
        device = next(iter(self.params.values())).device
        if self.row_ids is None:
            sequences = list(torch.arange(self.rows, device=device)[:, None])
        else:
            sequences = _by_row(self.row_ids, self.rows)
        for start in range(0, self.rows, step):
            grads = gradients(sequences[start : start + step])
            for (name, p), grad in zip(self.params.items(), grads, strict=True):
                self.consume(Gradient(name, p.shape, full=Full(grad)))

    def _row(self, index: Tensor) -> list[Tensor]:
        module, params = self.catcher.modules[self.module], list(self.params.values())
        total = [torch.zeros_like(p) for p in params]
        for call in self.catcher.calls[self.module]:
            if not call.grads:
                continue
            args, kwargs = tree_unflatten(self._slice(call, index), call.spec)
            with _differentiable(params):
                with call.again():
                    outputs = _tensors(module(*args, **kwargs))
                pairs = [(outputs[i], self._grad(call, i, index)) for i in call.grads]
                pairs = [(o, g) for o, g in pairs if o.requires_grad]
                if not pairs:
                    continue
                outs, seeds = zip(*pairs, strict=True)
                grads = torch.autograd.grad(outs, params, seeds, allow_unused=True)
            for t, g in zip(total, grads, strict=True):
                if g is not None:
                    t += g
        return total

    def _many(self, rows: list[Tensor]) -> list[Tensor]:
        module, index = self.catcher.modules[self.module], torch.cat(rows)
        local = {canonical_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
        own = {id(p): n for n, p in local.items()}
        params = {own[id(p)]: p.detach() for p in self.params.values()}
        total = [p.new_zeros(len(rows), *p.shape) for p in self.params.values()]
        owners = [i for i, sequences in enumerate(rows) for _ in range(len(sequences))]
        owner = torch.tensor(owners, device=index.device)
        for call in self.catcher.calls[self.module]:
            if call.grads:
                grads = self._one_by_one(module, call, index, params)
                for t, name in zip(total, params, strict=True):
                    t.index_add_(0, owner, grads[name])
        return total

    def _one_by_one(
        self, module: nn.Module, call: Caught, index: Tensor, params: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the gradients [n, ...] of n sequences, each as a batch of its own under vmap."""
        inputs, axes = self._slice(call, index), self._input_axes(call)

        def one(tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...]) -> dict[str, Tensor]:
            given = iter(tensors)
            leaves = [
                x if a is None else next(given).unsqueeze(a)
                for x, a in zip(inputs, axes, strict=True)
            ]
            args, kwargs = tree_unflatten(leaves, call.spec)

            def forward(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
                with call.again():
                    outputs = _tensors(functional_call(module, p, args, kwargs))
                return tuple(outputs[i] for i in call.grads)

            pulled = vjp(forward, params)
            shaped = tuple(s.reshape(o.shape) for s, o in zip(seeds, pulled[0], strict=True))
            grads: dict[str, Tensor] = pulled[1](shaped)[0]
            return grads

        mapped = tuple(x for x, a in zip(inputs, axes, strict=True) if a is not None)
        in_axes = tuple(a for a in axes if a is not None)
        seeds = tuple(self._grad(call, i, index) for i in call.grads)
        seed_axes = tuple(self.axes.outputs[i] for i in call.grads)
        with warnings.catch_warnings():  # operators without a batching rule go row by row
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            result: dict[str, Tensor] = vmap(one, in_dims=(in_axes, seed_axes))(mapped, seeds)
        return result

    def _input_axes(self, call: Caught) -> list[int | None]:
        """Return the row axis of every input leaf, None for what is shared or no tensor."""
        tensors = sum(isinstance(x, Tensor) for x in call.inputs)
        if tensors != len(self.axes.inputs):
            raise Replan(f"{self.module!r} got other inputs than in the probe", self.params)
        given = iter(self.axes.inputs)
        return [next(given) if isinstance(x, Tensor) else None for x in call.inputs]

    def _slice(self, call: Caught, index: Tensor) -> list[Any]:
        axes = self._input_axes(call)
        return [
            x if a is None else self._take(x, a, index)
            for x, a in zip(call.inputs, axes, strict=True)
        ]

    def _grad(self, call: Caught, i: int, index: Tensor) -> Tensor:
        axis = self.axes.outputs[i] if i < len(self.axes.outputs) else None
        if axis is None:
            raise Replan(f"an output of {self.module!r} has no row axis", self.params)
        return self._take(call.grads[i], axis, index)

    def _take(self, x: Tensor, axis: int, index: Tensor) -> Tensor:
        expected = self.rows if self.row_ids is None else len(self.row_ids)
        if x.dim() <= axis or x.shape[axis] != expected:
            raise Replan(f"{self.module!r} was not given the batch's rows", self.params)
        return x.index_select(axis, index)


def whole_model_rows(
    batch: Any, loss_of: Callable[[Any], Tensor], params: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield each row's loss and gradients from a pass over that row alone: the definition."""
    tensors, copies = list(params.values()), True
    for row in range(count_rows(batch)):
        loss, grads, copies = _summed(select_rows(batch, [row]), loss_of, tensors, copies)
        pairs = zip(grads, tensors, strict=True)
        yield loss, [torch.zeros_like(p) if g is None else _dense(g) for g, p in pairs]


def summed_gradient(
    batch: Any, loss_of: Callable[[Any], Tensor], params: Mapping[str, Tensor]
) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
    """Return the rows' losses and the gradient of their sum, by plain autograd.

    A parameter that the loss does not depend on is absent.
    """
    loss, grads, _ = _summed(batch, loss_of, list(params.values()), True)
    pairs = zip(params, grads, strict=True)
    return loss, {name: _dense(g) for name, g in pairs if g is not None}


def _summed(
    batch: Any, loss_of: Callable[[Any], Tensor], tensors: list[Tensor], copies: bool
) -> tuple[Tensor, Sequence[Tensor | None], bool]:
    """Return the losses, the gradient of their sum, and whether the model bears copies."""
    try:
        return *_in_one_pass(batch, loss_of, tensors, copies), copies
    except RuntimeError as error:
        if not copies or "saved tensor hooks" not in str(error):
            raise
    # torch.func inside the model: it does not bear them
    return *_in_one_pass(batch, loss_of, tensors, False), False


def _in_one_pass(
    batch: Any, loss_of: Callable[[Any], Tensor], tensors: list[Tensor], copies: bool
) -> tuple[Tensor, Sequence[Tensor | None]]:
    with _differentiable(tensors, copies):
        loss = loss_of(batch)
        if not loss.requires_grad or not tensors:
            return loss.detach(), [None] * len(tensors)
        grads = torch.autograd.grad(loss.sum(), tensors, allow_unused=True)
    return loss.detach(), grads


def _dense(grad: Tensor) -> Tensor:
    """Return the gradient of an `Embedding(sparse=True)` as that of any other table."""
    return grad.to_dense() if grad.is_sparse else grad


@contextmanager
def _differentiable(params: Sequence[Tensor], copies: bool = True) -> Iterator[None]:
    flags = [p.requires_grad for p in params]
    try:
        for p in params:
            p.requires_grad_(True)
        # Copies on writing, so that a model that overwrites its activations can be asked too.
        with torch.enable_grad(), allow_mutation_on_saved_tensors() if copies else nullcontext():
            yield
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)


def _by_row(row_ids: Tensor, rows: int) -> list[Tensor]:
    """Return the sequences of each row: asked of the device once, not row by row."""
    of_row: list[list[int]] = [[] for _ in range(rows)]
    for sequence, row in enumerate(row_ids.tolist()):
        of_row[row].append(sequence)
    return [torch.tensor(found, dtype=torch.long, device=row_ids.device) for found in of_row]


def _until_done(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(value: Any) -> Any:
    """Return an input that is no tensor; None for a cache, which holds the first run's state."""
    return None if type(value).__name__.endswith("Cache") else value


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor)]
