"""Squared norm of each sample's gradient of a weight matrix, without the gradient.

Shapes: s samples, g groups (of a grouped convolution, else 1), t tokens (or positions), o rows and
i columns of the matrix within a group; n tokens of all samples end to end. A sample has the
gradient G_g = sum_t left_gt right_gt^T.

Two forms, both exact:
    Gram    sum_{t, t'} (left_t . left_t') (right_t . right_t')     t^2 (o + i) / 2 multiplications
    tiles   entries of G, squared and added as they are made        t o i

The Gram form makes both t x t matrices block by block: those above the diagonal count twice.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels import summation
from curate.kernels.grad_tiles import (
    by_length,
    grad_sq_norm_spans,
    grad_sq_norm_tiles,
    spans_of,
)
from curate.kernels.launch import Config, Variant, architecture, jit, precision, tl, uses_triton
from curate.kernels.summation import (
    SCRATCH,
    accumulable,
    accumulator,
    addressable,
    chunks,
    dot,
    inner,
    on_device,
    quick_scratch,
    sum_partials,
    unit_of,
    wide,
)

__all__ = [
    "SCRATCH",
    "accumulable",
    "accumulator",
    "cheaper_form",
    "chunks",
    "grad_sq_norm",
    "grad_sq_norm_gram",
    "grad_sq_norm_packed",
    "grad_sq_norm_tiles",
    "inner",
]


def grad_sq_norm(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """Return sum_g ||sum_t left_t right_t^T||_F^2 per sample, in the cheaper of the two forms.

    Accumulates in float32 (float64 for float64 inputs). Never negative: a Gram sum that rounds
    below zero is zero. Scratch is bounded; no [s, o, i] tensor exists, and on a GPU no [t, t].
    """
    form = cheaper_form(left.shape[2], left.shape[3], right.shape[3], left.device.type)
    return grad_sq_norm_gram(left, right) if form == "gram" else grad_sq_norm_tiles(left, right)


def grad_sq_norm_packed(
    left: Float[Tensor, "n o"], right: Float[Tensor, "n i"], starts: Int[Tensor, " e"]
) -> Float[Tensor, " s"]:
    """Return the same for samples of any lengths: tokens starts[s] to starts[s + 1] are sample s's.

    No work is done for padding, and none is needed. `starts` rises from 0 to n. Each sample takes
    the form that is cheaper at its length; on a GPU, reading the lengths waits for it.
    """
    dtype = torch.promote_types(accumulator(left), accumulator(right))
    out = left.new_zeros(len(starts) - 1, dtype=dtype)
    if not uses_triton(left, right):
        for rows, x, y in by_length(left, right, starts):
            out[rows] = grad_sq_norm(x, y).to(dtype)
        return out
    spans = spans_of(starts.to(left.device))
    lengths = spans[:, 1].cpu()
    # One launch for each block of the Gram form, one for the tiles (0).
    by_block: dict[int, list[int]] = {}
    for t in sorted(set(lengths.tolist())):
        by_block.setdefault(_packed_block(left, right, t), []).append(t)
    for block, served in by_block.items():
        rows = torch.isin(lengths, torch.tensor(served)).nonzero().squeeze(1).to(left.device)
        if block:
            x, y = left[None, None], right[None, None]
            out[rows] = _launch_gram(x, y, spans[rows], served[-1])
        else:
            out[rows] = grad_sq_norm_spans(left, right, spans[rows])
    return out


def _packed_block(left: Tensor, right: Tensor, t: int) -> int:
    """Return the Gram form's tokens to a block at this length, or 0 where tiles are cheaper."""
    form = cheaper_form(t, left.shape[1], right.shape[1], left.device.type)
    return _config(left[None, None], right[None, None], t).blocks["BLOCK_T"] * (form == "gram")


# The share of both t x t matrices that symmetry leaves to multiply (smaller products are slower),
# and a pass over an element of them, and of G: in multiply-adds of a matrix product. Measured by
# benchmarks/cost_model.py on an AMD EPYC (AVX-512), one thread, float32, 2026-11-22: the form so
# chosen takes 0.2 % longer than the faster one, in the mean over 90 shapes.
COSTS = (0.75, 32.0, 2.0)
# What starting and ending a block costs a GPU, in columns or tokens. Estimated, not yet measured
# on a device (2026-11-22).
BLOCK_COST_GPU = 64


