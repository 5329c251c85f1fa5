"""One-sided random projection of each sample's whole gradient, made tile by tile.

Shapes as in `kernels/sketch.py`. Coordinate (r, c) of the matrix has the k signs of its own:

    projection_j = sum_{r, c} sign(r, c, j) G[r, c] / sqrt(k)

Projections of several parameters (with different keys) add up to that of the whole gradient
(Johnson-Lindenstrauss; what TRAK and LESS store). `kernels/sparse_projection.py` estimates inner
products as well at a thousandth of the cost; this one is for parity with those.

On a GPU a program makes a tile of G for 16 samples in registers and multiplies it by the tile's
signs, some outputs at a time. The sums of all k outputs do not fit there: each program keeps its
own in memory, which its share of the tiles updates in turn. Programs are added in a fixed order.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import Config, Variant, architecture, jit, tl, uses_triton
from curate.kernels.rademacher import (
    Key,
    coordinate_hash,
    finalise,
    signs,
    spread_signs,
    spread_words,
    thirds,
    unpacked,
)
from curate.kernels.sketch import add_partials, alike, rows_contiguous, variant
from curate.kernels.summation import accumulable, accumulator, chunks, dot

# Signs, and elements of G, at a time in the torch form: 2 MiB, within a core's cache.
SIGNS = 1 << 19


def project(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"], key: Key, k: int
) -> Float[Tensor, "s k"]:
    """Return the projection of sum_t left_t right_t^T; one tile of rows of G exists at a time.

    float32, or float64 for float64 inputs.
    """
    left, right = alike(left, right)
    if uses_triton(left, right):
        return _launch("pair", left, right, key, k)
    s, g, _, o = left.shape
    out = left.new_zeros(s, k, dtype=accumulator(left))
    r = accumulable(right)
    for group in range(g):
        for tile in chunks(o, right.shape[3] * s, SIGNS):
            grad = torch.bmm(accumulable(left[:, group, :, tile]).mT, r[:, group])
            first = group * o + tile.start
            at = torch.arange(first, first + grad.shape[1], device=left.device)
            _add_rows(out, grad, at, key)
    return out / math.sqrt(k)


def project_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], key: Key, k: int
) -> Float[Tensor, "s k"]:
    """Return the projection where left_t is the unit vector of row index_t."""
    if uses_triton(right):
        return _launch_rows(index.long(), right, key, k)
    s, _, i = right.shape
    out = right.new_zeros(s, k, dtype=accumulator(right))
    ids, slot = torch.unique(index, return_inverse=True)
    samples = torch.arange(s, device=index.device)[:, None].expand_as(slot)
    for tile in chunks(ids.numel(), i * s, SIGNS):
        width = tile.stop - tile.start
        inside = (slot >= tile.start) & (slot < tile.stop)
        grad = torch.zeros(s * width, i, dtype=out.dtype, device=out.device)
        at = samples[inside] * width + slot[inside] - tile.start
        grad.index_add_(0, at, accumulable(right[inside]))
        _add_rows(out, grad.view(s, width, i), ids[tile], key)
    return out / math.sqrt(k)


def project_matrix(grad: Float[Tensor, "s o i"], key: Key, k: int) -> Float[Tensor, "s k"]:
    """Return the projection of gradients that are at hand; a vector counts as one row."""
    if uses_triton(grad):
        return _launch("matrix", grad[:, None], grad[:, None], key, k)
    out = grad.new_zeros(grad.shape[0], k, dtype=accumulator(grad))
    for tile in chunks(grad.shape[1], grad.shape[2] * max(1, grad.shape[0]), SIGNS):
        at = torch.arange(tile.start, tile.stop, device=grad.device)
        _add_rows(out, accumulable(grad[:, tile]), at, key)
    return out / math.sqrt(k)


def _add_rows(
    out: Float[Tensor, "s k"], grad: Float[Tensor, "s r i"], rows: Int[Tensor, " r"], key: Key
) -> None:
    """Add the unscaled projection of some rows of G, as many coordinates at a time as SIGNS hold.

    Of the time on a CPU (AMD EPYC, 2026-11) half is the product, a third the look-up of signs.
    """
    i, k = grad.shape[2], out.shape[1]
    flat = grad.flatten(1)
    for part in chunks(flat.shape[1], k, SIGNS):
        at = torch.arange(part.start, part.stop, device=out.device)
        sign = signs(key, at % i, k, rows=rows[at // i], dtype=out.dtype)
        out.addmm_(flat[:, part], sign)


def _launch(
    mode: Literal["pair", "matrix"], left: Tensor, right: Tensor, key: Key, k: int
) -> Float[Tensor, "s k"]:
    """Launch one program per 16 samples and share of the tiles; `left` is [s, g, t, o], or in mode
    matrix the gradient [s, 1, o, i]. The shares do not depend on the number of samples."""
    s, g, t, o = left.shape
    i = right.shape[3]
    if left.numel() == 0 or right.numel() == 0:
        return right.new_zeros(s, k, dtype=torch.float32)
    left, right = rows_contiguous(left), rows_contiguous(right)
    table = CONFIGS[max(a for a in CONFIGS if a <= architecture(left.device))]
    config = table["fp32" if left.dtype == torch.float32 else "16"]
    rows = o if mode == "pair" else t
    tall, wide = -(-rows // config.blocks["BLOCK_O"]), -(-i // config.blocks["BLOCK_I"])
    step = -(-g * tall * wide // max(1, SHARES // k))
    shares = -(-g * tall * wide // step)
    out = torch.empty(s, shares, k, dtype=torch.float32, device=left.device)
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        k_project[(-(-s // config.blocks["SAMPLES"]) * shares,)](
            left, right, out, s, g, t, rows, i, k, tall, wide, step, shares,
            *left.stride()[:3], *right.stride()[:3], *key.arguments, MODE=mode, **config.options,
        )  # fmt: skip
    return add_partials(out) / math.sqrt(k)


def _launch_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], key: Key, k: int
) -> Float[Tensor, "s k"]:
    s, t, i = right.shape
    if right.numel() == 0:
        return right.new_zeros(s, k, dtype=torch.float32)
    right = rows_contiguous(right)
    config = CONFIGS[max(a for a in CONFIGS if a <= architecture(right.device))]["rows"]
    wide = -(-i // config.blocks["BLOCK_C"])
    step = -(-t * wide // max(1, SHARES // k))
    shares = -(-t * wide // step)
    out = torch.empty(s, shares, k, dtype=torch.float32, device=right.device)
    with torch.cuda.device_of(right):  # type: ignore[no-untyped-call]
        k_project_rows[(s * shares, -(-k // config.blocks["BLOCK_K"]))](
            index, right, out, t, i, k, wide, step, shares,
            *index.stride(), *right.stride()[:2], *key.arguments, **config.options,
        )  # fmt: skip
    return add_partials(out) / math.sqrt(k)


@jit
def k_project(  # type: ignore[no-untyped-def]
    p_left, p_right, p_out, s, g, t, o, i, k, tall, wide, step, shares,
    left_s, left_g, left_t, right_s, right_g, right_t, key0, key1,
    MODE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """out[samples, share] = the unscaled projection of a share of the tiles of G."""
    N: tl.constexpr = BLOCK_O * BLOCK_I
    key0, key1 = unpacked(key0), unpacked(key1)
    i_share = tl.program_id(0) % shares
    o_s = (tl.program_id(0) // shares).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    m_s = o_s < s
    o_n, o_w = tl.arange(0, N), tl.arange(0, BLOCK_K // 32)
    p_out += (o_s * shares + i_share)[:, None] * k
    first = i_share * step
    for tile in range(first, tl.minimum(first + step, g * tall * wide)):
        start_i = tile % wide * BLOCK_I
        start_o = tile // wide % tall * BLOCK_O
        i_g = (tile // wide // tall).to(tl.int64)
        if MODE == "matrix":
            o_r, o_c = start_o + o_n // BLOCK_I, start_i + o_n % BLOCK_I
            inside = m_s[:, None] & ((o_r < o) & (o_c < i))[None, :]
            p_grad = p_left + (o_s * left_s)[:, None] + (o_r.to(tl.int64) * left_t + o_c)[None, :]
            grad = tl.load(p_grad, mask=inside, other=0.0).to(tl.float32)
        else:
            o_r, o_c = start_o + tl.arange(0, BLOCK_O), start_i + tl.arange(0, BLOCK_I)
            grad = batch_tile(
                p_left + (o_s * left_s + i_g * left_g)[:, None] + o_r[None, :],
                m_s[:, None] & (o_r < o)[None, :],
                p_right + (o_s * right_s + i_g * right_g)[:, None] + o_c[None, :],
                m_s[:, None] & (o_c < i)[None, :],
                t, left_t, right_t, SAMPLES, BLOCK_O, BLOCK_I, BLOCK_T, IEEE,
            )  # fmt: skip
            grad = tl.reshape(grad, [SAMPLES, N])
        high, middle, low = thirds(grad)
        h = coordinate_hash(i_g * o + start_o + o_n // BLOCK_I, start_i + o_n % BLOCK_I, key0, key1)
        for start_k in range(0, k, BLOCK_K):
            word = finalise(h[:, None] + (start_k // 32 + o_w).to(tl.uint32)[None, :] * 0x85EBCA77)
            sign = spread_signs(word, N, BLOCK_K, tl.bfloat16)
            o_k = start_k + tl.arange(0, BLOCK_K)
            mask = m_s[:, None] & (o_k < k)[None, :]
            acc = tl.load(p_out + o_k[None, :], mask=mask & (tile > first), other=0.0)
            if p_left.dtype.element_ty == tl.float32:
                acc = dot(low, sign, acc, "ieee")
            # Sums of 16-bit products are given 16 bits.
            acc = dot(middle, sign, acc, "ieee")
            acc = dot(high, sign, acc, "ieee")
            tl.store(p_out + o_k[None, :], acc, mask=mask)
        # The next tile reads what other threads of this program may have written.
        tl.debug_barrier()


@jit
def batch_tile(  # type: ignore[no-untyped-def]
    p_left, m_left, p_right, m_right, t, left_t, right_t,
    SAMPLES: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """A tile of G for some samples: pointers to their first token's rows [S, O] and columns."""
    grad = tl.zeros([SAMPLES, BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, t, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < t)[None, :, None]
        b_l = tl.load(
            p_left[:, None, :] + (o_t * left_t)[None, :, None],
            mask=m_left[:, None, :] & m_t, other=0.0,
        )  # fmt: skip
        b_r = tl.load(
            p_right[:, None, :] + (o_t * right_t)[None, :, None],
            mask=m_right[:, None, :] & m_t, other=0.0,
        )  # fmt: skip
        grad = dot(tl.permute(b_l, [0, 2, 1]), b_r, grad, "ieee" if IEEE else "tf32x3")
    return grad


@jit
def k_project_rows(  # type: ignore[no-untyped-def]
    p_index, p_right, p_out, t, i, k, wide, step, shares,
    index_s, index_t, right_s, right_t, key0, key1,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[sample, share] of a table's gradient; program (sample and share, block of outputs).

    Every sample has rows of its own, so there is no matrix product: signs are applied one by one.
    """
    key0, key1 = unpacked(key0), unpacked(key1)
    i_s, i_share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    start_k = tl.program_id(1) * BLOCK_K
    o_w, o_b = start_k // 32 + tl.arange(0, BLOCK_K // 32), tl.arange(0, BLOCK_K) % 32
    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for unit in range(i_share * step, tl.minimum((i_share + 1) * step, t * wide)):
        i_t = (unit // wide).to(tl.int64)
        o_c = unit % wide * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.load(p_index + i_s * index_s + i_t * index_t)
        x = tl.load(p_right + i_s * right_s + i_t * right_t + o_c, mask=o_c < i, other=0.0)
        x = x.to(tl.float32)[:, None]
        h = coordinate_hash(row, o_c, key0, key1)
        word = finalise(h[:, None] + o_w.to(tl.uint32)[None, :] * 0x85EBCA77)
        bit = (spread_words(word, BLOCK_C, BLOCK_K) >> o_b.to(tl.uint32)[None, :]) & 1
        acc += tl.where(bit == 1, x, -x)
    o_k = start_k + tl.arange(0, BLOCK_K)
    p_out += tl.program_id(0).to(tl.int64) * k
    tl.store(p_out + o_k, tl.sum(acc, axis=0), mask=o_k < k)


# Outputs of all shares of a sample: 2 MiB.
SHARES = 1 << 19
_TILE = {"SAMPLES": 16, "BLOCK_O": 16, "BLOCK_I": 16, "BLOCK_T": 16, "BLOCK_K": 64}
_ROWS = Config({"BLOCK_C": 32, "BLOCK_K": 128}, num_warps=4, num_stages=3)
# Estimated, not yet tuned on a device (2026-11-22). float32 is multiplied as such or as three tf32
# products, equally exact: whichever leaves all in registers.
CONFIGS: dict[int, dict[str, Config]] = {
    80: {
        "fp32": Config({**_TILE, "IEEE": 1}, num_warps=8, num_stages=2),
        "16": Config({**_TILE, "IEEE": 0}, num_warps=8, num_stages=2),
        "rows": _ROWS,
    },
    90: {
        "fp32": Config({**_TILE, "BLOCK_K": 32, "IEEE": 0}, num_warps=8, num_stages=2),
        "16": Config({**_TILE, "IEEE": 0}, num_warps=8, num_stages=2),
        "rows": _ROWS,
    },
}


def variants(architecture: int) -> Iterator[Variant]:
    """Return every configuration that may be launched."""
    configs = CONFIGS[max(a for a in CONFIGS if a <= architecture)]
    i32 = "s g t o i k tall wide step shares".split()
    i64 = "left_s left_g left_t right_s right_g right_t index_s index_t key0 key1".split()
    scalars = dict.fromkeys(i32, "i32") | dict.fromkeys(i64, "i64")
    scalars |= {"p_out": "*fp32", "p_index": "*i64"}
    for dtype in ("fp32", "bf16", "fp16"):
        types = scalars | {"p_left": f"*{dtype}", "p_right": f"*{dtype}"}
        for mode in ("pair", "matrix"):
            config = configs["fp32" if dtype == "fp32" else "16"]
            yield variant(f"project_{mode}_{dtype}", k_project, types, config, MODE=mode)
        yield variant(f"project_rows_{dtype}", k_project_rows, types, configs["rows"])
