"""Squared norms where the gradient of a matrix comes from a table look-up.

Shapes: s samples, t look-ups, d the row's size, v the number of rows; u factors of another
gradient of the same matrix (a tied head's tokens).

G = sum_t unit(index_t) right_t^T: rows looked up several times add up before the norm,

    ||G||_F^2 = sum_{t, t'} [index_t = index_t'] right_t . right_t'

No [s, v, d] tensor exists. The Triton form sorts each sample's look-ups, so that equal ones stand
side by side: almost all blocks of pairs (t, t') are then known to be empty and are not visited.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import Config, Variant, jit, precision, tl, uses_triton
from curate.kernels.summation import (
    accumulable,
    accumulator,
    chunks,
    dot,
    inner,
    on_device,
    sum_partials,
)


def embedding_sq_norm(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t d"]
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample: gradients of equal (sample, index) are added, then squared."""
    if uses_triton(index, right):
        return _sq_norm_triton(index, right)
    s = len(right)
    if right.numel() == 0:
        return right.new_zeros(s, dtype=accumulator(right))
    sample, stride = torch.arange(s, device=index.device)[:, None], int(index.max()) + 1
    keys, order = (sample * stride + index).flatten().sort(stable=True)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    # A look-up the other way round: three times as fast as index_add_, which goes row by row.
    rows = accumulable(right).flatten(0, 1)
    sums = F.embedding_bag(order, rows, counts.cumsum(0) - counts, mode="sum")
    squares: Tensor = torch.linalg.vector_norm(sums, dim=1).square_()
    return squares.new_zeros(s).index_add_(0, keys // stride, squares)


def embedding_cross(
    index: Int[Tensor, "s t"],
    right: Float[Tensor, "s t d"],
    other_left: Float[Tensor, "s u v"],
    other_right: Float[Tensor, "s u d"],
) -> Float[Tensor, " s"]:
    """Return <G, sum_u other_left_u other_right_u^T> per sample: the cross term of a tied matrix.

    = sum_{t, u} other_left[u, index_t] (right_t . other_right_u)

    `other_left` is read only at the rows looked up.
    """
    if uses_triton(index, right, other_left, other_right):
        return _cross_triton(index, right, other_left, other_right)
    s, u, _ = other_left.shape
    out = torch.empty(s, dtype=accumulator(right), device=right.device)
    for rows in chunks(s, 2 * u * index.shape[1]):
        at = other_left[rows].gather(2, index[rows, None].expand(-1, u, -1))
        out[rows] = _cross_at(at, right[rows], other_right[rows])
    return out


def embedding_cross_at(
    at: Float[Tensor, "s u t"], right: Float[Tensor, "s t d"], other_right: Float[Tensor, "s u d"]
) -> Float[Tensor, " s"]:
    """Return sum_{t, u} at[u, t] (right_t . other_right_u) per sample.

    That is `embedding_cross` with at = other_left[u, index_t], for a head that never has all of
    other_left.
    """
    if uses_triton(at, right, other_right):
        return _cross_triton(None, right, at, other_right)
    out = torch.empty(len(at), dtype=accumulator(right), device=right.device)
    for rows in chunks(len(at), at.shape[1] * at.shape[2]):
        out[rows] = _cross_at(at[rows], right[rows], other_right[rows])
    return out


def _cross_at(at: Tensor, right: Tensor, other_right: Tensor) -> Tensor:
    products = torch.bmm(accumulable(other_right), accumulable(right).mT)
    return inner(accumulable(at), products)


# -- Triton --------------------------------------------------------------------------------------


def _sq_norm_triton(index: Tensor, right: Tensor) -> Tensor:
    s, t, d = right.shape
    block = _CONFIG.blocks["TOKENS"]
    tiles = -(-t // block)
    partials = torch.empty(s, tiles, dtype=torch.float32, device=right.device)
    if s == 0 or t == 0 or d == 0:
        return partials.new_zeros(s)
    right = right if right.stride(2) == 1 else right.contiguous()
    # `sort` keeps the strides of what it is given.
    index, order = index.contiguous().sort(dim=1, stable=True)
    # A block of pairs is empty once its columns' first look-up is beyond its rows' last.
    last = index[:, torch.arange(1, tiles + 1, device=index.device).mul_(block).clamp_(max=t) - 1]
    stops = torch.searchsorted(index, last.contiguous(), right=True)
    with on_device(right):
        _equal_kernel[(s * tiles,)](
            index, order, stops, right, partials, t, d, tiles,
            index.stride(0), order.stride(0), right.stride(0), right.stride(1),
            PRECISION=precision(right), **_CONFIG.options,
        )  # fmt: skip
    return sum_partials(partials).clamp_(min=0)


@jit
def _equal_kernel(  # type: ignore[no-untyped-def]
    p_index, p_order, p_stops, p_right, p_out, t, d, tiles, index_s, order_s, right_s, right_t,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    # A program takes a block of rows (t) of one sample and goes through the columns (t').
    pid = tl.program_id(0)
    i_row = pid % tiles
    i_s = (pid // tiles).to(tl.int64)
    p_index += i_s * index_s
    p_order += i_s * order_s
    p_right += i_s * right_s
    o_row = i_row * TOKENS + tl.arange(0, TOKENS)
    m_row = o_row < t
    b_row = tl.load(p_index + o_row, mask=m_row, other=0)
    p_row = p_right + tl.load(p_order + o_row, mask=m_row, other=0).to(tl.int64) * right_t
    stop = tl.load(p_stops + pid.to(tl.int64)).to(tl.int32)
    total = tl.zeros((TOKENS,), tl.float32)
    for start in range(i_row * TOKENS, stop, TOKENS):
        o_column = start + tl.arange(0, TOKENS)
        m_column = o_column < t
        b_column = tl.load(p_index + o_column, mask=m_column, other=0)
        at = tl.load(p_order + o_column, mask=m_column, other=0).to(tl.int64)
        p_column = p_right + at * right_t
        products = tl.zeros((TOKENS, TOKENS), tl.float32)
        for first in range(0, d, FEATURES):
            o_d = first + tl.arange(0, FEATURES)
            m_d = (o_d < d)[None, :]
            b_left = tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None] & m_d, other=0.0)
            b_right = tl.load(
                p_column[:, None] + o_d[None, :], mask=m_column[:, None] & m_d, other=0.0
            )
            products = dot(b_left, tl.trans(b_right), products, PRECISION)
        is_equal = (b_row[:, None] == b_column[None, :]) & m_row[:, None] & m_column[None, :]
        found = tl.sum(tl.where(is_equal, products, 0.0), axis=1)
        # Blocks beside the diagonal stand for their mirror images too.
        total += tl.where(start == i_row * TOKENS, 1.0, 2.0) * found
    tl.store(p_out + pid.to(tl.int64), tl.sum(total))


def _cross_triton(index: Tensor | None, right: Tensor, at: Tensor, other_right: Tensor) -> Tensor:
    """Return sum_{t, u} at[u, index_t] (right_t . other_right_u), or with at[u, t]."""
    (s, t, d), u = right.shape, at.shape[1]
    block = _CONFIG.blocks["TOKENS"]
    tiles = -(-t // block), -(-u // block)
    partials = torch.empty(s, tiles[0] * tiles[1], dtype=torch.float32, device=right.device)
    if partials.numel() == 0 or d == 0:
        return partials.new_zeros(s)
    if right.dtype != other_right.dtype:
        right, other_right = right.float(), other_right.float()
    right, other_right = (x if x.stride(2) == 1 else x.contiguous() for x in (right, other_right))
    ids = right if index is None else index
    with on_device(right):
        _cross_kernel[(partials.numel(),)](
            ids, right, at, other_right, partials, t, u, d, *tiles,
            ids.stride(0), ids.stride(1), right.stride(0), right.stride(1),
            *at.stride(), other_right.stride(0), other_right.stride(1),
            LOOKS_UP=index is not None, PRECISION=precision(right), **_CONFIG.options,
        )  # fmt: skip
    return sum_partials(partials)


@jit
def _cross_kernel(  # type: ignore[no-untyped-def]
    p_index, p_right, p_at, p_other, p_out, t, u, d, t_tiles, u_tiles,
    index_s, index_t, right_s, right_t, at_s, at_u, at_v, other_s, other_u,
    LOOKS_UP: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_u = pid % u_tiles
    i_t = pid // u_tiles % t_tiles
    i_s = (pid // (u_tiles * t_tiles)).to(tl.int64)
    o_t = (i_t * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    o_u = (i_u * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    m_t, m_u = o_t < t, o_u < u
    p_row = p_other + i_s * other_s + o_u * other_u
    p_column = p_right + i_s * right_s + o_t * right_t
    products = tl.zeros((TOKENS, TOKENS), tl.float32)
    for first in range(0, d, FEATURES):
        o_d = first + tl.arange(0, FEATURES)
        m_d = (o_d < d)[None, :]
        b_row = tl.load(p_row[:, None] + o_d[None, :], mask=m_u[:, None] & m_d, other=0.0)
        b_column = tl.load(p_column[:, None] + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
        products = dot(b_row, tl.trans(b_column), products, PRECISION)
    at = o_t
    if LOOKS_UP:
        at = tl.load(p_index + i_s * index_s + o_t * index_t, mask=m_t, other=0).to(tl.int64)
    p_error = p_at + i_s * at_s + o_u[:, None] * at_u + at[None, :] * at_v
    b_error = tl.load(p_error, mask=m_u[:, None] & m_t[None, :], other=0.0).to(tl.float32)
    tl.store(p_out + pid.to(tl.int64), tl.sum(products * b_error))


# One configuration for every dtype and GPU. Estimated from registers and shared memory, not yet
# tuned on a device (2026-11-22).
_CONFIG = Config({"TOKENS": 64, "FEATURES": 32}, 8, 3)


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched."""
    for dtype, how in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "tf32"), ("fp16", "tf32")):
        label = f"{dtype}_{how}" if dtype == "fp32" and how == "tf32" else dtype
        block = {**_CONFIG.blocks, "PRECISION": how}
        yield _variant(f"embedding_equal_{label}", _equal_kernel, dtype, block)
        for looks_up in (False, True):
            name = f"embedding_cross{'' if looks_up else '_at'}_{label}"
            flags = {**block, "LOOKS_UP": looks_up}
            yield _variant(name, _cross_kernel, dtype, flags)


def _variant(name: str, kernel: Any, dtype: str, constants: Mapping[str, object]) -> Variant:
    pointers = {"p_index": "*i64", "p_order": "*i64", "p_stops": "*i64", "p_out": "*fp32"}
    pointers |= dict.fromkeys(("p_right", "p_at", "p_other"), f"*{dtype}")
    sizes = dict.fromkeys(("t", "u", "d", "tiles", "t_tiles", "u_tiles"), "i32")
    types = {n: pointers.get(n) or sizes.get(n, "i64") for n in kernel.arg_names if not n.isupper()}
    return Variant(name, kernel, types, constants, _CONFIG.num_warps, _CONFIG.num_stages)
