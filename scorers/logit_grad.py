"""The gradient of a row's target logit with respect to what the model was given.

Shapes: B rows, S sequences, T tokens, C classes or vocabulary size, D width of an embedding,
N coordinates of a row's input.

Of images the coordinates are pixels (the mean over channels is taken first, Agarwal et al. 2022),
of tables features, of tokens the entries of their embeddings. A row with several target tokens has
the sum of their logits; one cut into windows has the windows' coordinates end to end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curate.kernels.summation import accumulable
from curate.scorers.parts import Layout
from curate.scorers.protocol import IGNORE, Batch, Outputs
from curate.scorers.row_map import RowMap


@dataclass(frozen=True)
class LogitGradient:
    """d(target logit)/d(input) by row; 0 where a row has fewer coordinates than N."""

    values: Float[Tensor, "b n"]
    coordinates: Float[Tensor, " b"]
    """How many of the N are the row's own."""


@dataclass(frozen=True)
class Given:
    """An input of the model as it was when it came in, or the embeddings of its tokens."""

    edge: GradientEdge
    """A place in the graph, not a tensor: models add to their embeddings in place."""
    zeros: Tensor
    layout: Layout | None = None
    """Of embeddings."""

    @classmethod
    def now(cls, x: Tensor, layout: Layout | None = None) -> "Given":
        return cls(get_gradient_edge(x), x.new_zeros(()).expand(x.shape), layout)


def logit_gradient(
    outputs: Outputs, given: Given | None, batch: Any, row_map: RowMap, *, keep_graph: bool
) -> LogitGradient:
    """Return the gradient of every row's target logit; one backward pass.

    Raises:
        ValueError: there are no targets or logits, or the input cannot be differentiated.
    """
    if given is None:
        raise ValueError(
            "vog differentiates with respect to the model's first argument, which must be of "
            "floats, or token ids that an embedding of the model looks up as they are"
        )
    out, seed = _target_logits(outputs)
    g = None
    if out.requires_grad:
        (g,) = torch.autograd.grad(
            out, [given.edge], seed, retain_graph=keep_graph, allow_unused=True
        )
    if g is None:  # zeros would look like a row whose gradient never varied
        raise ValueError(
            "vog needs the gradient of the logits with respect to the model's input, and none "
            "reaches it: the forward pass detaches the input, or runs under torch.no_grad()"
        )
    return _by_row(g, given.layout, outputs, batch, row_map)


def _target_logits(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Return a tensor and the weights with which its sum is that of all target logits.

    Without logits these are h_t . W[y_t] + b[y_t], so that W[y_t] is what they say of h_t.
    """
    targets = outputs.targets
    if targets is None:
        raise ValueError("vog needs Outputs.targets beside the loss")
    is_target = targets != IGNORE
    if outputs.logits is not None:
        logits = outputs.logits
        seed = torch.zeros_like(logits)
        index = targets.clamp(min=0)[..., None]
        return logits, seed.scatter_(-1, index, is_target[..., None].to(seed.dtype))
    if outputs.hidden is None or outputs.head is None:
        raise ValueError(
            "vog needs Outputs with logits (or hidden and head); "
            "a loss function that returns only the loss has none"
        )
    rows = outputs.head.weight.detach()[targets.clamp(min=0)]
    return outputs.hidden, (rows * is_target[..., None]).to(outputs.hidden.dtype)


def _by_row(
    g: Tensor, layout: Layout | None, outputs: Outputs, batch: Any, row_map: RowMap
) -> LogitGradient:
    if layout is not None:
        g = layout.rows_first(g)
        g = g.reshape(len(g), -1, g.shape[-1])
    elif g.dim() == 4:
        g = accumulable(g).mean(1)
    own = g.new_ones(g.shape[:2], dtype=torch.bool)
    if g.dim() == 3 and (found := own_tokens(batch, outputs.targets)) is not None:
        if layout is not None and found.shape[1] < g.shape[1]:
            raise ValueError(
                f"the model looks up {g.shape[1]} tokens of a row at once, but the batch tells of "
                f"{found.shape[1]} which are padding"
            )
        if found.shape[1] >= g.shape[1]:
            own = found[:, : g.shape[1]]
            g = g.masked_fill(~own[..., None], 0.0)
    entries = g[0, 0].numel() if g.dim() > 2 and g.numel() else 1
    counts = own.sum(1).to(torch.float64 if g.dtype == torch.float64 else torch.float32) * entries
    return LogitGradient(row_map.end_to_end(g.flatten(1), 1), row_map.add(counts))


def own_tokens(batch: Any, targets: Tensor | None) -> Bool[Tensor, "s t"] | None:
    """Return which tokens are no padding: what the attention mask says, or all up to the last
    target. None where neither tells."""
    inputs = batch.inputs if isinstance(batch, Batch) else batch
    mask = inputs.get("attention_mask") if hasattr(inputs, "get") else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    if targets is None or targets.dim() != 2:
        return None
    return (targets != IGNORE).flip(1).cummax(1).values.flip(1)
