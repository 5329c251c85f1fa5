"""Addresses have 64 bits: the first and last programs of tensors beyond 2^31 elements.

The memory is promised by the system, not taken: nobody touches more than a few pages of it.
"""

import mmap
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curate.kernels import (
    cross_entropy,
    dot,
    elementwise,
    embedding,
    grad_norm,
    grad_tiles,
    moments,
    projection,
    sketch,
    softmax_tiles,
    sparse_projection,
    summation,
)
from curate.kernels.conv_geometry import Geometry
from curate.kernels.conv_tiles import conv_sq_norm_tiles
from curate.kernels.head_forward import head_partial_sums
from curate.kernels.launch import IS_INTERPRETED
from curate.kernels.rademacher import stream_key

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED or sys.platform != "linux",
    reason="needs interpreted kernels, and memory that is promised only",
)
KEY, KEYS = stream_key(3, "w", "whole"), (stream_key(3, "w", "rows"), stream_key(3, "w", "columns"))
MAP_NORESERVE = 0x4000  # of Linux, not in every Python's mmap
FAR = (1 << 31) + 16  # a multiple of 16, as the kernels' aligned forms want it


def vast(*shape: int, dtype: torch.dtype = torch.bfloat16, stride: int | None = None) -> Tensor:
    """Return zeros that take no memory; `stride` is the first axis's, else they are contiguous."""
    strides = list(torch.empty(shape, device="meta").stride())
    strides[0] = stride or strides[0]
    count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=count).as_strided(shape, strides)


def factors(*axes: int, o: int = 32, i: int = 16) -> tuple[Tensor, Tensor]:
    """Return left and right whose samples lie far from one another."""
    left, right = (vast(*axes, n, stride=FAR) for n in (o, i))
    for x in (left, right):
        x.copy_(torch.randn(x.shape))
    return left, right


Call = Callable[[], Any]
f32 = torch.float32


def head() -> tuple[Tensor, Tensor]:
    return vast(2, 3, 16, stride=FAR), vast(3, 16)


FAR_SAMPLES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "gram": grad_norm.grad_sq_norm_gram,
    "one token": lambda x, y: grad_norm.grad_sq_norm_gram(x[:, :, :1], y[:, :, :1]),
    "tiles": lambda x, y: grad_tiles.grad_tile_sums(x, y, square=True),
    "dots": lambda x, y: dot.grad_dot_product(x, y, torch.ones(1, 32, 16)),
    "rows": lambda x, _: dot.output_dot(x[:, 0], x[:, 0], None),
    "directions of rows": lambda _, y: dot.grad_dot_rows(
        torch.tensor([[0, 2], [1, 1]]), y[:, 0, :2].contiguous(), y[:, 0]
    ),
    "sketch": lambda x, y: sketch.sketch(x, y, KEYS, (4, 3)),
    "projection": lambda x, y: projection.project(x, y, KEY, 8),
    "sparse": lambda x, y: sparse_projection.sparse_project(x, y, KEY, 8),
    "embedding": lambda _, y: embedding.embedding_sq_norm(torch.tensor([[0, 2, 2]] * 2), y[:, 0]),
    "cross": lambda x, y: embedding.embedding_cross(
        torch.tensor([[0, 2, 31]] * 2), y[:, 0], x[:, 0], y[:, 0]
    ),
    "tokens": lambda x, _: elementwise.norm_products(x[:, 0], x[:, 0], eps=1e-5, centred=True),
    "channels": lambda x, _: elementwise.channel_products(x[:, 0], x[:, 0]),
    "convolution": lambda x, y: conv_sq_norm_tiles(
        x[:, 0].mT, y[:, 0].mT, Geometry((1,), (1,), (0,), (1,), 1)
    ),
    "head": lambda x, y: head_partial_sums(y[:, 0, 0], x[:, 0, 0, :16], None, torch.tensor([0, 1])),
    "softmax": lambda x, _: softmax_tiles.partial_sums(x[:, 0, 0], torch.tensor([3, 4])),
    "statistics": lambda x, _: cross_entropy.token_sums(x[:, 0, 0], torch.tensor([3, 4]))[:-1],
}


@pytest.mark.parametrize("name", FAR_SAMPLES)
def test_samples_may_lie_far_from_one_another(name: str, sanitized: Any) -> None:
    """Each sample's place is beyond 32 bits; the result is that of samples side by side."""
    left, right = factors(2, 1, 3)
    far = sanitized.run(lambda: FAR_SAMPLES[name](left, right))
    near = FAR_SAMPLES[name](left.contiguous(), right.contiguous())
    for a, b in zip(tensors(far), tensors(near), strict=True):
        assert torch.equal(a, b)


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for part in found or () for x in tensors(part)]


def _tiles() -> Call:
    left, right = vast(1, 1, 16, 1 << 16), vast(1, 1, 16, 1 << 16)
    w, v = vast(1 << 16, 1 << 16, dtype=f32), vast(2, 1 << 16, 1 << 16, dtype=f32)
    return lambda: grad_tiles.grad_tile_sums(left, right, weight=w, directions=v)


