"""Two-sided random sketch of each sample's gradient of a weight matrix.

Shapes: s samples, g groups, t tokens, o rows and i columns within a group; the whole matrix has
g * o rows. S_o [g * o, k_o] and S_i [i, k_i] are sign matrices of `kernels/rademacher.py`.

    sketch = S_o^T G S_i / sqrt(k_o k_i) = sum_t (S_o^T left_t)(S_i^T right_t)^T / sqrt(k_o k_i)

The constant does not depend on o or i, so inner products of sketches estimate <G, H> without bias
and sketches of several layers may be concatenated.

On a GPU left and right are read once and the signs live in registers: one program projects a block
of tokens from both sides and multiplies the projections. A side of few tokens, or one wider than
64, is projected by itself (`sketch_side`), its columns split among programs. Sums of different
programs are written apart and added in a fixed order; how tokens and columns are cut does not
depend on how many samples there are, unless they have less than 32 tokens.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import Config, Variant, architecture, jit, tl, uses_triton
from curate.kernels.rademacher import (
    Key,
    dot_signs,
    side_signs,
    sign_words,
    signs,
    spread_signs,
    unpacked,
)
from curate.kernels.summation import accumulable, accumulator, chunks

Keys = tuple[Key, Key]
"""The streams of the rows and of the columns."""


def sketch(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"], keys: Keys, k: tuple[int, int]
) -> Float[Tensor, "s kk"]:
    """Return the flattened k_o x k_i sketch; `keys` are the streams of the rows and the columns."""
    left, right = alike(left, right)
    if not uses_triton(left, right) or not _is_fused(left, k):
        wide = _sides(right, keys[1], k[1], shared=True)
        return sketch_from_sides(_sides(left, keys[0], k[0]).flatten(1, 2), wide.flatten(1, 2))
    return _fused(left, right, keys, k, "both")


def sketch_left(
    left: Float[Tensor, "s g t o"],
    wide: Float[Tensor, "s g t k_i"],
    key: Key,
    k: tuple[int, int],
) -> Float[Tensor, "s kk"]:
    """Return the sketch where the right factors are projected already: wide = right @ S_i.

    `key` is the stream of the rows; `wide` is what `sketch_side` returned in the forward pass.
    """
    if not uses_triton(left, wide) or not _is_fused(left, k):
        tall = _sides(left, key, k[0])
        return sketch_from_sides(tall.flatten(1, 2), wide.to(tall.dtype).flatten(1, 2))
    return _fused(left, wide.float(), (key, key), k, "left")


def sketch_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], keys: Keys, k: tuple[int, int]
) -> Float[Tensor, "s kk"]:
    """Return the sketch where left_t is the unit vector of row index_t (embeddings)."""
    right = right[:, None]
    if not uses_triton(right) or not _is_fused(right, k):
        tall = signs(keys[0], index.flatten(), k[0], dtype=accumulator(right))
        wide = _sides(right, keys[1], k[1])[:, 0]
        return sketch_from_sides(tall.view(*index.shape, k[0]), wide)
    return _fused(index.long()[:, None, :, None], right, keys, k, "rows")


def sketch_matrix(
    grad: Float[Tensor, "s o i"], keys: Keys, k: tuple[int, int]
) -> Float[Tensor, "s kk"]:
    """Return the sketch of gradients that are at hand."""
    half = sketch_side(grad, keys[1], k[1])
    whole = sketch_side(half.mT, keys[0], k[0])
    return whole.mT.flatten(1) / math.sqrt(k[0] * k[1])


def sketch_vector(grad: Float[Tensor, "s p"], key: Key, k: int) -> Float[Tensor, "s k"]:
    """Return the one-sided sketch of a vector's gradient: `grad @ S / sqrt(k)`."""
    if uses_triton(grad):
        return sketch_side(grad, key, k) / math.sqrt(k)
    out = grad.new_zeros(grad.shape[0], k, dtype=accumulator(grad))
    for part in chunks(grad.shape[1], 4 * k):  # in cache: four times as fast
        at = torch.arange(part.start, part.stop, device=grad.device)
        out += accumulable(grad[:, part]) @ signs(key, at, k, dtype=out.dtype)
    return out / math.sqrt(k)


