"""A model's last layer taken apart from the rest, so that its logits need never exist.

Shapes: S sequences, T tokens, D hidden size.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_HEADS: WeakKeyDictionary[nn.Module, nn.Linear | None] = WeakKeyDictionary()


def split_head(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, nn.Linear | None]:
    """Return what goes into the model's last linear layer, and that layer: `run()` gives logits.

    While the model runs, the layer hands its input on. If that very tensor comes out of the model,
    the layer's output would have been the logits, unchanged. Where it does not (soft-capped or
    scaled logits, an adapter on the layer), the model runs once more as it is, now and ever after,
    and the logits are returned with None. So they are where the layer itself is to be trained.
    """
    if model in _HEADS:
        head = _HEADS[model]
    else:
        head = _last_linear(model)
    if head is None or (
        torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
    ):
        return run(), None
    passed: list[Tensor] = []

    def hand_on(hidden: Tensor) -> Tensor:
        passed.append(hidden.view_as(hidden))
        return passed[-1]

    head.forward = hand_on  # type: ignore[method-assign,assignment]
    try:
        out = run()
    finally:
        del head.forward
    whole = len(passed) == 1 and out is passed[0] and out.shape[-1] == head.in_features
    _HEADS[model] = head if whole else None
    return (out, head) if whole else (run(), None)


def _last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the output layer that the model names, or its last linear layer, if it is a plain one.

    Hooks, adapters, parametrisations and subclasses may all do more than multiply.
    """
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if head is None:
        head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    plain = (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
    )
    return head if plain else None
