"""A model's last layer taken apart from the rest, so that its logits need never exist.

Shapes: S sequences, T tokens, D hidden size.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curate.scorers.memory import is_out_of_memory

_DECIDED: WeakKeyDictionary[nn.Module, tuple[nn.Module, bool]] = WeakKeyDictionary()
"""Of each model the layer that was tried, and whether the model hands on what it gives."""


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
    versions: list[int] = []

    def hand_on(hidden: Tensor) -> Tensor:
        passed.append(hidden.view_as(hidden))
        versions.append(passed[-1]._version)
        return passed[-1]

    head.forward = hand_on  # type: ignore[method-assign,assignment]
    out: Tensor | None = None
    try:
        out = run()
    except Exception as error:
        # The model may not bear what is no logits; if it is something else, it comes again.
        if not is_new or is_out_of_memory(error):
            raise
    finally:
        del head.forward
    # A version counts what is changed in place: by logits of the same size, as `logits /= 2` does.
    whole = len(passed) == 1 and out is passed[0] and passed[0]._version == versions[0]
    if whole and out is not None:
        _DECIDED[model] = head, True
        return out, head
    out = run()
    _DECIDED[model] = head, False
    return out, None


def _last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the output layer that the model names, or its last linear layer, if it is a plain one.

    Hooks, adapters, parametrisations and subclasses may all do more than multiply.
    """
    named = getattr(model, "get_output_embeddings", None)
    try:
        head = named() if callable(named) else None
    except (AttributeError, NotImplementedError, TypeError):
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
