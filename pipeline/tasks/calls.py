"""How a task calls a model that may be anybody's."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn


def call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the model's logits: the first input goes in by position, the others by name.

    Others that `forward` does not take (an attention mask, for a model that masks nothing) stay
    out.
    """
    first, *others = inputs
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: inputs[name] for name in others if takes_any or name in parameters}
    return logits_of(model(inputs[first], **named))


def logits_of(result: object) -> Tensor:
    """Return the logits of whatever a model returns: a tensor, `.logits`, or a first element.

    Raises:
        ValueError: none of these is a tensor.
    """
    found = getattr(result, "logits", result)
    if isinstance(found, Mapping):
        found = found.get("logits")
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returned {type(result).__name__}, not logits")
    return found
