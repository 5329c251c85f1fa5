"""Which use of parameters the logits come from: the head."""

from collections.abc import Mapping
from typing import Any

from curate.scorers.plan import HeadPlan
from curate.scorers.recording import Recording, marks
from curate.scorers.taps import UseKey


def find_head(recording: Recording, names: Mapping[int, str]) -> HeadPlan | None:
    """Return the use that the logits come from: the nearest on the way back through the graph."""
    outputs = recording.outputs
    assert outputs is not None, "recorded before the pass ended"
    if outputs.head is not None:
        own = tuple(names[id(p)] for p in outputs.head.parameters() if id(p) in names)
        kinds = "linear", "linear_head"
        uses = [k for k in recording.uses if own and k[0] in kinds and own[0] in k[1]]
        # The same matrix may be multiplied by elsewhere; together with the loss it is the head.
        uses = [k for k in uses if k[0] == "linear_head"] or uses
        key = uses[0] if len(uses) == 1 else None
        fused = key is not None and key[0] == "linear_head"
        return HeadPlan(key, own, starts_at_token_0=fused) if own else None
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
        made = marks(node)
        for key, pointer in made:
            if key[0] in ("shift", "scale", "expand"):
                others += key[1]
            else:
                products[key] = pointer
        if not made or all(key[0] in ("shift", "scale") for key, _ in made):
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
