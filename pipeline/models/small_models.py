"""Small models for a quick start: an MLP, a ResNet-9-like CNN, a GPT. No dropout, no downloads.

Shapes: B rows, C channels, H height, W width, K classes, T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Flattened input, ReLU layers of the `hidden` sizes, one logit per class."""

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (128, 64)
    ) -> None:
        sizes = [prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], num_classes))


class CNN(nn.Module):
    """A ResNet-9 after Page (2018, "How to train your ResNet"): 3 poolings, 2 residual blocks.

    `width` is the number of channels after the first convolution; the last has 8 x `width`.
    Small images are pooled less often, so that two by two positions are left to normalise over.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int = 32) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"model 'cnn' takes images (C, H, W), not inputs {tuple(input_shape)}")
        channels, *sides = input_shape
        self.stem = _conv(channels, width, pool=False)
        self.stage1 = _conv(width, 2 * width, pool=min(sides) >= 4)
        self.residual1 = _Residual(2 * width)
        self.stage2 = _conv(2 * width, 4 * width, pool=min(sides) >= 8)
        self.stage3 = _conv(4 * width, 8 * width, pool=min(sides) >= 16)
        self.residual2 = _Residual(8 * width)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return one logit per class."""
        x = self.residual1(self.stage1(self.stem(images)))
        x = self.residual2(self.stage3(self.stage2(x)))
        logits: Tensor = self.head(x.amax(dim=(2, 3)))
        return logits


class GPT(nn.Module):
    """A small GPT-2 (Radford et al. 2019): learned positions, pre-norm, tied embeddings."""

    def __init__(
        self, vocab_size: int, context: int = 256, layers: int = 4, heads: int = 4, dim: int = 128
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"model 'gpt': dim={dim} is no multiple of heads={heads}")
        self.context = context
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(_initialise)
        for block in self.blocks:  # GPT-2 scales what is added to the residual stream
            for added in (block.attention.out, block.shrink):  # type: ignore[union-attr]
                nn.init.normal_(added.weight, std=0.02 / (2 * layers) ** 0.5)  # type: ignore[union-attr,arg-type]
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Return the logits of the next token at every position.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        if input_ids.shape[1] > self.context:
            raise ValueError(
                f"{input_ids.shape[1]} tokens do not fit the model's context of {self.context}"
            )
        # One position per row and token: the gradient of a [1, T] lookup is summed over rows.
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.blocks(self.tokens(input_ids) + self.positions(places))
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.shrink = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        added: Tensor = self.shrink(F.gelu(self.widen(self.norm2(x))))
        return x + added


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, channels, pool=False), _conv(channels, channels, pool=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.body(x)
        return x + added


def _conv(channels: int, out: int, pool: bool) -> nn.Sequential:
    layers = [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
