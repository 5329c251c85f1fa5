"""The sums over a head's classes from hidden states: tiles of logits live in registers only.

Shapes: n tokens, d width, v classes, s parts of the classes, one program each.

A program multiplies a block of tokens with one tile of the vocabulary after another and keeps the
running sums of `kernels/online_softmax.py`; parts are merged in their order by `totals`
(`kernels/softmax_tiles.py`). For the loss and the statistics alone: 2 n v d operations, and n d +
v d elements read (again for every block of tokens that the cache forgets).
"""

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.launch import Config, Variant, architecture, jit, precision, tl
from curate.kernels.online_softmax import OnlineSoftmax
from curate.kernels.softmax_tiles import PARTS
from curate.kernels.summation import dot, on_device, unit_of, wide

# Programs among which the classes are divided, whatever the device.
_PROGRAMS = 1024


def head_partial_sums(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " n"],
) -> Float[Tensor, "s 6 n"]:
    """Return the sums over all classes but the target, in parts, as `partial_sums` does."""
    (n, d), v = hidden.shape, len(weight)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    unit = unit_of(hidden[None, None], weight[None, None])
    config = _config(architecture(hidden.device), hidden.dtype, unit)
    tokens, width = config.blocks["BLOCK_N"], config.blocks["BLOCK_V"]
    programs = -(-n // tokens)
    parts = max(1, min(-(-v // width), -(-_PROGRAMS // max(1, programs))))
    split = -(-v // (parts * width)) * width
    out = hidden.new_empty(-(-v // split), PARTS, n, dtype=torch.float32)
    if n:
        with on_device(hidden):
            _head_partial_sums_kernel[(programs, out.shape[0])](
                hidden,
                weight,
                weight if bias is None else bias.contiguous(),
                targets.contiguous(),
                out,
                n,
                v,
                d // unit,
                split,
                hidden.stride(0) // unit,
                weight.stride(0) // unit,
                UNIT=unit,
                HAS_BIAS=bias is not None,
                PRECISION=precision(hidden),
                **config.options,
            )
    return out


def head_partial_sums_reference(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " n"],
) -> Float[Tensor, "1 6 n"]:
    """Return the same in one part, from stored logits."""
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    online = OnlineSoftmax(targets)
    online.add(z, torch.empty_like(z))
    found = (online.top, online.top_index, online.total, online.squares, online.spread)
    return torch.stack([*(x.float() for x in found), online.target_logit.float()])[None]


@jit
def _head_partial_sums_kernel(  # type: ignore[no-untyped-def]
    p_h, p_w, p_bias, p_y, p_out, n, v, d, split, stride_h, stride_w,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The compiler loads 16 bytes at a time where it sees that rows start at multiples of that.
    d, stride_h, stride_w = d * UNIT, wide(stride_h) * UNIT, wide(stride_w) * UNIT
    # Tokens run fastest: the programs at work at one time read the same rows of the weight.
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_s = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < n
    b_y = tl.load(p_y + o_n, mask=m_n, other=-100)
    start, stop = i_s * split, tl.minimum((i_s + 1) * split, v)
    b_top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    b_place = tl.zeros([BLOCK_N], tl.int32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    b_squares = tl.zeros([BLOCK_N], tl.float32)
    b_spread = tl.zeros([BLOCK_N], tl.float32)
    b_zy = tl.full([BLOCK_N], -float("inf"), tl.float32)
    for i_v in range(start, stop, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < stop
        b_z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        p_left = p_h + o_n[:, None] * stride_h + o_d[None, :]
        p_right = p_w + o_v[None, :] * stride_w + o_d[:, None]
        for i_d in range(0, d, BLOCK_D):
            m_d = o_d < d - i_d
            b_h = tl.load(p_left, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_w = tl.load(p_right, mask=m_v[None, :] & m_d[:, None], other=0.0)
            b_z = dot(b_h, b_w, b_z, PRECISION)
            p_left += BLOCK_D
            p_right += BLOCK_D
        if HAS_BIAS:
            b_z += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
        m_y = (o_v[None, :] == b_y[:, None]) & m_v[None, :]
        # A sum, not a maximum, which would drop NaN.
        b_zy = tl.where(tl.max(m_y.to(tl.int32), 1) > 0, tl.sum(tl.where(m_y, b_z, 0.0), 1), b_zy)
        b_z = tl.where(m_v[None, :] & (m_y == 0), b_z, -float("inf"))
        b_tile = tl.max(b_z, 1)
        b_at = tl.where(b_z == b_tile[:, None], o_v.to(tl.int32)[None, :], 2147483647)
        b_place = tl.where(b_tile > b_top, tl.min(b_at, 1), b_place)
        b_new = tl.maximum(b_top, b_tile)
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_factor = tl.exp(b_top - b_shift)
        b_step = tl.where(b_top == -float("inf"), 0.0, b_top - b_shift)
        b_z = b_z - b_shift[:, None]
        b_e = tl.exp(b_z)
        b_tile_spread = tl.sum(b_e * tl.maximum(b_z, -1e4), 1)  # 0 * -inf counts as 0
        b_spread = b_factor * (b_spread + b_step * b_total) + b_tile_spread
        b_total = b_factor * b_total + tl.sum(b_e, 1)
        b_squares = b_factor * b_factor * b_squares + tl.sum(b_e * b_e, 1)
        b_top = b_new
    p_out += i_s * 6 * n + o_n
    tl.store(p_out, b_top, mask=m_n)
    tl.store(p_out + n, b_place.to(tl.float32), mask=m_n)
    tl.store(p_out + 2 * n, b_total, mask=m_n)
    tl.store(p_out + 3 * n, b_squares, mask=m_n)
    tl.store(p_out + 4 * n, b_spread, mask=m_n)
    tl.store(p_out + 5 * n, b_zy, mask=m_n)


# Estimated, not yet tuned on a device (2026-11-22). float32 is multiplied without tensor cores.

_SMALL = Config({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 16}, num_warps=8, num_stages=2)
CONFIGS: dict[int, dict[int, Config]] = {  # by architecture and bytes of an element
    80: {
        2: Config({"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3),
        4: _SMALL,
    },
    90: {
        2: Config({"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}, num_warps=8, num_stages=4),
        4: _SMALL,
    },
}


def _config(architecture: int, dtype: torch.dtype, unit: int) -> Config:
    """Return the configuration; ragged rows are loaded element by element, in small blocks."""
    if unit == 1:
        return _SMALL
    return CONFIGS[max(a for a in CONFIGS if a <= architecture)][dtype.itemsize]


def variants(architecture: int) -> Iterator[Variant]:
    """Return every configuration of the architecture."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    sizes = dict.fromkeys(("n", "v", "d", "split", "stride_h", "stride_w"), "i32")
    for (name, dtype), unit, has_bias in product(names.items(), (1, 16), (False, True)):
        config = _config(architecture, dtype, unit)
        types = {**dict.fromkeys(("p_h", "p_w", "p_bias"), f"*{name}"), "p_y": "*i64"}
        for how in ("ieee", "tf32") if name == "fp32" else ("tf32",):
            tail = ("_bias" if has_bias else "") + ("_ragged" if unit == 1 else "")
            constants = {"HAS_BIAS": has_bias, "PRECISION": how, "UNIT": unit}
            yield Variant(
                f"head_partial_sums_{name}_{how}{tail}",
                _head_partial_sums_kernel,
                {**types, "p_out": "*fp32", **sizes},
                {**config.blocks, **constants},
                config.num_warps,
                config.num_stages,
            )
