"""A model's last layer taken apart from the rest, so that its logits need never exist.

Shapes: S sequences, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curate.scorers.memory import is_out_of_memory

_DECIDED: WeakKeyDictionary[nn.Module, tuple[nn.Module, bool]] = WeakKeyDictionary()
"""Of each model the layer that was tried, and whether the model hands on what it gives."""
_NOW: ContextVar[nn.Linear | None] = ContextVar("split", default=None)


def split_head(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, nn.Linear | None]:
    """Return what goes into the model's last linear layer, and that layer: `run()` gives logits.

    While the model runs, the layer hands its input on. If that very tensor comes out of the model,
    the layer's output would have been the logits, unchanged. Where it does not (soft-capped or
    scaled logits, an adapter on the layer, a layer that is not the last after all), the model runs
    once more as it is, now and as long as it has that layer, and the logits are returned with
    None. So they are where the layer itself is to be trained.
    """
    head = _last_linear(model)
    tried, is_whole = _DECIDED.get(model, (None, True))
    is_new = tried is not head
    if (
        head is None
        or not (is_new or is_whole)
        or _trains(head)
        or torch.is_inference_mode_enabled()
    ):
        return run(), None
    passed: list[Tensor] = []
    this_run = object()  # not the list: tensors in a circle would outlive the pass

    def hand_on(hidden: Tensor) -> Tensor:
        passed.append(_marked(hidden.view_as(hidden), this_run))
        return passed[-1]

    out: Tensor | None = None
    try:
        with handing_on(head, hand_on):
            out = run()
    except Exception as error:
        # The model may not bear what is no logits; if it is something else, it comes again.
        if not is_new or is_out_of_memory(error):
            raise
    whole = len(passed) == 1 and _is_marked(passed[0], this_run)
    if whole and out is not None and _is_marked(out, this_run):
        _DECIDED[model] = head, True
        return out, head
    out = run()
    _DECIDED[model] = head, False
    return out, None


def split_now() -> nn.Linear | None:
    """Return the layer that hands its input on at this moment."""
    return _NOW.get()


@contextmanager
def handing_on(
    head: nn.Linear | None, forward: Callable[[Tensor], Tensor] = Tensor.clone
) -> Iterator[None]:
    """Within: this layer, if any, hands its input on."""
    if head is None:
        yield
        return
    head.forward = forward  # type: ignore[method-assign,assignment]
    before = _NOW.set(head)
    try:
        yield
    finally:
        _NOW.reset(before)
        del head.forward


def stand_in(given: Tensor, new: Tensor) -> Tensor:
    """Return `new`, which a hook puts in place of a value of the same content."""
    return _marked(new, given.__dict__["_curate_split"][0]) if _is_marked(given) else new


def _marked(x: Tensor, owner: object) -> Tensor:
    # A version counts what is changed in place, as by `logits /= 2`, which hidden states bear too.
    x.__dict__["_curate_split"] = owner, x._version
    return x


def _is_marked(x: Tensor, owner: object = None) -> bool:
    found, version = x.__dict__.get("_curate_split", (None, None))
    if found is None or x.is_inference():
        return False
    return version == x._version and (owner is None or found is owner)


def _last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the output layer that the model names, or its last linear layer, if it is a plain one.

    Hooks, adapters, parametrisations and subclasses may all do more than multiply.
    """
    named = getattr(model, "get_output_embeddings", None)
    try:
        head = named() if callable(named) else None
    except (AttributeError, NotImplementedError, TypeError):  # it names none, or asks for more
        head = None
    if head is None:
        head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    return head if type(head) is nn.Linear and _is_plain(head) else None


def _is_plain(head: nn.Linear) -> bool:
    hooks = (
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    )
    return "forward" not in vars(head) and all(
        getattr(hook, "__module__", "").startswith("curate.")  # the engine's own only look
        for of_kind in hooks
        for hook in of_kind.values()
    )


def _trains(head: nn.Linear) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
