"""One-sided sparse Johnson-Lindenstrauss projection of each sample's whole gradient.

Shapes as in `kernels/sketch.py`. Every coordinate (r, c) of the matrix goes, with a sign of its
own, to one of k outputs (k a power of two), which stand in k_r rows and k_c columns:

    k_c = 2^ceil(log2(k) / 2),  k_r = k / k_c;  tile (p, q) = (r // k_r, c // k_c)
    output(r, c) = ((r mod k_r) k_c + c mod k_c) XOR (word(p, q, 1) mod k)
    sign(r, c)   = bit c mod 32 of word(r, c // 32, 0)

with the words of stream (seed, name, "sparse") of `kernels/rademacher.py`. With z `nonzeros` per
coordinate, z such maps, the m-th of words 2m and 2m + 1, are added up and divided by sqrt(z).

Unbiased, and no worse than dense signs: let x and y be two gradients. Signs are independent, so
E<Sx, Sy> = <x, y>, and Var = sum over pairs a != b of P(output_a = output_b) (x_a^2 y_b^2 +
x_a y_a x_b y_b). Outputs within a tile differ. Those of two tiles meet with probability 1 / k, for
the words are uniform and independent. If X_t = |x_t|^2, Y_t = |y_t|^2, Z_t = <x_t, y_t>,
    Var = sum_{t != u} (X_t Y_u + Z_t Z_u) / k <= (|x|^2 |y|^2 + <x, y>^2) / k.
With z maps, products of two different maps have mean 0 and bring (1 - 1/z) of the same bound.

A tile is a block of G, so a program that wants its outputs in place reads the rows of left and the
columns of right in the order that the XOR says: the sum over tokens is a matrix product, and each
tile of G is added to the same k registers. Nothing is stored, nothing is scattered. A column-major
order of the outputs, or XOR by rows alone, would not do: tiles of one row of tiles would meet with
probability 1 / k_c.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from curate.kernels.launch import Config, Variant, architecture, jit, tl, uses_triton
from curate.kernels.rademacher import (
    Key,
    sign_words,
    signs_of_words,
    spread_words,
    thirds,
    unpacked,
    words,
)
from curate.kernels.sketch import add_partials, alike, rows_contiguous, variant
from curate.kernels.summation import accumulable, accumulator, dot

MOST_OUTPUTS = 1 << 14
# Elements of G at a time in the torch form. On an AMD EPYC, 2026-11, a quarter of them takes 1.7
# times as long in calls, twice as many in cache misses.
TILE = 1 << 20


def sparse_project(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    key: Key,
    k: int,
    nonzeros: int = 1,
) -> Float[Tensor, "s k"]:
    """Return the projection of sum_t left_t right_t^T, of g * o rows; a tile of G at a time.

    float32, or float64 for float64 inputs. More nonzeros take as many times longer on a GPU; they
    do not lower the variance's bound, only the odds that one heavy coordinate meets another.

    Raises:
        ValueError: k is no power of two up to 16384, or nonzeros is not positive.
    """
    _check(k, nonzeros)
    left, right = alike(left, right)
    if uses_triton(left, right) and _is_countable(left.shape[1] * left.shape[3], right, k):
        return _launch("pair", left, right, key, k, nonzeros)
    s, g, _, o = left.shape
    i = right.shape[3]
    out = left.new_zeros(s, k, dtype=accumulator(left))
    for samples in _steps(s, 64):
        width = samples.stop - samples.start
        left_s, right_s = accumulable(left[samples]), accumulable(right[samples])
        for columns in _steps(i, 1024):
            for group in range(g):
                for rows in _steps(o, max(1, TILE // (width * (columns.stop - columns.start)))):
                    grad = torch.bmm(left_s[:, group, :, rows].mT, right_s[:, group, :, columns])
                    r = _range(rows, out.device) + group * o
                    _scatter(out[samples], grad, r, columns, key, nonzeros)
    return out


def sparse_project_rows(
    index: Int[Tensor, "s t"],
    right: Float[Tensor, "s t i"],
    key: Key,
    k: int,
    nonzeros: int = 1,
) -> Float[Tensor, "s k"]:
    """Return the projection where left_t is the unit vector of row index_t (embeddings)."""
    _check(k, nonzeros)
    if uses_triton(right):
        return _launch("rows", index.long()[:, None, :, None], right[:, None], key, k, nonzeros)
    s, t, i = right.shape
    out = right.new_zeros(s, k, dtype=accumulator(right))
    for tokens in _steps(t, max(1, TILE // max(1, s * i))):
        values = accumulable(right[:, tokens])
        _scatter(out, values, index[:, tokens].flatten(), slice(0, i), key, nonzeros)
    return out


def sparse_project_matrix(
    grad: Float[Tensor, "s o i"], key: Key, k: int, nonzeros: int = 1
) -> Float[Tensor, "s k"]:
    """Return the projection of gradients that are at hand; a vector counts as one row."""
    _check(k, nonzeros)
    if uses_triton(grad) and _is_countable(grad.shape[1], grad, k):
        return _launch("matrix", grad[:, None], grad[:, None], key, k, nonzeros)
    s, o, i = grad.shape
    out = grad.new_zeros(s, k, dtype=accumulator(grad))
    for columns in _steps(i, 4096):
        for rows in _steps(o, max(1, TILE // max(1, s * (columns.stop - columns.start)))):
            tile = accumulable(grad[:, rows, columns])
            _scatter(out, tile, _range(rows, out.device), columns, key, nonzeros)
    return out


def block_shape(k: int) -> tuple[int, int]:
    """Return (k_r, k_c): 2048 is 32 x 64, 4096 is 64 x 64."""
    log = k.bit_length() - 1
    return 1 << log // 2, 1 << (log + 1) // 2


def places(
    rows: Int[Tensor, " n"], columns: slice, key: Key, k: int, map: int, dtype: torch.dtype
) -> tuple[Int64[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Return the output and the sign of coordinates (row, column) in one of the maps."""
    k_r, k_c = block_shape(k)
    c = _range(columns, rows.device)
    every = torch.arange(columns.start // 32, (columns.stop + 31) // 32, device=rows.device)
    word = words(key, every, 2 * map, rows=rows[:, None])
    skipped = columns.start % 32
    sign = signs_of_words(word, dtype)[:, skipped : skipped + len(c)]
    tiles = torch.arange(columns.start // k_c, (columns.stop - 1) // k_c + 1, device=rows.device)
    shift = words(key, tiles, 2 * map + 1, rows=(rows // k_r)[:, None]).long() & (k - 1)
    at = (rows % k_r * k_c)[:, None] + c % k_c
    return at ^ shift[:, c // k_c - columns.start // k_c], sign


def _scatter(
    out: Float[Tensor, "s k"],
    values: Float[Tensor, "s r c"],
    rows: Int[Tensor, " n"],
    columns: slice,
    key: Key,
    nonzeros: int,
) -> None:
    """Add the values of some coordinates; `rows` are those of all samples, or of each in turn.

    Measured on an AMD EPYC, 2026-11: a scatter into 8 KB of outputs takes 0.4 ns per value. A
    gather by output, samples innermost, is five times as fast, but wants a transposed copy that
    costs more.
    """
    if values.numel() == 0:
        return
    k = out.shape[1]
    for map in range(nonzeros):
        at, sign = places(rows, columns, key, k, map, values.dtype)
        signed = values.flatten(1) * sign.reshape(-1, values[0].numel()) / math.sqrt(nonzeros)
        out.scatter_add_(1, at.reshape(-1, values[0].numel()).expand_as(signed), signed)


def _range(part: slice, device: torch.device) -> Int64[Tensor, " n"]:
    return torch.arange(part.start, part.stop, device=device)


def _steps(count: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


def _check(k: int, nonzeros: int) -> None:
    if not 1 <= k <= MOST_OUTPUTS or k & (k - 1):
        raise ValueError(f"a sparse projection has 1, 2, 4 … {MOST_OUTPUTS} outputs, not {k}")
    if nonzeros < 1:
        raise ValueError(f"a coordinate goes to 1 output at least, not to {nonzeros}")


def _is_countable(rows: int, right: Tensor, k: int) -> bool:
    """Return whether 32 bits number the tiles: not those of one output in a matrix of 2^31."""
    k_r, k_c = block_shape(k)
    return (2 * rows // k_r + 1) * (right.shape[-1] // k_c + 1) < 1 << 31


def _launch(
    mode: Literal["pair", "rows", "matrix"],
    left: Tensor,
    right: Tensor,
    key: Key,
    k: int,
    nonzeros: int,
) -> Float[Tensor, "s k"]:
    """Launch one program per sample and share of the tiles.

    The shares depend on the shape of one sample and on k alone, so a sample's bits do not depend on
    its batch. `left` is [s, g, t, o], in mode rows the row numbers [s, 1, t, 1], in mode matrix the
    gradient [s, 1, o, i].
    """
    s, g, t, o = left.shape
    i = right.shape[3]
    if left.numel() == 0 or right.numel() == 0:
        return right.new_zeros(s, k, dtype=torch.float32)
    left, right = rows_contiguous(left), rows_contiguous(right)
    k_r, k_c = block_shape(k)
    table = CONFIGS[max(a for a in CONFIGS if a <= architecture(right.device))]
    config = table[right.dtype == torch.float32, min(4096, max(256, k))]
    height = {"pair": o, "rows": config.blocks["BLOCK_T"], "matrix": t}[mode]
    if mode == "rows":  # tiles of tokens, not of rows
        tall = -(-t // height)
    else:  # a group may begin in the middle of a tile
        tall = -(-height // k_r) + (g > 1)
    wide = -(-i // k_c)
    tiles = g * tall * wide
    shares = max(1, min(tiles, SHARES // k))
    step = -(-tiles // shares)
    shares = -(-tiles // step)
    out = torch.empty(s, shares, k, dtype=torch.float32, device=right.device)
    with torch.cuda.device_of(right):  # type: ignore[no-untyped-call]
        blocks = -(-k_r // config.blocks["KR"]) * -(-k_c // config.blocks["KC"])
        k_sparse[(s * shares, blocks)](
            left, right, out, g, t, o if mode == "pair" else height, i, k, tall, wide, step, shares,
            nonzeros, k_r.bit_length() - 1, k_c.bit_length() - 1,
            *left.stride()[:3], *right.stride()[:3], *key.arguments, MODE=mode, **config.options,
        )  # fmt: skip
    return add_partials(out) / math.sqrt(nonzeros)


@jit
def k_sparse(  # type: ignore[no-untyped-def]
    p_left, p_right, p_out, g, t, o, i, k, tall, wide, step, shares, nonzeros, log_r, log_c,
    left_s, left_g, left_t, right_s, right_g, right_t, key0, key1,
    MODE: tl.constexpr, KR: tl.constexpr, KC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out[sample, share] = the projection of a share of the tiles, a row of tiles after another.

    Program (sample and share, block of KR x KC outputs); k_r is 2^log_r and k_c 2^log_c.
    """
    key0, key1 = unpacked(key0), unpacked(key1)
    i_s, i_share = (tl.program_id(0) // shares).to(tl.int64), tl.program_id(0) % shares
    p_left += i_s * left_s
    p_right += i_s * right_s
    k_r, k_c = 1 << log_r, 1 << log_c
    across = tl.cdiv(k_c, KC)
    first_u, first_v = tl.program_id(1) // across * KR, tl.program_id(1) % across * KC
    o_u, o_v = first_u + tl.arange(0, KR), first_v + tl.arange(0, KC)
    o_w = first_v // 32 + tl.arange(0, KC // 32 if KC > 32 else 1)
    acc = tl.zeros([KR, KC], tl.float32)
    for tile in range(i_share * step, tl.minimum((i_share + 1) * step, g * tall * wide)):
        q = tile % wide
        i_row = tile // wide % tall
        i_g = (tile // wide // tall).to(tl.int64)
        for m in range(nonzeros):
            # A tensor in the interpreter too, where m is a plain number.
            first = q * 0 + 2 * m
            if MODE == "rows":
                acc += rows_tile(
                    p_left, p_right, t, i, k, i_row, q, first, log_r, log_c, left_t, right_t,
                    o_u, o_v, o_w, key0, key1, KR, KC, BLOCK_T,
                )  # fmt: skip
            else:
                p = (i_g * o >> log_r) + i_row
                shift = sign_words(p, q, first + 1, key0, key1).to(tl.int32) & (k - 1)
                h_r, h_c = shift >> log_c, shift & (k_c - 1)
                o_r = (p << log_r) + (o_u ^ h_r)
                o_c = (q << log_c) + (o_v ^ h_c)
                m_r = (o_u < k_r) & (o_r >= i_g * o) & (o_r < (i_g + 1) * o)
                m_c = (o_v < k_c) & (o_c < i)
                if MODE == "matrix":
                    mask = m_r[:, None] & m_c[None, :]
                    grad = tl.load(
                        p_left + o_r.to(tl.int64)[:, None] * left_t + o_c[None, :],
                        mask=mask, other=0.0,
                    ).to(tl.float32)  # fmt: skip
                else:
                    grad = pair_tile(
                        p_left + i_g * left_g + (o_r - i_g * o), m_r,
                        p_right + i_g * right_g + o_c, m_c, t, left_t, right_t, KR, KC, BLOCK_T,
                    )  # fmt: skip
                # Which 32 columns a word serves is moved by the XOR as the columns are.
                o_word = ((q << log_c) >> 5) + (o_w ^ (h_c >> 5))
                word = sign_words(o_r[:, None], o_word[None, :], first, key0, key1)
                bit = (spread_words(word, KR, KC) >> (o_c % 32).to(tl.uint32)[None, :]) & 1
                acc += tl.where(bit == 1, grad, -grad)
    p_out += tl.program_id(0).to(tl.int64) * k
    mask = (o_u < k_r)[:, None] & (o_v < k_c)[None, :]
    tl.store(p_out + o_u[:, None] * k_c + o_v[None, :], acc, mask=mask)


@jit
def pair_tile(  # type: ignore[no-untyped-def]
    p_left, m_r, p_right, m_c, t, left_t, right_t,
    KR: tl.constexpr, KC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Some rows and columns of G: pointers to the first token's [KR] and [KC]."""
    grad = tl.zeros([KR, KC], tl.float32)
    for start in range(0, t, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = (o_t < t)[:, None]
        b_l = tl.load(p_left[None, :] + (o_t * left_t)[:, None], mask=m_t & m_r[None, :], other=0.0)
        o_right = (o_t * right_t)[:, None]
        b_r = tl.load(p_right[None, :] + o_right, mask=m_t & m_c[None, :], other=0.0)
        # For float32: three tf32 products, as exact as float32 itself, on tensor cores.
        grad = dot(tl.trans(b_l), b_r, grad, "tf32x3")
    return grad


@jit
def rows_tile(  # type: ignore[no-untyped-def]
    p_index, p_right, t, i, k, i_block, q, first, log_r, log_c, left_t, right_t,
    o_u, o_v, o_w, key0, key1,
    KR: tl.constexpr, KC: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What a block of tokens brings to the columns of tiles q, every token to its own row."""
    o_t = i_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.load(p_index + o_t * left_t, mask=o_t < t, other=0)
    shift = sign_words(row >> log_r, q, first + 1, key0, key1).to(tl.int32) & (k - 1)
    h_r, h_c = shift >> log_c, shift & ((1 << log_c) - 1)
    o_c = (q << log_c) + (o_v[None, :] ^ h_c[:, None])
    mask = (o_t < t)[:, None] & (o_v < (1 << log_c))[None, :] & (o_c < i)
    x = tl.load(p_right + (o_t * right_t)[:, None] + o_c, mask=mask, other=0.0)
    o_word = ((q << log_c) >> 5) + (o_w[None, :] ^ (h_c >> 5)[:, None])
    word = sign_words(row[:, None], o_word, first, key0, key1)
    bit = (spread_words(word, BLOCK_T, KC) >> (o_c % 32).to(tl.uint32)) & 1
    x = tl.where(bit == 1, x.to(tl.float32), -x.to(tl.float32)).to(x.dtype)
    # A product with ones and zeros puts each token into its row, and adds up those that meet.
    u = (row & ((1 << log_r) - 1)).to(tl.int32) ^ h_r
    ones = tl.where(o_u[:, None] == u[None, :], 1.0, 0.0)
    total = tl.zeros([KR, KC], tl.float32)
    if x.dtype == tl.float32:
        high, middle, low = thirds(x)
        total = dot(ones.to(tl.bfloat16), low, total, "ieee")
        total = dot(ones.to(tl.bfloat16), middle, total, "ieee")
        total = dot(ones.to(tl.bfloat16), high, total, "ieee")
    else:
        total = dot(ones.to(x.dtype), x, total, "ieee")
    return total


# Outputs of all shares of a sample: 1 MiB.
SHARES = 1 << 18
# Estimated, not yet tuned on a device (2026-11-22). By whether inputs are 32 bits, and by the
# outputs a program holds: blocks of at least 16 x 16, where k is less than 256, at most 64 x 64.
# None spills under Triton 3.6 (sm_90) or 3.7.
CONFIGS: dict[int, dict[tuple[bool, int], Config]] = {
    80: {
        (is_32, k): Config(
            {"KR": block_shape(k)[0], "KC": block_shape(k)[1], "BLOCK_T": block_t},
            num_warps=num_warps,
            num_stages=3,
        )
        for is_32, k, block_t, num_warps in (
            (False, 256, 16, 4), (False, 512, 64, 8), (False, 1024, 16, 4),
            (False, 2048, 32, 4), (False, 4096, 32, 8),
            (True, 256, 16, 8), (True, 512, 16, 8), (True, 1024, 16, 8),
            (True, 2048, 16, 4), (True, 4096, 16, 8),
        )
    },
}  # fmt: skip
CONFIGS[90] = CONFIGS[80]


def variants(architecture: int) -> Iterator[Variant]:
    """Return every configuration that may be launched."""
    arch = max(a for a in CONFIGS if a <= architecture)
    i32 = "g t o i k tall wide step shares nonzeros log_r log_c".split()
    i64 = "left_s left_g left_t right_s right_g right_t key0 key1".split()
    scalars = dict.fromkeys(i32, "i32") | dict.fromkeys(i64, "i64")
    for (is_32, k), config in CONFIGS[arch].items():
        for mode in ("pair", "rows", "matrix"):
            for dtype in ("fp32",) if is_32 else ("bf16", "fp16"):
                left = "i64" if mode == "rows" else dtype
                pointers = {"p_left": f"*{left}", "p_right": f"*{dtype}", "p_out": "*fp32"}
                name = f"sparse_{mode}_{dtype}_{k}"
                yield variant(name, k_sparse, pointers | scalars, config, MODE=mode)
