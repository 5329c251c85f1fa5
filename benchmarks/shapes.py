"""The models and batches that are timed: GPT-2, Llama and BERT of transformers, and a ResNet.

All have random weights and read random rows, from the seed that torch was given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers.protocol import IGNORE, Batch, Outputs
from curate.scorers.split_head import split_head


@dataclass(frozen=True)
class Shape:
    """A model's and its batch's sizes; for a ResNet `tokens` is the side of an image."""

    name: str
    layers: int
    width: int
    tokens: int
    rows: int
    vocab: int
    head_dim: int = 64

    @property
    def title(self) -> str:
        what = f"{self.layers} layers, width {self.width}, {self.rows} rows"
        if self.name == "resnet":
            return f"ResNet: {what} of {self.tokens} x {self.tokens} pixels, {self.vocab} classes"
        what += f" of {self.tokens} tokens, vocabulary {self.vocab}"
        return {"gpt2": "GPT-2-like: {}, tied", "llama": "Llama-like: {}", "bert": "BERT-like: {}"}[
            self.name
        ].format(what)

    @property
    def is_causal(self) -> bool:
        return self.name in ("gpt2", "llama")

    def model(self, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
        """Return the model in evaluation mode."""
        if self.name == "resnet":
            return _ResNet(self).to(device, dtype).eval()
        with torch.device(device):  # large weights are drawn faster there
            return _MAKERS[self.name](self, attention).to(dtype).eval()

    def batch(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Return rows for the engine; `plain_loss` reads the same."""
        if self.name == "resnet":
            pixels = torch.randn(self.rows, 3, self.tokens, self.tokens, dtype=dtype)
            labels = torch.randint(self.vocab, (self.rows,))
            return Batch({"x": pixels}, labels, self.rows).to(device)
        ids = torch.randint(self.vocab, (self.rows, self.tokens))
        targets = torch.cat([ids[:, 1:], torch.full((self.rows, 1), IGNORE)], 1)
        if not self.is_causal:
            targets = torch.randint(_LABELS, (self.rows,))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Batch(inputs, targets, self.rows).to(device)

    def with_(self, **sizes: int | None) -> "Shape":
        """Return the shape with those sizes that are given."""
        given: dict[str, Any] = {name: value for name, value in sizes.items() if value}
        return replace(self, **given)


_LABELS = 4
SHAPES = {
    "tiny": (
        Shape("gpt2", 2, 64, 16, 3, 100),
        Shape("bert", 2, 64, 16, 3, 100),
        Shape("llama", 2, 64, 16, 3, 100),
        Shape("resnet", 2, 8, 16, 3, 10),
    ),
    "small": (
        Shape("gpt2", 4, 256, 128, 16, 8192),
        Shape("bert", 4, 256, 128, 16, 8192),
        Shape("llama", 4, 256, 128, 16, 8192),
        Shape("resnet", 3, 32, 32, 64, 100),
    ),
    "long": (
        Shape("gpt2", 4, 256, 512, 4, 8192),
        Shape("llama", 4, 256, 512, 4, 8192),
    ),
    "medium": (
        Shape("gpt2", 12, 768, 512, 8, 50257),
        Shape("bert", 12, 768, 512, 8, 30522),
        Shape("llama", 12, 768, 512, 8, 32000),
        Shape("resnet", 8, 64, 64, 64, 1000),
    ),
    "large": (
        Shape("llama", 16, 2048, 2048, 4, 128256),
        Shape("llama", 16, 2048, 16384, 1, 128256),
    ),
}


# -- what is computed of a batch -----------------------------------------------------------------


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the batch's mean loss as a user's training step has it: the model's own, with labels.

    A causal model shifts its labels itself, and so takes the tokens.
    """
    if "input_ids" not in batch.inputs:
        return F.cross_entropy(model(**batch.inputs), batch.targets)
    labels = batch.inputs["input_ids"] if batch.targets.dim() == 2 else batch.targets
    loss: Tensor = model(**batch.inputs, labels=labels).loss
    return loss


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Return what the engine is given, as the tasks of `curate score` give it: every row's mean
    loss, of a language model with its head taken apart."""

    def logits() -> Tensor:
        out = model(**batch.inputs)
        return out if isinstance(out, Tensor) else out.logits

    if batch.targets.dim() == 1:
        made = logits()
        return Outputs(token_cross_entropy(made, batch.targets), batch.targets, made)
    out, head = split_head(model, logits)
    if head is None:
        tokens, found = token_cross_entropy(out, batch.targets), {"logits": out}
    else:
        tokens = linear_cross_entropy(out, head.weight, batch.targets, head.bias)
        found = {"hidden": out}
    loss = tokens.sum(1) / (batch.targets != IGNORE).sum(1)
    return Outputs(loss, batch.targets, **found, head=head)


# -- models --------------------------------------------------------------------------------------


def _gpt2(shape: Shape, attention: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.width // shape.head_dim,
        n_positions=shape.tokens,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config)


def _llama(shape: Shape, attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape.width // shape.head_dim
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=shape.width * 8 // 3 // 16 * 16,
        max_position_embeddings=shape.tokens,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def _bert(shape: Shape, attention: str) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // shape.head_dim,
        intermediate_size=4 * shape.width,
        num_labels=_LABELS,
        max_position_embeddings=shape.tokens,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config)


_MAKERS: dict[str, Callable[[Shape, str], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "bert": _bert,
}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


class _ResNet(nn.Module):
    """Blocks of two convolutions; the width doubles and the side halves at most three times."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        grows = {max(1, shape.layers * n // 4) for n in (1, 2, 3)}
        blocks = []
        for i in range(shape.layers):
            stride = 2 if i in grows else 1
            blocks.append(_Block(width, width * stride, stride))
            width *= stride
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, shape.vocab)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))
        return logits
