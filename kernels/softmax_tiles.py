"""The passes over stored logits on a GPU: what `kernels/online_softmax.py` does, in three kernels.

Shapes: n tokens, w classes of a tile, s parts of a tile (or of several), one program each.

    partial sums    one read of the logits; few tokens are split over the classes
    totals          parts merged in their order, and everything that follows from them
    exponentials    one read, one write: E, or the error itself with its seed
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import Config, Variant, jit, tl
from curate.kernels.online_softmax import TokenSums
from curate.kernels.summation import on_device

PARTS = 6  # top, its place, total, squares, spread, the target's logit
TOTALS = 10  # loss, e_y, lse, el2n, entropy, margin, correct, ||p||^2, e.z, scale
# Programs that fill a GPU; fewer tokens than that are split over the classes. A constant, so that
# results do not depend on the device.
_PROGRAMS = 1024


def partial_sums(
    logits: Float[Tensor, "n w"], targets: Int[Tensor, " n"], first: int = 0
) -> Float[Tensor, "s 6 n"]:
    """Return the sums over the classes first, first + 1, ... but the target, of each part."""
    n, w = logits.shape
    config = _config(w)
    tokens, width = config.blocks["BLOCK_N"], config.blocks["BLOCK_V"]
    programs = -(-n // tokens)
    parts = max(1, min(-(-w // width), -(-_PROGRAMS // max(1, programs))))
    split = -(-w // (parts * width)) * width
    parts = -(-w // split)
    out = logits.new_empty(parts, PARTS, n, dtype=torch.float32)
    if n:
        with on_device(logits):
            _partial_sums_kernel[(programs, parts)](
                logits, targets, out, n, w, first, split, logits.stride(0), **config.options
            )
    return out


def totals(
    parts: Float[Tensor, "s 6 n"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "10 n"], Int[Tensor, " n"]]:
    """Return everything that the merged parts say (`TOTALS`), and the arg-max; 0 where ignored."""
    out = parts.new_empty(TOTALS, len(targets))
    index = torch.empty_like(targets)
    if len(targets):
        grid = (-(-len(targets) // _TOTALS.blocks["BLOCK_N"]),)
        with on_device(parts):
            _totals_kernel[grid](
                parts, targets, out, index, len(targets), parts.shape[0], **_TOTALS.options
            )
    return out, index


def exponentials(
    logits: Float[Tensor, "n w"],
    targets: Int[Tensor, " n"],
    shift: Float[Tensor, " n"],
    at_target: Float[Tensor, " n"],
    out: Float[Tensor, "n w"],
    *,
    seed: Float[Tensor, " n"] | None = None,
    first: int = 0,
) -> None:
    """Write exp(z - shift), `at_target` at the target's place, times the seed; 0 where ignored.

    `out` may be `logits` itself.
    """
    n, w = logits.shape
    if not n or not w:
        return
    config = _config(w)
    grid = (-(-n // config.blocks["BLOCK_N"]), -(-w // config.blocks["BLOCK_V"]))
    with on_device(logits):
        _exponentials_kernel[grid](
            logits,
            targets,
            shift,
            at_target,
            shift if seed is None else seed,
            out,
            n,
            w,
            first,
            logits.stride(0),
            out.stride(0),
            HAS_SEED=seed is not None,
            **config.options,
        )


class OnlineSoftmaxKernels:
    """`OnlineSoftmax` on a GPU: E may have 16 bits, and what is one number per token is float32."""

    def __init__(self, targets: Int[Tensor, " n"], weights_dtype: torch.dtype) -> None:
        self._targets = targets
        self._parts: list[Tensor] = []
        self._top = torch.empty(0, device=targets.device)
        # Half precision holds nothing below 6e-8: with E up to 1024 instead of 1, little is lost.
        self._raised = math.log(1024) if weights_dtype == torch.float16 else 0.0

    def add(
        self, z: Float[Tensor, "n w"], weights: Float[Tensor, "n w"], first: int = 0
    ) -> Float[Tensor, " n"] | None:
        """Take in a tile of logits and write its E into `weights`, as `OnlineSoftmax.add` does."""
        parts = partial_sums(z, self._targets, first)
        self._parts.append(parts)
        top, before = parts[:, 0].amax(0), self._top
        is_first = len(self._parts) == 1
        if not is_first:
            top = torch.maximum(top, before)
        shift = top.masked_fill(top == -torch.inf, 0.0)
        self._top = top
        exponentials(z, self._targets, shift - self._raised, shift * 0, weights, first=first)
        return None if is_first else (before - shift).exp_()

    def sums(self) -> tuple[TokenSums, Float[Tensor, " n"]]:
        """Return what the tiles add up to, and the scale of E."""
        out, index = totals(torch.cat(self._parts), self._targets)
        return TokenSums._make((*out[:9], index)), out[9] * math.exp(-self._raised)


@jit
def _partial_sums_kernel(  # type: ignore[no-untyped-def]
    p_z, p_y, p_out, n, w, first, split, stride_z, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_s = tl.program_id(1).to(tl.int64)
    b_y = tl.load(p_y + o_n, mask=o_n < n, other=-100)
    m_n = b_y != -100
    b_y = b_y - first
    p_rows = p_z + o_n * stride_z
    start, stop = i_s * split, tl.minimum((i_s + 1) * split, w)
    # Each lane keeps its own sums: the only reduction of a step is that of the maximum.
    b_tops = tl.full([BLOCK_N, BLOCK_V], -float("inf"), tl.float32)
    b_places = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    b_total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_squares = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_spread = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    for i_v in range(start, stop, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m = m_n[:, None] & (o_v < stop)[None, :] & (o_v[None, :] != b_y[:, None])
        b_z = tl.load(p_rows[:, None] + o_v[None, :], mask=m, other=-float("inf")).to(tl.float32)
        b_places = tl.where(b_z > b_tops, (o_v + first).to(tl.int32)[None, :], b_places)
        b_tops = tl.maximum(b_tops, b_z)
        b_new = tl.max(b_tops, 1)
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_factor = tl.exp(b_top - b_shift)[:, None]
        b_step = tl.where(b_top == -float("inf"), 0.0, b_top - b_shift)[:, None]
        b_x = b_z - b_shift[:, None]
        b_e = tl.exp(b_x)
        # 0 * -inf: a class with probability 0 adds nothing.
        b_spread = b_factor * (b_spread + b_step * b_total) + b_e * tl.maximum(b_x, -1e4)
        b_total = b_factor * b_total + b_e
        b_squares = b_factor * b_factor * b_squares + b_e * b_e
        b_top = b_new
    b_place = tl.min(tl.where(b_tops == b_top[:, None], b_places, 2147483647), 1)
    m_y = m_n & (b_y >= start) & (b_y < stop)
    b_zy = tl.load(p_rows + b_y, mask=m_y, other=-float("inf")).to(tl.float32)
    p_out += i_s * 6 * n + o_n
    tl.store(p_out, b_top, mask=o_n < n)
    tl.store(p_out + n, b_place.to(tl.float32), mask=o_n < n)
    tl.store(p_out + 2 * n, tl.sum(b_total, 1), mask=o_n < n)
    tl.store(p_out + 3 * n, tl.sum(b_squares, 1), mask=o_n < n)
    tl.store(p_out + 4 * n, tl.sum(b_spread, 1), mask=o_n < n)
    tl.store(p_out + 5 * n, b_zy, mask=o_n < n)


@jit
def _totals_kernel(p_parts, p_y, p_out, p_index, n, parts, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_y = tl.load(p_y + o_n, mask=m_n, other=-100)
    m_y = b_y != -100
    b_top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    b_place = tl.zeros([BLOCK_N], tl.float32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    b_squares = tl.zeros([BLOCK_N], tl.float32)
    b_spread = tl.zeros([BLOCK_N], tl.float32)
    b_zy = tl.full([BLOCK_N], -float("inf"), tl.float32)
    p_part = p_parts + o_n
    for _ in range(parts):
        b_other = tl.load(p_part, mask=m_n, other=0.0)
        b_at = tl.load(p_part + n, mask=m_n, other=0.0)
        b_total2 = tl.load(p_part + 2 * n, mask=m_n, other=0.0)
        b_squares2 = tl.load(p_part + 3 * n, mask=m_n, other=0.0)
        b_spread2 = tl.load(p_part + 4 * n, mask=m_n, other=0.0)
        # In one part at most it is there; a maximum would drop NaN.
        b_zy2 = tl.load(p_part + 5 * n, mask=m_n, other=0.0)
        b_zy = tl.where(b_zy2 == -float("inf"), b_zy, b_zy2)
        b_place = tl.where(b_other > b_top, b_at, b_place)
        b_new = tl.maximum(b_top, b_other)
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_step = tl.where(b_top == -float("inf"), 0.0, b_top - b_shift)
        b_step2 = tl.where(b_other == -float("inf"), 0.0, b_other - b_shift)
        b_f, b_f2 = tl.exp(b_top - b_shift), tl.exp(b_other - b_shift)
        p_part += 6 * n
        b_spread = b_f * (b_spread + b_step * b_total) + b_f2 * (b_spread2 + b_step2 * b_total2)
        b_total = b_f * b_total + b_f2 * b_total2
        b_squares = b_f * b_f * b_squares + b_f2 * b_f2 * b_squares2
        b_top = b_new
    b_zy = tl.where(m_y, b_zy, 0.0)
    b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_safe = tl.where(b_total == 0, 1.0, b_total)
    b_rest = tl.where(b_total == 0, -float("inf"), tl.log(b_safe) + b_shift)
    b_gap = b_zy - b_rest
    b_u = tl.exp(-tl.abs(b_gap))
    b_tail = _log1p(b_u)
    b_loss = tl.maximum(-b_gap, 0.0) + b_tail
    b_lse = tl.maximum(b_rest, b_zy) + b_tail
    b_error = -tl.where(b_gap > 0, b_u, 1.0) / (1 + b_u)
    b_p = tl.where(b_gap > 0, 1.0, b_u) / (1 + b_u)
    b_scale = tl.exp(b_shift - b_lse)
    # Scaled before they are squared: the square of 1e-20 is 0.
    b_norm = b_scale * tl.sqrt(b_squares)
    b_large = tl.maximum(b_norm, -b_error)
    b_ratio = tl.minimum(b_norm, -b_error) / tl.where(b_large > 0, b_large, 1.0)
    b_el2n = b_large * tl.sqrt(1 + b_ratio * b_ratio)
    # Two sums of one sign: nothing cancels.
    b_surprise = b_scale * ((b_lse - b_shift) * b_total - b_spread)
    b_entropy = b_surprise + tl.where(b_p > 0, b_p * b_loss, 0.0)
    b_margin = tl.where(b_loss == b_loss, b_zy - b_top, b_loss)  # the maximum drops NaN
    m_first = (b_margin > 0) | ((b_margin == 0) & (b_y < b_place.to(tl.int64)))
    b_aligned = b_scale * b_spread + b_error * (b_zy - b_shift)
    p_out += o_n
    tl.store(p_out, tl.where(m_y, b_loss, 0.0), mask=m_n)
    tl.store(p_out + n, tl.where(m_y, b_error, 0.0), mask=m_n)
    tl.store(p_out + 2 * n, tl.where(m_y, b_lse, 0.0), mask=m_n)
    tl.store(p_out + 3 * n, tl.where(m_y, b_el2n, 0.0), mask=m_n)
    tl.store(p_out + 4 * n, tl.where(m_y, b_entropy, 0.0), mask=m_n)
    tl.store(p_out + 5 * n, tl.where(m_y, b_margin, 0.0), mask=m_n)
    tl.store(p_out + 6 * n, tl.where(m_y & m_first, 1.0, 0.0), mask=m_n)
    tl.store(p_out + 7 * n, tl.where(m_y, b_norm * b_norm + b_p * b_p, 0.0), mask=m_n)
    tl.store(p_out + 8 * n, tl.where(m_y, b_aligned, 0.0), mask=m_n)
    tl.store(p_out + 9 * n, tl.where(m_y, b_scale, 0.0), mask=m_n)
    b_index = tl.where(m_first, b_y, b_place.to(tl.int64))
    tl.store(p_index + o_n, tl.where(m_y, b_index, 0), mask=m_n)


@jit
def _log1p(b_u):  # type: ignore[no-untyped-def]
    """log(1 + u) for u in [0, 1] as 2 atanh(u / (2 + u)), to 2e-9: no logarithm near 1."""
    b_s = b_u / (2 + b_u)
    b_q = b_s * b_s
    b_sum = 1.0 / 13 + b_q * (1.0 / 15)
    b_sum = 1.0 / 7 + b_q * (1.0 / 9 + b_q * (1.0 / 11 + b_q * b_sum))
    return 2 * b_s * (1 + b_q * (1.0 / 3 + b_q * (1.0 / 5 + b_q * b_sum)))


@jit
def _exponentials_kernel(  # type: ignore[no-untyped-def]
    p_z, p_y, p_shift, p_at, p_seed, p_out, n, w, first, stride_z, stride_out,
    HAS_SEED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    b_y = tl.load(p_y + o_n, mask=o_n < n, other=-100)
    m_n = b_y != -100
    m = m_n[:, None] & (o_v < w)[None, :]
    b_shift = tl.load(p_shift + o_n, mask=m_n, other=0.0)
    b_at = tl.load(p_at + o_n, mask=m_n, other=0.0)
    p_block = p_z + o_n[:, None] * stride_z + o_v[None, :]
    b_z = tl.load(p_block, mask=m, other=-float("inf")).to(tl.float32)
    # exp first, scale after: z - lse is at most 0, so nothing overflows.
    b_e = tl.exp(b_z - b_shift[:, None])
    b_e = tl.where(o_v[None, :] + first == b_y[:, None], b_at[:, None], b_e)
    if HAS_SEED:
        b_e = b_e * tl.load(p_seed + o_n, mask=m_n, other=0.0)[:, None]
    b_e = tl.where(m, b_e, 0.0).to(p_out.dtype.element_ty)
    p_block = p_out + o_n[:, None] * stride_out + o_v[None, :]
    tl.store(p_block, b_e, mask=(o_n < n)[:, None] & (o_v < w)[None, :])


# Estimated, not yet tuned on a device (2026-11-22): a row in one program as soon as it fills one.
_CONFIGS = (
    Config({"BLOCK_N": 64, "BLOCK_V": 16}, num_warps=4),
    Config({"BLOCK_N": 16, "BLOCK_V": 128}, num_warps=4),
    Config({"BLOCK_N": 2, "BLOCK_V": 1024}, num_warps=4),
    Config({"BLOCK_N": 1, "BLOCK_V": 2048}, num_warps=8),
)
_TOTALS = Config({"BLOCK_N": 128}, num_warps=4)


def _config(w: int) -> Config:
    """Return the smallest block that holds a row, else the largest."""
    return next((c for c in _CONFIGS if w <= c.blocks["BLOCK_V"]), _CONFIGS[-1])


def variants(architecture: int) -> Iterator[Variant]:
    """Return every configuration; they are the same on all architectures."""
    sizes = {"n": "i32", "w": "i32", "first": "i32"}
    for config in _CONFIGS:
        tail = f"{config.blocks['BLOCK_V']}"
        for dtype in ("fp32", "bf16", "fp16"):
            types = {"p_z": f"*{dtype}", "p_y": "*i64", "p_out": "*fp32", **sizes}
            types |= {"split": "i32", "stride_z": "i32"}
            yield _variant(f"partial_sums_{dtype}_{tail}", _partial_sums_kernel, types, config)
            for source, has_seed in sorted({("fp32", False), ("fp32", True), (dtype, True)}):
                types = {name: "*fp32" for name in ("p_shift", "p_at", "p_seed")}
                types |= {"p_z": f"*{source}", "p_y": "*i64", "p_out": f"*{dtype}", **sizes}
                types |= {"stride_z": "i32", "stride_out": "i32"}
                name = f"exponentials_{source}_{'seed_' if has_seed else ''}{dtype}_{tail}"
                yield _variant(name, _exponentials_kernel, types, config, HAS_SEED=has_seed)
    types = {"p_parts": "*fp32", "p_y": "*i64", "p_out": "*fp32", "p_index": "*i64"}
    yield _variant("totals", _totals_kernel, {**types, "n": "i32", "parts": "i32"}, _TOTALS)


def _variant(
    name: str, kernel: Any, types: dict[str, str], config: Config, **constants: bool
) -> Variant:
    return Variant(
        name, kernel, types, {**config.blocks, **constants}, config.num_warps, config.num_stages
    )
