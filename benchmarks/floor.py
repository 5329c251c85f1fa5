"""What a pass must cost at least: multiplications and elements moved, counted in the model.

Shapes: B rows, T tokens (or positions) of a row, I and O the sides of a weight matrix, k of a
two-sided sketch to k x k, D the width of an embedding.

A forward pass shows which weight is used on what. Multiply-adds per row and use:

    forward             T I O
    activation backward T I O                      where the input depends on a parameter
    weight backward     T I O                      what training pays and scoring does not
    norm                min(T^2 (I + O), T I O)
    sketch              T (I + O) k + T k^2

An embedding's norm is T D (equal tokens are added up, then squared), its sketch T D k + T k^2. A
weight tied to an embedding has their cross term besides, T^2 D. EL2N and the loss add nothing.
Attention multiplies T^2 D twice per layer (half of it behind a causal mask), backward four times.

The floor of a pass is the ratio of such sums, its own over plain training's. A second one takes
each product as long as its multiplications or the elements that it reads and writes once, by the
ceilings measured on the machine, and adds the traffic of what has no weights to multiply (norms,
activations, the loss: 2 elements forward and 3 backward for each that they make).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from ceilings import Ceilings
from torch import Tensor, nn

from curate.scorers.protocol import Batch


class Cost(NamedTuple):
    """Multiply-adds and elements read or written."""

    multiplications: int
    elements: int


@dataclass(frozen=True)
class Use:
    """One use of one weight on a batch; a grouped convolution has `groups` matrices."""

    weight: int
    """Which: two uses of a tied weight have the same number."""
    rows: int
    tokens: int
    inputs: int
    outputs: int
    groups: int = 1
    has_input_grad: bool = True
    is_table: bool = False

    @property
    def product(self) -> Cost:
        """Of the forward pass, and of either half of the backward pass."""
        i, o = self.groups * self.inputs, self.groups * self.outputs
        tokens = self.rows * self.tokens
        if self.is_table:
            return Cost(0, 2 * tokens * self.inputs)
        return Cost(tokens * i * self.outputs, tokens * (i + o) + i * self.outputs)

    @property
    def weight_backward(self) -> Cost:
        """Of a table, the dense gradient that is filled with zeros and added to."""
        if self.is_table:
            return Cost(0, self.inputs * self.outputs + self.product.elements)
        return self.product

    @property
    def norm(self) -> Cost:
        t, i, o = self.tokens, self.inputs, self.outputs
        if self.is_table:
            return Cost(self.rows * t * i, self.rows * t * i)
        cost = min(t * t * (i + o), t * i * o)
        return Cost(self.rows * self.groups * cost, self.rows * self.groups * t * (i + o))

    def sketch(self, k: int) -> Cost:
        t, i, o = self.tokens, self.inputs, self.outputs
        wide = i if self.is_table else i + o
        cost = t * wide * k + t * k * k
        return Cost(self.rows * self.groups * cost, self.rows * self.groups * t * wide)


@dataclass
class Work:
    """What a model does with a batch."""

    uses: list[Use] = field(default_factory=list)
    attention: Cost = field(default_factory=lambda: Cost(0, 0))
    """Both products of all layers, forward."""
    elementwise: int = 0
    """Elements that modules without a matrix make, and the logits once more for the loss."""

    def forward(self) -> list[Cost]:
        return [*(use.product for use in self.uses), self.attention, Cost(0, 2 * self.elementwise)]

    def activation_backward(self) -> list[Cost]:
        products = [use.product for use in self.uses if use.has_input_grad and not use.is_table]
        attention = Cost(2 * self.attention.multiplications, 2 * self.attention.elements)
        return [*products, attention, Cost(0, 3 * self.elementwise)]

    def weight_backward(self) -> list[Cost]:
        return [use.weight_backward for use in self.uses]

    def norm(self) -> list[Cost]:
        tables = {use.weight: use for use in self.uses if use.is_table}
        cross = [
            Cost(use.rows * use.tokens * tables[use.weight].tokens * use.inputs, 0)
            for use in self.uses
            if not use.is_table and use.weight in tables
        ]
        return [use.norm for use in self.uses] + cross

    def sketch(self, k: int) -> list[Cost]:
        return [use.sketch(k) for use in self.uses] if k else []

    def scoring(self, norm: bool, k: int) -> list[Cost]:
        """Everything that a pass with these signals must do."""
        return [
            *self.forward(),
            *self.activation_backward(),
            *(self.norm() if norm else []),
            *self.sketch(k),
        ]

    def ratio(self, norm: bool = False, k: int = 0, by: Ceilings | None = None) -> float:
        """Return a scoring pass over a plain forward and backward pass, in multiplications.

        With ceilings, in the time that they allow.
        """
        plain = [*self.forward(), *self.activation_backward(), *self.weight_backward()]

        def size(costs: list[Cost]) -> float:
            if by is None:
                return sum(cost.multiplications for cost in costs)
            return sum(by.seconds(*cost) for cost in costs)

        return size(self.scoring(norm, k)) / size(plain)


def work(model: nn.Module, batch: Batch, is_causal: bool) -> Work:
    """Return what a forward pass of one row shows, for all rows; attention by the model's config.

    All rows are as long as the first.
    """
    found, first = Work(), batch.select_rows([0])
    see = _Seen(found, batch.rows)
    leaves = [m for m in model.modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(see) for module in leaves]
    try:
        with torch.enable_grad():
            out = model(**first.inputs)
    finally:
        for handle in handles:
            handle.remove()
    found.elementwise += (out if isinstance(out, Tensor) else out.logits).numel() * batch.rows
    if (config := getattr(model, "config", None)) is not None:
        found.attention = _attention(config, batch, is_causal)
    return found


def _attention(config: Any, batch: Batch, is_causal: bool) -> Cost:
    rows, tokens = batch.inputs["input_ids"].shape
    heads = config.num_attention_heads
    wide = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pairs = tokens * (tokens + 1) // 2 if is_causal else tokens * tokens
    layers = rows * config.num_hidden_layers
    return Cost(2 * layers * pairs * wide, 4 * layers * tokens * wide)


@dataclass
class _Seen:
    """A forward hook that writes a module's use down."""

    found: Work
    rows: int
    numbers: dict[int, int] = field(default_factory=dict)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        if (form := _FORMS.get(type(module).__name__)) is None:
            self.found.elementwise += out.numel() * self.rows
            return
        weight = module.weight
        assert isinstance(weight, Tensor), "the forms have weights"
        number = self.numbers.setdefault(id(weight), len(self.numbers))
        tokens, i, o, groups = form(module, weight, out)
        table = isinstance(module, nn.Embedding)
        grad = not table and inputs[0].requires_grad
        self.found.uses.append(Use(number, self.rows, tokens, i, o, groups, grad, table))


Sides = tuple[int, int, int, int]
"""Tokens of a row, inputs, outputs, groups."""


def _linear(module: Any, weight: Tensor, out: Tensor) -> Sides:
    o = out.shape[-1]
    return out.numel() // o, weight.numel() // o, o, 1


def _table(module: Any, weight: Tensor, out: Tensor) -> Sides:
    v, d = weight.shape
    return out.numel() // d, d, v, 1


def _conv(module: Any, weight: Tensor, out: Tensor) -> Sides:
    o, groups = weight.shape[0], module.groups
    return out.numel() // o, weight[0].numel(), o // groups, groups


_FORMS: dict[str, Callable[[Any, Tensor, Tensor], Sides]] = {
    "Linear": _linear,
    "Conv1D": _linear,  # of transformers, in GPT-2: a linear layer with its weight transposed
    "Embedding": _table,
    "Conv1d": _conv,
    "Conv2d": _conv,
}