def cheaper_form(t: int, o: int, i: int, device: str = "cpu") -> Literal["gram", "tiles"]:
    """Return the form that takes less time on a device type ("cpu", "cuda")."""
    if device == "cuda":
        block = _block(t, True)
        blocks = -(-t // block)
        gram = blocks * (blocks + 1) // 2 * block**2 * (o + i + BLOCK_COST_GPU)
        is_gram = t == 1 or gram <= (-(-t // 32) * 32 + BLOCK_COST_GPU) * o * i
    else:
        is_gram = gram_is_cheaper(t, o, i, *COSTS)
    return "gram" if is_gram else "tiles"


def gram_is_cheaper(
    t: int, o: int, i: int, share: float, gram_pass: float, tile_pass: float
) -> bool:
    """Return whether the Gram form takes less time at these costs."""
    return t * t * (share * (o + i) + gram_pass) <= (t + tile_pass) * o * i


def grad_sq_norm_gram(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """The Gram form: <left left^T, right right^T> over tokens, clamped at 0."""
    if uses_triton(left, right):
        return _launch_gram(left, right, None, left.shape[2])
    s, g, t, _ = left.shape
    dtype = torch.promote_types(accumulator(left), accumulator(right))
    if t == 1:
        squares = [
            torch.linalg.vector_norm(x, dim=(2, 3), dtype=dtype).square_() for x in (left, right)
        ]
        product: Tensor = squares[0] * squares[1]
        return product.sum(1)
    out = left.new_zeros(s, dtype=dtype)
    converted = sum(x.shape[3] for x in (left, right) if x.dtype != dtype)
    for rows in chunks(s, g * t * (2 * t + converted), quick_scratch(left)):
        x, y = (x[rows].to(dtype).flatten(0, 1) for x in (left, right))
        out[rows] = _gram_product(x, y, LEVELS).view(-1, g).sum(1)
    return out.clamp_(min=0)


# The diagonal is halved while a half has this many tokens, and this often at most: beyond that
# small products lose more than symmetry saves. Measured as the constants above.
HALF, LEVELS = 32, 3


def _gram_product(x: Float[Tensor, "b t o"], y: Float[Tensor, "b t i"], levels: int) -> Tensor:
    """Return <x x^T, y y^T>: two halves of the diagonal and, twice, the block beside it."""
    half = x.shape[1] // 2
    if half < HALF or levels == 0:
        return inner(torch.bmm(x, x.mT), torch.bmm(y, y.mT))
    x0, x1, y0, y1 = x[:, :half], x[:, half:], y[:, :half], y[:, half:]
    beside = inner(torch.bmm(x0, x1.mT), torch.bmm(y0, y1.mT))
    diagonal = _gram_product(x0, y0, levels - 1) + _gram_product(x1, y1, levels - 1)
    return diagonal.add_(beside, alpha=2)


def _launch_gram(left: Tensor, right: Tensor, spans: Tensor | None, t: int) -> Tensor:
    left, right = addressable(left), addressable(right)
    samples, g, _, o = left.shape
    if spans is not None:
        samples = len(spans)
    if t == 0 or samples * g == 0:
        return left.new_zeros(samples, dtype=torch.float32)
    if t == 1 and spans is None:
        return _launch_one_token(left, right)
    config = _config(left, right, t)
    count = -(-t // config.blocks["BLOCK_T"])
    pairs = count * (count + 1) // 2
    unit = unit_of(left, right)
    sizes = (o, right.shape[3], *left.stride()[:3], *right.stride()[:3])
    parts = []
    for some in chunks(samples, g * pairs, summation.PARTIALS):
        at = some if spans is None else slice(None)
        partials = left.new_empty(some.stop - some.start, g * pairs, dtype=torch.float32)
        with on_device(left):
            _gram_kernel[(partials.numel(),)](
                left[at], right[at], None if spans is None else spans[some], partials,
                t, g, pairs, *(size // unit for size in sizes),
                PACKED=spans is not None, UNIT=unit,
                PRECISION=precision(left if left.dtype == torch.float32 else right),
                **config.options,
            )  # fmt: skip
        parts.append(sum_partials(partials))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).clamp(min=0)


def _launch_one_token(left: Tensor, right: Tensor) -> Tensor:
    samples, g, _, o = left.shape
    out = left.new_empty(samples, g, dtype=torch.float32)
    unit = unit_of(left, right)
    sizes = (o, right.shape[3], *left.stride()[:2], *right.stride()[:2])
    with on_device(left):
        _one_token_kernel[(-(-out.numel() // ONE_TOKEN.blocks["ROWS"]),)](
            left, right, out, out.numel(), g, *(size // unit for size in sizes),
            UNIT=unit, **ONE_TOKEN.options,
        )  # fmt: skip
    return sum_partials(out)


@jit
def _gram_kernel(  # type: ignore[no-untyped-def]
    p_left, p_right, p_spans, p_out, t, g, pairs, o, i,
    left_s, left_g, left_t, right_s, right_g, right_t,
    PACKED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of both Gram matrices of one sample and group, multiplied and added up."""
    # Multiplied here, what is a multiple of 16 is known to be: loads are vectors.
    o, i = o * UNIT, i * UNIT
    left_s, left_g, left_t = wide(left_s) * UNIT, wide(left_g) * UNIT, left_t * UNIT
    right_s, right_g, right_t = wide(right_s) * UNIT, wide(right_g) * UNIT, right_t * UNIT
    i_pair, i_sg = tl.program_id(0) % pairs, tl.program_id(0) // pairs
    i_s, i_g = (i_sg // g).to(tl.int64), (i_sg % g).to(tl.int64)
    # Pair p is block (a, b), b <= a, with p = a (a + 1) / 2 + b: whatever the number of blocks.
    a = ((tl.sqrt(8.0 * i_pair.to(tl.float32) + 1.0) - 1) * 0.5).to(tl.int32)
    a = tl.where(a * (a + 1) // 2 > i_pair, a - 1, a)
    a = tl.where((a + 1) * (a + 2) // 2 <= i_pair, a + 1, a)
    b = i_pair - a * (a + 1) // 2
    if PACKED:
        first = tl.load(p_spans + 2 * i_s)
        length = tl.load(p_spans + 2 * i_s + 1).to(tl.int32)
        p_left += first * left_t
        p_right += first * right_t
    else:
        length = t
        p_left += i_s * left_s + i_g * left_g
        p_right += i_s * right_s + i_g * right_g
    a, b = a * BLOCK_T, b * BLOCK_T
    is_real = a < length  # beyond a short sample's end: no work, and a 0
    gram_left = _gram_block(
        p_left, left_t, a, b, length, tl.where(is_real, o, 0), PRECISION, BLOCK_T, BLOCK_K
    )
    gram_right = _gram_block(
        p_right, right_t, a, b, length, tl.where(is_real, i, 0), PRECISION, BLOCK_T, BLOCK_K
    )
    total = tl.sum(tl.sum(gram_left * gram_right, axis=1), axis=0)
    tl.store(p_out + tl.program_id(0).to(tl.int64), total * tl.where(a == b, 1.0, 2.0))


@jit
def _one_token_kernel(  # type: ignore[no-untyped-def]
    p_left, p_right, p_out, n, g, o, i, left_s, left_g, right_s, right_g,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """||left||^2 ||right||^2 of a few samples and groups: each factor is read once."""
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < n
    i_s, i_g = (o_n // g).to(tl.int64), (o_n % g).to(tl.int64)
    left = _squares(p_left, (i_s * left_s + i_g * left_g) * UNIT, m_n, o * UNIT, ROWS, BLOCK_K)
    right = _squares(p_right, (i_s * right_s + i_g * right_g) * UNIT, m_n, i * UNIT, ROWS, BLOCK_K)
    tl.store(p_out + o_n, left * right, mask=m_n)


@jit
def _squares(p_x, o_n, m_n, k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the squares of k columns, of each row at these offsets."""
    o_k = tl.arange(0, BLOCK_K)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        mask = m_n[:, None] & (start + o_k < k)[None, :]
        x = tl.load(p_x + o_n[:, None] + (start + o_k)[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        total += x * x
    return tl.sum(total, axis=1)


@jit
def _gram_block(  # type: ignore[no-untyped-def]
    p_x, stride, a, b, length, k,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_a x_b^T over k columns, for the blocks of tokens that start at a and b."""
    o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    m_a, m_b = a + o_t < length, b + o_t < length
    # 64-bit addresses of the blocks, 32-bit ones within: half the registers.
    p_a, p_b = p_x + a.to(tl.int64) * stride, p_x + b.to(tl.int64) * stride
    within = o_t[:, None] * tl.cast(stride, tl.int32) + o_k[None, :]
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, k, BLOCK_K):
        m_k = start + o_k < k
        x_a = tl.load(p_a + start + within, mask=m_a[:, None] & m_k[None, :], other=0.0)
        x_b = tl.load(p_b + start + within, mask=m_b[:, None] & m_k[None, :], other=0.0)
        gram = dot(x_a, tl.trans(x_b), gram, PRECISION)
    return gram


# Estimated, not yet tuned on a device (2026-11-22). Keyed by architecture, then by the bytes of an
# element of the wider factor, then by the tokens of a block.
CONFIGS: Mapping[int, Mapping[tuple[int, int], Config]] = {
    80: {
        (2, 16): Config({"BLOCK_T": 16, "BLOCK_K": 128}, 2, 3),
        (2, 32): Config({"BLOCK_T": 32, "BLOCK_K": 64}, 4, 3),
        (2, 64): Config({"BLOCK_T": 64, "BLOCK_K": 64}, 4, 3),
        (2, 128): Config({"BLOCK_T": 128, "BLOCK_K": 32}, 8, 3),
        (4, 16): Config({"BLOCK_T": 16, "BLOCK_K": 32}, 2, 2),
        (4, 32): Config({"BLOCK_T": 32, "BLOCK_K": 32}, 4, 2),
        (4, 64): Config({"BLOCK_T": 64, "BLOCK_K": 16}, 4, 2),
    },
    90: {
        (2, 16): Config({"BLOCK_T": 16, "BLOCK_K": 128}, 2, 3),
        (2, 32): Config({"BLOCK_T": 32, "BLOCK_K": 128}, 4, 3),
        (2, 64): Config({"BLOCK_T": 64, "BLOCK_K": 64}, 4, 4),
        (2, 128): Config({"BLOCK_T": 128, "BLOCK_K": 64}, 8, 3),
        (4, 16): Config({"BLOCK_T": 16, "BLOCK_K": 32}, 4, 2),
        (4, 32): Config({"BLOCK_T": 32, "BLOCK_K": 32}, 4, 2),
        (4, 64): Config({"BLOCK_T": 64, "BLOCK_K": 16}, 4, 2),
    },
}


ONE_TOKEN = Config({"ROWS": 4, "BLOCK_K": 256}, 4, 3)


def _config(left: Tensor, right: Tensor, t: int) -> Config:
    size = max(left.element_size(), right.element_size())
    block = _block(t, size == 2 and unit_of(left, right) > 1)
    return _table(architecture(left.device))[size, block]


def _block(t: int, has_large: bool) -> int:
    """Return the tokens of a block; there are large ones where addresses are few and short."""
    return 16 if t <= 16 else 32 if t <= 32 else 64 if t <= 256 or not has_large else 128


def _table(architecture: int) -> Mapping[tuple[int, int], Config]:
    return CONFIGS[max(a for a in CONFIGS if a <= max(architecture, min(CONFIGS)))]


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched on this architecture."""
    kinds = ("bf16", "fp16", "fp32")
    for left, right in ((x, y) for x in kinds for y in kinds):
        for unit in (1, 16):
            types = {"p_left": f"*{left}", "p_right": f"*{right}", "p_out": "*fp32"}
            types |= dict.fromkeys(("n", "g", "o", "i"), "i32")
            types |= {f"{x}_{axis}": "i64" for x in ("left", "right") for axis in "sg"}
            yield Variant(
                f"one_token_{left}_{right}_{unit}", _one_token_kernel, types,
                {"UNIT": unit, **ONE_TOKEN.blocks}, ONE_TOKEN.num_warps, ONE_TOKEN.num_stages,
            )  # fmt: skip
        for (size, block), config in _table(architecture).items():
            if size != (4 if "fp32" in (left, right) else 2):
                continue
            for aligned in (True, False) if block < 128 else (True,):
                for packed in (False, True) if left == right else (False,):
                    name = f"gram_{left}_{right}_{block}{'_ragged' * (not aligned)}"
                    types = {"p_left": f"*{left}", "p_right": f"*{right}", "p_out": "*fp32"}
                    types |= dict.fromkeys(("t", "o", "i", "pairs"), "i32")
                    types |= {f"{x}_{axis}": "i64" for x in ("left", "right") for axis in "sgt"}
                    constants: dict[str, Any] = {
                        "PACKED": packed, "UNIT": 16 if aligned else 1, "g": 1,
                        "PRECISION": "ieee" if size == 4 else "tf32", **config.blocks,
                    }  # fmt: skip
                    if packed:
                        types["p_spans"] = "*i64"
                    else:
                        constants["p_spans"] = None
                    yield Variant(
                        name + "_packed" * packed, _gram_kernel, types, constants,
                        config.num_warps, config.num_stages,
                    )  # fmt: skip
