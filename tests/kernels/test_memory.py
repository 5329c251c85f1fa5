"""Every kernel keeps to its memory: what it reads was written, what it writes is written once.

Sizes: s samples, t tokens, o rows and i columns of a matrix, s = 0 … for nothing at all.

Run by a CPU the fixture `sanitized` watches every access. On a GPU these are the cases for

    compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_memory.py
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import curate.kernels.launch as launch
from curate.kernels import (
    dot,
    elementwise,
    embedding,
    grad_norm,
    grad_tiles,
    linear_head,
    moments,
    projection,
    sketch,
    sparse_projection,
    summation,
)
from curate.kernels.conv_geometry import Geometry
from curate.kernels.conv_tiles import conv_sq_norm_tiles
from curate.kernels.cross_entropy import token_cross_entropy, token_sums
from curate.kernels.rademacher import stream_key

KEY, KEYS = stream_key(3, "w", "whole"), (stream_key(3, "w", "rows"), stream_key(3, "w", "columns"))
DEVICE = torch.device("cpu" if launch.IS_INTERPRETED else "cuda")


class Sizes(NamedTuple):
    s: int
    t: int
    o: int
    i: int


@dataclass
class Inputs:
    """Random tensors, of a dtype and laid out in memory as is said."""

    sizes: Sizes
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    has_nan: bool = False
    """In the first sample's last element"""

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self._random).to(dtype or self.dtype)
        if self.has_nan and x.numel() and shape[0] == self.sizes.s:
            x.view(shape[0], -1)[0, -1] = torch.nan
        return laid_out(x.to(DEVICE), self.layout)

    def integers(self, below: int, *shape: int) -> Tensor:
        x = torch.randint(max(1, below), shape, generator=self._random)
        return laid_out(x.to(DEVICE), self.layout)

    @property
    def left(self) -> Tensor:
        return self.floats(self.sizes.s, 1, self.sizes.t, self.sizes.o)

    @property
    def right(self) -> Tensor:
        return self.floats(self.sizes.s, 1, self.sizes.t, self.sizes.i)

    def starts(self) -> Tensor:
        """The tokens of all samples end to end: none of the first's, most of the last's."""
        cuts = torch.linspace(0, 1, self.sizes.s + 1).square() * self.sizes.s * self.sizes.t
        return cuts.round().long().to(DEVICE)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return x elsewhere in memory, NaN (or a number beyond any table) between its elements."""
    other = torch.nan if x.is_floating_point() else 1 << 40
    if layout == "plain" or x.dim() == 0:
        return x
    if layout == "expanded":  # the same for every sample
        return x[:1].expand_as(x)
    if layout == "turned":
        return x.mT.contiguous().mT if x.dim() > 1 else laid_out(x, "spread")
    if layout == "tokens_first":
        return x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 2 else x
    step = {"padded": 1, "spread": 2}[layout]
    room = x.new_full((*x.shape[:-1], x.shape[-1] * step + 5), other)
    room[..., 3 : 3 + x.shape[-1] * step : step] = x
    return room[..., 3 : 3 + x.shape[-1] * step : step]


LAYOUTS = ("plain", "padded", "spread", "turned", "tokens_first", "expanded")
Call = Callable[[], Any]


def _tiles(x: Inputs, packed: bool) -> Call:
    (s, t, o, i), m = x.sizes, 2
    weight, directions = x.floats(o, i, dtype=torch.float32), x.floats(m, o, i)
    wants = {"square": True, "weight": weight, "directions": directions}
    if packed:
        left, right, starts = x.floats(s * t, o), x.floats(s * t, i), x.starts()
        return lambda: grad_tiles.grad_tile_sums_packed(left, right, starts, **wants)
    left, right = x.left, x.right
    return lambda: grad_tiles.grad_tile_sums(left, right, **wants)


def _groups(x: Inputs, of: Callable[[Tensor, Tensor], Any]) -> Call:
    left, right = (x.floats(x.sizes.s, 3, x.sizes.t, n) for n in x.sizes[2:])
    return lambda: of(left, right)


def _packed_norm(x: Inputs) -> Call:
    s, t, o, i = x.sizes
    left, right, starts = x.floats(s * t, o), x.floats(s * t, i), x.starts()
    return lambda: grad_norm.grad_sq_norm_packed(left, right, starts)


def _pair(of: Callable[[Tensor, Tensor], Any]) -> Callable[[Inputs], Call]:
    def case(x: Inputs) -> Call:
        left, right = x.left, x.right
        return lambda: of(left, right)

    return case


def _product(x: Inputs) -> Call:
    left, right, directions = x.left, x.right, x.floats(2, x.sizes.o, x.sizes.i)
    return lambda: dot.grad_dot_product(left, right, directions)


def _looked_up(of: Callable[[Tensor, Tensor], Any], rows: int = 5) -> Callable[[Inputs], Call]:
    def case(x: Inputs) -> Call:
        index = x.integers(rows, x.sizes.s, x.sizes.t)
        right = x.floats(x.sizes.s, x.sizes.t, x.sizes.i)
        return lambda: of(index, right)

    return case


def _dot_rows(x: Inputs) -> Call:
    directions, s, t = x.floats(2, 5, x.sizes.i), x.sizes.s, x.sizes.t
    index, right = x.integers(5, s, t), x.floats(s, t, x.sizes.i)
    return lambda: dot.grad_dot_rows(index, right, directions)


def _output_dot(x: Inputs) -> Call:
    s, t, o, _ = x.sizes
    grad, output, bias = x.floats(s, t, o), x.floats(s, t, o), x.floats(o)
    return lambda: (dot.output_dot(grad, output, None), dot.output_dot(grad, output, bias))


def _matrix(of: Callable[[Tensor], Any]) -> Callable[[Inputs], Call]:
    def case(x: Inputs) -> Call:
        grad = x.floats(x.sizes.s, x.sizes.o, x.sizes.i)
        return lambda: of(grad)

    return case


def _sketch_left(x: Inputs) -> Call:
    left, wide = x.left, x.floats(x.sizes.s, 1, x.sizes.t, 8, dtype=torch.float32)
    return lambda: sketch.sketch_left(left, wide, KEY, (4, 8))


def _cross(x: Inputs, *, looks_up: bool) -> Call:
    s, t, o, i = x.sizes
    right, other = x.floats(s, t, i), x.floats(s, o, i)
    if not looks_up:
        at = x.floats(s, o, t)
        return lambda: embedding.embedding_cross_at(at, right, other)
    index, left = x.integers(7, s, t), x.floats(s, o, 7)
    return lambda: embedding.embedding_cross(index, right, left, other)


def _conv(x: Inputs, axes: int) -> Call:
    outputs = ((x.sizes.t,), (3, x.sizes.t), (2, 1, x.sizes.t))[axes - 1]
    kernel, stride, padding, dilation = (
        n[:axes] for n in ((2, 3, 1), (2, 1, 2), (1, 2, 0), (2,) * 3)
    )
    shape = [
        max(1, (y - 1) * s + d * (k - 1) + 1 - 2 * p)
        for y, s, d, k, p in zip(outputs, stride, dilation, kernel, padding, strict=True)
    ]
    groups = 2 if axes == 2 else 1
    grad = x.floats(x.sizes.s, groups * x.sizes.o, *outputs)
    input = x.floats(x.sizes.s, groups * x.sizes.i, *shape)
    geometry = Geometry(kernel, stride, padding, dilation, groups)
    return lambda: conv_sq_norm_tiles(grad, input, geometry)


def _tokens(x: Inputs) -> Call:
    s, t, _, d = x.sizes
    grad, input = x.floats(s, t, d), x.floats(s, t, d)
    return lambda: (
        elementwise.token_products(grad, input),
        elementwise.token_sum(input),
        elementwise.norm_products(grad, input, eps=1e-5, centred=True),
        elementwise.norm_products(grad, input, eps=1e-5, centred=False),
    )


def _channels(x: Inputs) -> Call:
    s, p, c, _ = x.sizes
    grad, input, mean = x.floats(s, c, p), x.floats(s, c, p), x.floats(c)
    return lambda: (
        elementwise.channel_products(input, grad),
        elementwise.channel_products(input, grad, mean),
        elementwise.channel_sum(input),
    )


def _moments(x: Inputs) -> Call:
    first, second, third = (x.floats(x.sizes.s, x.sizes.i) for _ in range(3))

    def call() -> Any:
        # Never written before the first update.
        mean, m2 = (torch.empty(first.shape, device=DEVICE) for _ in range(2))
        moments.update_moments(mean, m2, first, 1)
        moments.update_moments(mean, m2, second, 2)
        spread = moments.finish_moments(mean, m2, third, 3)
        return mean, m2, spread, moments.finish_moments(mean, m2, third, 3, "var", 1)

    return call


def _cross_entropy(x: Inputs) -> Call:
    s, t, _, c = x.sizes
    logits, targets = x.floats(s, t, c), x.integers(c, s, t).clone()
    targets[:, ::3] = -100

    def call() -> Any:
        z = logits.detach().requires_grad_()
        loss = token_cross_entropy(z, targets)
        return (*token_sums(logits, targets)[:-1], *torch.autograd.grad(loss.sum(), z))

    return call


def _head(x: Inputs, tiles: bool) -> Call:
    s, t, v, d = x.sizes
    hidden, weight, bias = x.floats(s, t, d), x.floats(v, d), x.floats(v)
    targets = x.integers(v, s, t).clone()
    targets[:, 1::3] = -100
    wants = linear_head.HeadWants(statistics=True, gram=tiles, hidden_grad=tiles)

    def call() -> Any:
        sums = linear_head.head_sums(hidden, weight, bias, targets, wants)
        if not tiles:
            return sums.loss, sums.lse, *(sums.statistics or ())
        seeds = torch.ones_like(sums.loss)
        given = hidden, weight, bias, targets, sums.lse, sums.error_target
        return sums.loss, sums.gram, sums.hidden_grad, linear_head.head_sq_norm(*given, seeds)

    return call


def _partials(x: Inputs) -> Call:
    partials = x.floats(x.sizes.s, x.sizes.t, dtype=torch.float32)
    return lambda: summation.sum_partials(partials)


# What is called, and the kernels that do it.
CASES: dict[str, tuple[Callable[[Inputs], Call], set[str]]] = {
    "gram": (_pair(grad_norm.grad_sq_norm_gram), {"_gram_kernel"}),
    "gram of groups": (lambda x: _groups(x, grad_norm.grad_sq_norm_gram), {"_gram_kernel"}),
    "one token": (
        lambda x: _groups(
            Inputs(x.sizes._replace(t=min(1, x.sizes.t)), x.dtype, x.layout),
            grad_norm.grad_sq_norm_gram,
        ),
        {"_one_token_kernel"},
    ),
    "packed norm": (_packed_norm, set()),
    "tiles": (lambda x: _tiles(x, False), {"_tile_kernel"}),
    "tiles of groups": (lambda x: _groups(x, grad_tiles.grad_sq_norm_tiles), {"_tile_kernel"}),
    "packed tiles": (lambda x: _tiles(x, True), {"_tile_kernel"}),
    "dots": (_product, {"_product_kernel"}),
    "dots of rows": (_dot_rows, {"_rows_kernel"}),
    "dots of outputs": (_output_dot, {"_rows_kernel"}),
    "partials": (_partials, {"_sum_kernel"}),
    "sketch": (_pair(lambda x, y: sketch.sketch(x, y, KEYS, (65, 3))), {"k_side"}),
    "sketch of many": (
        _pair(lambda x, y: sketch.sketch(*(_doubled(z) for z in (x, y)), KEYS, (4, 3))),
        {"k_sketch"},
    ),
    "sketch from inputs": (_sketch_left, set()),
    "sketch of rows": (
        _looked_up(lambda index, x: sketch.sketch_rows(index, x, KEYS, (4, 3))),
        set(),
    ),
    "sketch of groups": (
        lambda x: _groups(x, lambda a, b: sketch.sketch(a, b, KEYS, (33, 65))),
        {"k_side"},
    ),
    "sketch of a matrix": (_matrix(lambda x: sketch.sketch_matrix(x, KEYS, (4, 3))), {"k_side"}),
    "sketch of a vector": (_matrix(lambda x: sketch.sketch_side(x, KEY, 5)), {"k_side"}),
    "projection": (_pair(lambda x, y: projection.project(x, y, KEY, 40)), {"k_project"}),
    "projection of rows": (
        _looked_up(lambda index, x: projection.project_rows(index, x, KEY, 40)),
        {"k_project_rows"},
    ),
    "projection of a matrix": (
        _matrix(lambda x: projection.project_matrix(x, KEY, 40)),
        {"k_project"},
    ),
    "sparse": (_pair(lambda x, y: sparse_projection.sparse_project(x, y, KEY, 8, 2)), {"k_sparse"}),
    "sparse of groups": (
        lambda x: _groups(x, lambda a, b: sparse_projection.sparse_project(a, b, KEY, 512)),
        {"k_sparse"},
    ),
    "sparse of rows": (
        _looked_up(lambda index, x: sparse_projection.sparse_project_rows(index, x, KEY, 64)),
        {"k_sparse"},
    ),
    "sparse of a matrix": (
        _matrix(lambda x: sparse_projection.sparse_project_matrix(x, KEY, 32)),
        {"k_sparse"},
    ),
    "convolution of one axis": (lambda x: _conv(x, 1), {"_tile_kernel"}),
    "convolution of two axes": (lambda x: _conv(x, 2), {"_tile_kernel"}),
    "convolution of three axes": (lambda x: _conv(x, 3), {"_tile_kernel"}),
    "embedding": (_looked_up(embedding.embedding_sq_norm), {"_equal_kernel"}),
    "tied embedding": (lambda x: _cross(x, looks_up=True), {"_cross_kernel"}),
    "tied embedding at": (lambda x: _cross(x, looks_up=False), {"_cross_kernel"}),
    "tokens": (_tokens, {"_token_kernel", "_statistics_kernel"}),
    "channels": (_channels, {"_channel_kernel"}),
    "moments": (_moments, {"_moments_kernel"}),
    "cross entropy": (
        _cross_entropy,
        {"_partial_sums_kernel", "_totals_kernel", "_exponentials_kernel"},
    ),
    "head": (lambda x: _head(x, tiles=False), {"_head_partial_sums_kernel", "_totals_kernel"}),
    "head by tiles": (lambda x: _head(x, tiles=True), {"_partial_sums_kernel"}),
}


def _doubled(x: Tensor) -> Tensor:
    """Enough tokens for one program to take both sides."""
    return x.repeat(1, 1, 3, 1)


def check(name: str, inputs: Inputs, sanitized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a case in Triton and in torch; who never writes, or reads from elsewhere, gives NaN."""
    make, kernels = CASES[name]
    call = make(inputs)
    found = sanitized.run(call)
    if launch.IS_INTERPRETED and 0 not in inputs.sizes and inputs.sizes.t >= 17:
        assert kernels <= sanitized.launched
    monkeypatch.setenv("CURATE_KERNELS", "torch")
    expected = call()
    # Only to see that it is the same quantity: the kernels' own tests hold the digits.
    tolerance = 1e-3 if inputs.dtype == torch.float32 else 2e-2
    for a, b in zip(_all(found), _all(expected), strict=True):
        assert a.shape == b.shape
        scale = b.double().nan_to_num(0.0).norm() + 1e-2  # of terms near 1 that may cancel
        assert not (b.isnan() & ~a.isnan()).any(), "NaN is lost"
        if inputs.has_nan and a.dim() and len(a) == inputs.sizes.s:
            # 0 * NaN: which numbers of its own sample it reaches is the form's affair.
            b = b.clone()
            b[0].masked_fill_(a[0].isnan(), torch.nan)
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        assert (a.double() - b.double()).norm() <= tolerance * scale