def sketch_side(x: Float[Tensor, "*n c"], key: Key, k: int) -> Float[Tensor, "*n k"]:
    """Return x @ S, S the signs of stream `key`: one side of a sketch, unscaled.

    float32, or float64 for float64. For an engine that keeps the projection of a layer's input
    instead of the input. Not split into groups: a group's columns of S_i are those of any other.
    """
    flat = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
    out = _sides(flat[None, None] if flat.dim() == 2 else flat[:, None], key, k)
    return out.view(*x.shape[:-1], k)


def sketch_from_sides(
    tall: Float[Tensor, "s t k_o"], wide: Float[Tensor, "s t k_i"]
) -> Float[Tensor, "s kk"]:
    """Return the sketch of sum_t left_t right_t^T from both factors' projections."""
    return torch.bmm(tall.mT, wide).flatten(1) / math.sqrt(tall.shape[2] * wide.shape[2])


def _sides(
    x: Float[Tensor, "s g t c"], key: Key, k: int, *, shared: bool = False
) -> Float[Tensor, "s g t k"]:
    """Return the projection of each group by its own c rows of S, or of all by the same ones."""
    _, g, _, c = x.shape
    if uses_triton(x):
        return _sides_triton(x, key, k, 0 if shared else c)
    dtype = accumulator(x)
    if shared or g == 1:
        return accumulable(x) @ side_signs(key, c, k, dtype, x.device)
    return accumulable(x) @ side_signs(key, g * c, k, dtype, x.device).view(g, c, k)


def alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors in the wider of their dtypes (autocast may leave one in float32)."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def _is_fused(left: Float[Tensor, "s g t o"], k: tuple[int, int]) -> bool:
    """Return whether one program can hold both sides and their product, and has tokens enough."""
    return max(k) <= 64 and left.shape[2] >= 32


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x, copied only where its last axis is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _sides_triton(
    x: Float[Tensor, "s g t c"], key: Key, k: int, group_step: int
) -> Float[Tensor, "s g t k"]:
    s, g, t, c = x.shape
    if x.numel() == 0:
        return x.new_zeros(s, g, t, k, dtype=torch.float32)
    x = rows_contiguous(x)
    config = _side_config(architecture(x.device), x.dtype, s * t, k)
    blocks = -(-s * t // config.blocks["BLOCK_N"]), -(-k // config.blocks["K"])
    # Some 256 programs, each with four blocks of columns at least, whatever the device.
    splits = max(1, min(c // (4 * config.blocks["BLOCK_C"]), 256 // (g * blocks[0] * blocks[1])))
    step = -(-c // (splits * config.blocks["BLOCK_C"]))
    out = torch.empty(splits, s, g, t, k, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        k_side[(blocks[0] * g, blocks[1], splits)](
            x, out, s * t, g, t, c, k, step, group_step, *x.stride()[:3], *key.arguments,
            **config.options,
        )  # fmt: skip
    return add_partials(out.view(1, splits, -1)).view(s, g, t, k)


def _fused(
    left: Tensor,
    right: Tensor,
    keys: Keys,
    k: tuple[int, int],
    mode: Literal["both", "left", "rows"],
) -> Float[Tensor, "s kk"]:
    s, g, t, o = left.shape
    i = right.shape[3]
    if s * g * t * i * o == 0:
        return right.new_zeros(s, k[0] * k[1], dtype=torch.float32)
    left, right = rows_contiguous(left), rows_contiguous(right)
    config = FUSED[max(a for a in FUSED if a <= architecture(left.device))][_padded(max(k))]
    tiles = -(-t // config.blocks["BLOCK_T"])
    out = torch.empty(s, g * tiles, k[0] * k[1], dtype=torch.float32, device=left.device)
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        k_sketch[(s * g * tiles,)](
            left, right, out, g, t, o, i, *k, *left.stride()[:3], *right.stride()[:3],
            *keys[0].arguments, *keys[1].arguments, MODE=mode, **config.options,
        )  # fmt: skip
    return add_partials(out) / math.sqrt(k[0] * k[1])


def add_partials(partials: Float[Tensor, "s p k"]) -> Float[Tensor, "s k"]:
    """Return sum_p partials (contiguous), one after another: in the same order in any batch."""
    s, p, k = partials.shape
    if p == 1 or s * k == 0:
        return partials[:, 0]
    out = torch.empty(s, k, dtype=partials.dtype, device=partials.device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        blocks = -(-k // ADD.blocks["BLOCK_K"])
        k_add[(s * blocks,)](partials, out, p, k, blocks, **ADD.options)
    return out


@jit
def project_tokens(  # type: ignore[no-untyped-def]
    p_x, stride_t, o_t, m_t, first, last, shift, first_word, key0, key1,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns first … last of some tokens times their signs: [BLOCK_T, K].

    Column c is coordinate c + shift of the stream; outputs start at 32 * first_word.
    """
    WORDS: tl.constexpr = K // 32
    acc = tl.zeros([BLOCK_T, K], tl.float32)
    o_w = first_word + tl.arange(0, WORDS)
    for start in range(first, last, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        mask = m_t[:, None] & (o_c < last)[None, :]
        b_x = tl.load(p_x + o_t[:, None] * stride_t + o_c[None, :], mask=mask, other=0.0)
        word = sign_words(
            tl.zeros([1, 1], tl.uint32), (o_c + shift)[:, None], o_w[None, :], key0, key1
        )
        acc = dot_signs(b_x, word, acc, BLOCK_C, K)
    return acc


@jit
def k_side(  # type: ignore[no-untyped-def]
    p_x, p_out, n, g, t, c, k, step, group_step, stride_s, stride_g, stride_t, key0, key1,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[split] = x[:, columns of the split] @ signs; program (token block and group, outputs,
    split); a token block runs over all n = s * t tokens of a group."""
    i_g = tl.program_id(0) % g
    o_n = (tl.program_id(0) // g).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_s, i_t = o_n // t, o_n % t
    i_k, i_split = tl.program_id(1), tl.program_id(2)
    first = i_split * step * BLOCK_C
    m_n = o_n < n
    # The address of a token is the sum of two strides: it goes in whole, with a stride of 1.
    o_x = i_s * stride_s + i_t * stride_t + i_g.to(tl.int64) * stride_g
    acc = project_tokens(
        p_x, 1, o_x, m_n, first, tl.minimum(first + step * BLOCK_C, c), i_g * group_step,
        i_k * (K // 32), unpacked(key0), unpacked(key1), K, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    o_k = i_k * K + tl.arange(0, K)
    o_out = (i_split.to(tl.int64) * (n // t) + i_s) * g * t + i_g * t + i_t
    mask = m_n[:, None] & (o_k < k)[None, :]
    tl.store(p_out + o_out[:, None] * k + o_k[None, :], acc, mask=mask)


@jit
def k_sketch(  # type: ignore[no-untyped-def]
    p_left, p_right, p_out, g, t, o, i, k_o, k_i,
    left_s, left_g, left_t, right_s, right_g, right_t, row0, row1, column0, column1,
    MODE: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sketch of one block of tokens of one group of one sample.

    MODE both: left and right are factors. left: right is projected already. rows: left holds row
    numbers.
    """
    tiles = tl.cdiv(t, BLOCK_T)
    i_tile, i_g = tl.program_id(0) % tiles, tl.program_id(0) // tiles % g
    i_s = (tl.program_id(0) // tiles // g).to(tl.int64)
    o_t = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < t
    o_k = tl.arange(0, K)
    p_left += i_s * left_s + i_g.to(tl.int64) * left_g
    p_right += i_s * right_s + i_g.to(tl.int64) * right_g
    if MODE == "rows":
        index = tl.load(p_left + o_t * left_t, mask=m_t, other=0)
        o_w = tl.arange(0, K // 32)
        word = sign_words(
            tl.zeros([1, 1], tl.uint32),
            index[:, None],
            o_w[None, :],
            unpacked(row0),
            unpacked(row1),
        )
        # Rows beyond t meet zeros on the other side.
        tall = spread_signs(word, BLOCK_T, K, tl.float32)
    else:
        tall = project_tokens(
            p_left, left_t, o_t, m_t, 0, o, i_g * o, 0, unpacked(row0), unpacked(row1),
            K, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    if MODE == "left":
        mask = m_t[:, None] & (o_k < k_i)[None, :]
        wide = tl.load(p_right + o_t[:, None] * right_t + o_k[None, :], mask=mask, other=0.0)
    else:
        wide = project_tokens(
            p_right, right_t, o_t, m_t, 0, i, 0, 0, unpacked(column0), unpacked(column1),
            K, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    # Three tf32 products of a float32's two halves: as exact as float32 on tensor cores.
    acc = tl.dot(tl.trans(tall), wide, input_precision="tf32x3")
    p_out += tl.program_id(0).to(tl.int64) * k_o * k_i
    mask = (o_k < k_o)[:, None] & (o_k < k_i)[None, :]
    tl.store(p_out + o_k[:, None] * k_i + o_k[None, :], acc, mask=mask)


@jit
def k_add(p_in, p_out, p, k, blocks, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = sum_p in; program (block of k and sample)."""
    i_s = (tl.program_id(0) // blocks).to(tl.int64)
    o_k = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for i_p in range(p):
        acc += tl.load(p_in + (i_s * p + i_p) * k + o_k, mask=o_k < k, other=0.0)
    tl.store(p_out + i_s * k + o_k, acc, mask=o_k < k)


ADD = Config({"BLOCK_K": 128}, num_warps=4, num_stages=4)
# Estimated, not yet tuned on a device (2026-11-22). By the outputs that a program holds; what fits
# the registers of sm_90 at 64 outputs does not fit those of sm_80.
FUSED: dict[int, dict[int, Config]] = {
    80: {
        32: Config({"K": 32, "BLOCK_T": 64, "BLOCK_C": 32}, num_warps=4, num_stages=3),
        64: Config({"K": 64, "BLOCK_T": 32, "BLOCK_C": 32}, num_warps=4, num_stages=3),
    },
    90: {
        32: Config({"K": 32, "BLOCK_T": 64, "BLOCK_C": 32}, num_warps=4, num_stages=3),
        64: Config({"K": 64, "BLOCK_T": 64, "BLOCK_C": 32}, num_warps=8, num_stages=3),
    },
}
# Few tokens (a classifier's row, a vector) or many; the outputs of a program.
SIDE: dict[int, dict[tuple[bool, int], Config]] = {
    80: {
        (few, k): Config(
            {
                "K": k,
                "BLOCK_N": 16 if few else 64 if k < 256 else 32,
                "BLOCK_C": 64 if k == 32 and not few else 16 if k == 256 else 32,
            },
            num_warps=4 if k == 32 else 8,
            num_stages=3,
        )
        for few in (True, False)
        for k in (32, 64, 128, 256)
    },
}
SIDE[90] = SIDE[80]


def _padded(k: int) -> int:
    """Return the outputs that one program makes."""
    return min(256, max(32, 1 << (k - 1).bit_length()))


def _side_config(arch: int, dtype: torch.dtype, tokens: int, k: int) -> Config:
    return SIDE[max(a for a in SIDE if a <= arch)][tokens <= 32, _padded(k)]


def variants(architecture: int) -> Iterator[Variant]:
    """Return every configuration that may be launched."""
    arch = max(a for a in SIDE if a <= architecture)
    i32 = "n g t o i c p k k_o k_i step group_step blocks".split()
    i64 = "key0 key1 row0 row1 column0 column1 stride_s stride_g stride_t".split()
    i64 += "left_s left_g left_t right_s right_g right_t".split()
    scalars = dict.fromkeys(i64, "i64") | dict.fromkeys(i32, "i32") | {"p_out": "*fp32"}
    yield variant("add_partials", k_add, scalars | {"p_in": "*fp32"}, ADD)
    for dtype in ("fp32", "bf16", "fp16"):
        for (few, k), config in SIDE[arch].items():
            name = f"side_{dtype}_{k}{'_few' if few else ''}"
            yield variant(name, k_side, scalars | {"p_x": f"*{dtype}"}, config)
        for k, config in FUSED[arch].items():
            modes = ("both", dtype, dtype), ("left", dtype, "fp32"), ("rows", "i64", dtype)
            for mode, left, right in modes:
                types = scalars | {"p_left": f"*{left}", "p_right": f"*{right}"}
                yield variant(f"sketch_{mode}_{dtype}_{k}", k_sketch, types, config, MODE=mode)


def variant(
    name: str, kernel: Any, types: Mapping[str, str], config: Config, **constants: str
) -> Variant:
    """Return the variant of a configuration; `types` may name arguments of other kernels too."""
    constexprs = {**config.blocks, **constants}
    own = {n: types[n] for n in kernel.arg_names if n not in constexprs}
    return Variant(name, kernel, own, constexprs, config.num_warps, config.num_stages)
