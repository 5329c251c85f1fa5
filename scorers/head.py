"""What the logits tell about a row, and the signals of the use that made them.

Shapes: B rows, S sequences, T tokens, D hidden size, C classes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.cross_entropy import Gathered, TokenStatistics, token_statistics
from curate.kernels.grad_norm import accumulable
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Full, Layout, join
from curate.scorers.protocol import IGNORE, Outputs
from curate.scorers.readouts import Dots, sq_norm
from curate.scorers.row_map import RowMap
from curate.scorers.uses import Overwritten, Saved, Use

STATISTICS = frozenset({"el2n", "entropy", "margin", "correct", "tokens"})


def row_statistics(
    outputs: Outputs, gathered: Gathered, row_map: RowMap
) -> dict[str, Float[Tensor, " b"]]:
    """Return el2n, entropy, margin and correct as means over each row's target tokens, and tokens.

    What the loss gathered of the prediction is not computed again.
    A row without target tokens has NaN means: there is nothing to take the mean of.
    """
    targets = _targets(outputs)
    each = _gathered(outputs, gathered)
    if each is None or each.el2n.shape != targets.shape:
        each = _token_statistics(outputs, targets)
    mask = (targets != IGNORE).to(each.el2n.dtype)
    tokens = row_map.total(mask)
    means = {name: row_map.total(value) / tokens for name, value in each._asdict().items()}
    return means | {"tokens": tokens}


def probabilities(outputs: Outputs, rows: int) -> Float[Tensor, "b c"]:
    """Return softmax over classes, float32 or finer: what is tiny in half precision is no 0.

    Raises:
        ValueError: the outputs are not one prediction over classes for each row.
    """
    logits = outputs.logits
    if logits is None and outputs.hidden is not None and outputs.head is not None:
        if outputs.hidden.dim() == 2:
            with torch.no_grad():
                logits = outputs.head(outputs.hidden.detach())
    if logits is None or logits.dim() != 2 or len(logits) != rows:
        raise ValueError(
            "probs needs Outputs.logits with one line of classes for each row, [B, C]: of "
            "sequences of tokens store an embedding or a sketch instead"
        )
    return accumulable(logits.detach()).softmax(1)


def _targets(outputs: Outputs) -> Tensor:
    if outputs.targets is None:
        raise ValueError("statistics of the prediction need Outputs.targets beside the loss")
    return outputs.targets


def _gathered(outputs: Outputs, gathered: Gathered) -> TokenStatistics | None:
    if outputs.logits is not None:
        return gathered.statistics(outputs.logits)
    # A loss may call the head several times: then those of the hidden states that are shown.
    kept = None if outputs.hidden is None else gathered.statistics(outputs.hidden)
    return gathered.head if kept is None else kept


def _token_statistics(outputs: Outputs, targets: Tensor) -> TokenStatistics:
    if outputs.logits is not None:
        return token_statistics(outputs.logits, targets)
    if outputs.hidden is None or outputs.head is None:
        raise ValueError(
            "statistics of the prediction need Outputs with logits (or hidden and head); "
            "a loss function that returns only the loss has none"
        )
    hidden, flat = outputs.hidden.detach().flatten(0, -2), targets.flatten()
    step = max(1, (1 << 24) // outputs.head.out_features)  # never all logits at once
    parts = []
    with torch.no_grad():
        for start in range(0, len(flat), step):
            logits = outputs.head(hidden[start : start + step])
            parts.append(token_statistics(logits, flat[start : start + step]))
    return TokenStatistics(*(torch.cat(p).view(targets.shape) for p in zip(*parts, strict=True)))


@dataclass
class HeadWatch:
    """Looks at the head's use: its input, and the alignment of its gradient with its weight.

    weight_alignment = -<G_W, W> / (||G_W|| ||W|| + 1e-12)     (Hölzl et al. 2025, `head_alignment`)

    of this use alone: where W is tied to the embedding, the embedding's share is no part of it.
    <G_W, W> = sum_t g_t . (output_t - bias), so W itself is not multiplied again.
    """

    weight: Tensor
    bias: Tensor | None
    row_map: RowMap
    wants_alignment: bool
    alignment: Float[Tensor, " b"] | None = None
    logit_norm: Float[Tensor, " b"] | None = None
    """Known where the head is one with its loss."""
    hidden: Float[Tensor, "s *t d"] | None = None

    def saw(self, use: Use, out: Tensor, layout: Layout) -> None:
        self._use, self._out, self._layout = use, Saved(out), layout
        self.hidden = layout.rows_first(use.saved[0].get())

    def grad(self, g: Tensor) -> None:
        if self._use.kind == "linear_head":
            fused = self._use.parts(g, self._layout, frozenset({"weight"}))["weight"]
            assert isinstance(fused, HeadPart), "what that use gives"
            self.logit_norm = fused.logit_norm()
            if self.wants_alignment:
                self._align(fused.alignment(), fused.sq_norm())
            return
        if not self.wants_alignment:
            return
        name = self._use.params["weight"].name
        parts = self._use.parts(g, self._layout, frozenset({"weight", "bias"}))
        gradient = join(name, self.weight.shape, [parts["weight"]], self.row_map)
        try:
            products = accumulable(g) * accumulable(self._out.get())
            inner = self.row_map.total(self._layout.rows_first(products))
            if self.bias is not None and isinstance(part := parts.get("bias"), Full):
                inner = inner - self.row_map.total(part.grad * self.bias)
        except Overwritten:  # the logits were scaled in place: multiply by W after all
            inner = Dots({name: self.weight[None]})(gradient)[:, 0]
        self._align(inner, sq_norm(gradient))

    def _align(self, inner: Float[Tensor, " b"], square: Float[Tensor, " b"]) -> None:
        norm = torch.linalg.vector_norm(accumulable(self.weight))
        self.alignment = -inner / (square.sqrt() * norm + 1e-12)