def _all(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for part in found or () for x in _all(part)]


# A prime in each, more than one block of tokens of some kernels, and a last block that is ragged.
RAGGED = Sizes(3, 17, 5, 7)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_keeps_to_its_memory(
    name: str, sanitized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, Inputs(RAGGED, layout="padded"), sanitized, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nan_stays_with_its_sample(
    name: str, sanitized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not lost: it is wherever it is in torch. The other samples' results have none."""
    check(name, Inputs(RAGGED, has_nan=True), sanitized, monkeypatch)


# A kernel's addresses do not depend on the dtype but through its size, so each layout takes one.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"), [(layout, DTYPES[i % 3]) for i, layout in enumerate(LAYOUTS)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_any_layout_is_read_as_it_lies(
    name: str, dtype: torch.dtype, layout: str, sanitized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, Inputs(RAGGED, dtype, layout), sanitized, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1, 1, 1),
        Sizes(5, 1, 17, 3),
        Sizes(2, 16, 16, 64),  # whole blocks, aligned rows
        Sizes(2, 33, 31, 65),  # one below and one above
        Sizes(1, 129, 130, 33),
        Sizes(1, 3, 33, 600),
        Sizes(0, 3, 4, 5),
        Sizes(2, 0, 4, 5),
        Sizes(2, 3, 0, 5),
        Sizes(2, 3, 4, 0),
    ],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
@pytest.mark.parametrize("name", CASES)
def test_any_size_is_within_bounds(
    name: str, sizes: Sizes, sanitized: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith(("cross entropy", "head")) and sizes.i * sizes.o == 0:
        pytest.skip("a softmax over no classes is undefined")
    check(name, Inputs(sizes), sanitized, monkeypatch)


def test_every_kernel_has_a_case() -> None:
    shipped = set()
    for path in Path(launch.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"curate.kernels.{path.stem}")
        for variant in module.variants(90) if hasattr(module, "variants") else ():
            shipped.add(variant.kernel.fn.__name__)
    covered = set().union(*(kernels for _, kernels in CASES.values()))
    assert shipped - covered == {"k_add"}, "sums of programs are added up in several cases"