def _gram() -> Call:
    far = vast(1 << 17, 64, stride=1 << 15)[None, None]
    return lambda: grad_norm.grad_sq_norm_gram(far, far)


def _packed() -> Call:
    left, right = vast(1 << 21, 1 << 11), vast(1 << 21, 16)
    starts = torch.tensor([0, (1 << 21) - 32, (1 << 21) - 16, 1 << 21])
    spans = grad_tiles.spans_of(starts)[1:]
    return lambda: (
        grad_tiles.grad_sq_norm_spans(left, right, spans),
        grad_norm._launch_gram(left[None, None], right[None, None], spans, 16),
    )


def _products() -> Call:
    left, right, v = vast(1, 1, 1 << 18, 64), vast(1, 1, 1 << 18, 1 << 14), vast(1, 64, 1 << 14)
    return lambda: dot.grad_dot_product(left[:, :, -64:], right[:, :, -64:], v)


def _rows() -> Call:
    table, right = vast(2, 1 << 18, 1 << 13), vast(2, 3, 1 << 13)
    index = torch.tensor([[0, 1, 2], [(1 << 18) - 3, (1 << 18) - 2, (1 << 18) - 1]])
    return lambda: dot.grad_dot_rows(index, right, table)


def _tokens() -> Call:
    x, y = vast(1, 1 << 21, 1 << 11), vast(1, 1 << 21, 1 << 11)
    return lambda: (
        elementwise.token_products(x, y),
        elementwise._launch_statistics(x, 1e-5, True)[0][:, :1],
    )


def _logits() -> Call:
    z, y, zeros = vast(1 << 14, 1 << 18), torch.zeros(1 << 14, dtype=torch.long), vast(1 << 14)
    y[-1] = (1 << 18) - 1
    return lambda: (
        softmax_tiles.partial_sums(z, y),
        softmax_tiles.exponentials(z, y, zeros.float(), zeros.float(), z),
    )


def _sketches() -> Call:
    far = vast(1 << 17, 64, stride=1 << 15)[None, None]
    return lambda: (
        sketch.sketch_side(far[:, 0], KEY, 32)[0, -1],
        sketch.sketch(far, far, KEYS, (4, 3)),
    )


def _sum_of_sides() -> Call:
    partials = vast(1, 2, FAR, dtype=f32)
    return lambda: sketch.add_partials(partials)[:, -1]


def _projections() -> Call:
    far = vast(33, 64, stride=1 << 27)  # rows of a gradient, or tokens
    return lambda: (
        projection.project_matrix(far[None], KEY, 2),
        sparse_projection.sparse_project_matrix(far[None], KEY, 64),
        projection.project(far[None, None], far[None, None], KEY, 2),
        sparse_projection.sparse_project(far[None, None], far[None, None], KEY, 64),
        projection.project_rows(torch.zeros(1, 33, dtype=torch.long), far[None], KEY, 2),
        sparse_projection.sparse_project_rows(
            torch.zeros(1, 33, dtype=torch.long), far[None], KEY, 64
        ),
    )


def _many_samples() -> Call:
    partials = vast(1 << 17, 2, 3, dtype=f32)  # more than a grid's second axis has
    return lambda: sketch.add_partials(partials)


def _head() -> Call:
    few, many = vast(2, 1 << 13), vast(1 << 18, 1 << 13)
    y = torch.tensor([0, (1 << 18) - 1])
    return lambda: (
        head_partial_sums(few, many, None, y),
        head_partial_sums(many, few, None, y.remainder(2).repeat(1 << 17)),
    )


def _tied() -> Call:
    at, right, other = vast(1, 1 << 13, 1 << 18), vast(1, 3, 16), vast(1, 1 << 13, 16)
    index = torch.tensor([[0, 1, (1 << 18) - 1]])
    return lambda: embedding.embedding_cross(index, right, at, other)


def _checkpoints() -> Call:
    mean, m2, x = (vast(1 << 15, 1 << 16, dtype=d) for d in (f32, f32, torch.bfloat16))
    return lambda: moments.finish_moments(mean, m2, x, 3)


def _sums() -> Call:
    partials = vast(1 << 20, 1 << 12, dtype=f32)
    return lambda: summation.sum_partials(partials)


def _pixels() -> Call:
    grad, input = vast(1 << 12, 16, 256, 256), vast(1 << 12, 16, 256, 256)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return lambda: conv_sq_norm_tiles(grad[:, :, :4, :16], input[:, :, :4, :16], geometry)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        _tiles, _gram, _packed, _products, _rows, _tokens, _logits, _sketches, _sum_of_sides,
        _many_samples, _projections, _head, _tied, _checkpoints, _sums, _pixels,
    ],
)  # fmt: skip
def test_no_size_is_beyond_the_last_program(case: Callable[[], Call], sanitized: Any) -> None:
    sanitized.only_ends = True
    case()()
    assert sanitized.launched
