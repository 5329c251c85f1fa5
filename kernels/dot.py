"""Inner products of each sample's gradient of a weight matrix with given directions.

Shapes: s samples, g groups, t tokens, o rows and i columns of the matrix within a group, r = g * o
rows in all, m directions of the matrix's shape, *t any axes of tokens, k columns.

    <G, V> = sum_t left_t^T V right_t

Three forms, all exact:
    product    (left V) * right, summed                    m t o i multiplications
    tiles      G made tile by tile (`grad_tiles.py`)       t o i, and m reads of o i numbers
    free       V = W: left . (W right), which the layer has computed already
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels import summation
from curate.kernels.grad_tiles import grad_tile_sums
from curate.kernels.launch import Config, Variant, architecture, jit, precision, tl, uses_triton
from curate.kernels.summation import (
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


def grad_dot(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    directions: Float[Tensor, "m r i"],
) -> Float[Tensor, "s m"]:
    """Return <sum_t left_t right_t^T, V_m> per sample and direction (r = g * o rows).

    Accumulates in float32 (float64 for float64 factors), in the cheaper of two forms. Directions
    count with all their bits (of float32) whatever the dtype of the factors.
    """
    if cheaper_dot_form(left.shape[2], len(directions), left.device.type) == "product":
        return grad_dot_product(left, right, directions)
    dots = grad_tile_sums(left, right, directions=directions).dots
    assert dots is not None
    return dots


# What a direction costs in the product form (per token) and in the tiles form (a pass over V and
# G), and a pass over G: in multiply-adds of a matrix product per element of G. Measured by
# benchmarks/cost_model.py on an AMD EPYC (AVX-512), one thread, float32, 2026-11-22: the form so
# chosen takes 1.9 % longer than the faster one, in the mean over 100 shapes.
COSTS = (1.0, 1.0, 8.0)
# A GPU's: factors of 16 bits take two products of tf32. Estimated, not yet tuned on a device
# (2026-11-22).
COSTS_GPU = (4.0, 128.0, 64.0)


def cheaper_dot_form(t: int, m: int, device: str = "cpu") -> Literal["product", "tiles"]:
    """Return the form that takes less time on a device type ("cpu", "cuda")."""
    costs = COSTS_GPU if device == "cuda" else COSTS
    return "product" if product_is_cheaper(t, m, *costs) else "tiles"


def product_is_cheaper(
    t: int, m: int, product: float, direction_pass: float, tile_pass: float
) -> bool:
    """Return whether the product form of m dots takes less time at these costs."""
    return product * m * t <= t + tile_pass + m * direction_pass


def grad_dot_product(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    directions: Float[Tensor, "m r i"],
) -> Float[Tensor, "s m"]:
    """The product form of `grad_dot`."""
    s, g, t, o = left.shape
    i = right.shape[3]
    if uses_triton(left, right):
        return _launch_product(left, right, directions)
    dtype = torch.promote_types(accumulator(left), accumulator(right))
    v = directions.to(dtype).reshape(len(directions), g, o, i)
    out = torch.zeros(s, len(v), dtype=dtype, device=left.device)
    for rows in chunks(s, g * t * min(o, i), 4 * quick_scratch(left)):
        x, y = (f[rows].to(dtype).transpose(0, 1).flatten(1, 2) for f in (left, right))
        for m in range(len(v)):
            # The smaller side is written, and read again.
            pair = (torch.bmm(x, v[m]), y) if i <= o else (torch.bmm(y, v[m].mT), x)
            out[rows, m] = torch.linalg.vecdot(*pair).view(g, rows.stop - rows.start, t).sum((0, 2))
    return out


def output_dot(
    grad: Float[Tensor, "s *t o"],
    output: Float[Tensor, "s *t o"],
    bias: Float[Tensor, " o"] | None,
) -> Float[Tensor, " s"]:
    """Return <G, W> per sample of a layer output = W a + bias: sum_t grad_t . (output_t - bias).

    No multiplication with W: both are read once.
    """
    s, t, o = len(grad), prod(grad.shape[1:-1]), grad.shape[-1]
    x, y = grad.reshape(s, t, o), output.reshape(s, t, o)
    if uses_triton(x, y):
        return _launch_rows(x, y[None], None, bias).squeeze(1)
    dtype = torch.promote_types(accumulator(grad), accumulator(output))
    out = grad.new_zeros(s, dtype=dtype)
    for rows in chunks(s, t * o):
        value = y[rows].to(dtype)
        out[rows] = inner(x[rows].to(dtype), value if bias is None else value - bias.to(dtype))
    return out


def grad_dot_rows(
    index: Int[Tensor, "s t"], right: Float[Tensor, "s t i"], directions: Float[Tensor, "m r i"]
) -> Float[Tensor, "s m"]:
    """Return <G, V_m> where left_t is the unit vector of row index_t."""
    if uses_triton(right, directions):
        return _launch_rows(right, directions[:, None], index, None)
    r = accumulable(right)
    out = torch.zeros(len(right), len(directions), dtype=r.dtype, device=r.device)
    for rows in chunks(len(r), index.shape[1] * r.shape[2]):
        for m, v in enumerate(directions):
            out[rows, m] = inner(v[index[rows]].to(r.dtype), r[rows])
    return out


def grad_dot_matrix(
    grad: Float[Tensor, "s o i"], directions: Float[Tensor, "m o i"]
) -> Float[Tensor, "s m"]:
    """Return <G, V_m> of gradients that are at hand."""
    return accumulable(grad).flatten(1) @ directions.to(accumulator(grad)).flatten(1).T


def _launch_product(left: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    left, right = addressable(left), addressable(right)
    s, g, t, o = left.shape
    i, m = right.shape[3], len(directions)
    v = directions.to(torch.float32).contiguous()
    config = _table(left)
    tiles = -(-i // config.blocks["BLOCK_I"])
    if 0 in (s, g, t, m):
        return left.new_zeros(s, m, dtype=torch.float32)
    unit = unit_of(left, right)
    sizes = (o, i, *left.stride()[:3], *right.stride()[:3])
    parts = []
    for some in chunks(s, m * g * t * tiles, summation.PARTIALS):
        n = some.stop - some.start
        partials = left.new_empty(m, n, g, t, tiles, dtype=torch.float32)
        blocks = -(-n * t // config.blocks["ROWS"])
        with on_device(left):
            _product_kernel[(blocks * tiles * g * m,)](
                left[some], right[some], v, partials, n, g, t, tiles, blocks,
                *(size // unit for size in sizes),
                UNIT=unit, IS_HALF=left.element_size() == 2, PRECISION=precision(left),
                **config.options,
            )  # fmt: skip
        parts.append(sum_partials(partials.view(m * n, -1)).view(m, n))
    return torch.cat(parts, 1).T.contiguous()


@jit
def _product_kernel(  # type: ignore[no-untyped-def]
    p_left, p_right, p_v, p_out, s, g, t, tiles, blocks, o, i,
    left_s, left_g, left_t, right_s, right_g, right_t,
    UNIT: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(left V) * right, summed over a tile of columns: a number per token, whatever its sample."""
    # Multiplied here, what is a multiple of 16 is known to be: loads are vectors.
    o, i = o * UNIT, i * UNIT
    left_s, left_g, left_t = wide(left_s) * UNIT, wide(left_g) * UNIT, left_t * UNIT
    right_s, right_g, right_t = wide(right_s) * UNIT, wide(right_g) * UNIT, right_t * UNIT
    i_block, i_rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_tile, i_rest = i_rest % tiles, i_rest // tiles
    i_g, i_m = (i_rest % g).to(tl.int64), (i_rest // g).to(tl.int64)
    o_n = i_block * ROWS + tl.arange(0, ROWS)
    m_n = o_n < s * t
    i_s, i_t = (o_n // t).to(tl.int64), (o_n % t).to(tl.int64)
    o_k, o_i = tl.arange(0, BLOCK_K), i_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < i
    p_left += i_g * left_g
    p_v += (i_m * g + i_g) * o * i
    within_left = (i_s * left_s + i_t * left_t)[:, None] + o_k[None, :]
    within_v = o_k[:, None] * i + o_i[None, :]
    product = tl.zeros((ROWS, BLOCK_I), tl.float32)
    for start in range(0, o, BLOCK_K):
        m_k = start + o_k < o
        left = tl.load(p_left + within_left, mask=m_n[:, None] & m_k[None, :], other=0.0)
        v = tl.load(p_v + within_v, mask=m_k[:, None] & m_i[None, :], other=0.0)
        if IS_HALF:
            # 16 bits are exact in tf32, and V is the sum of two such numbers but for its last bits.
            high = (v.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
            left = left.to(tl.float32)
            product = dot(left, high, product, "tf32")
            product = dot(left, v - high, product, "tf32")
        else:
            product = dot(left, v, product, PRECISION)
        p_left += BLOCK_K
        p_v += tl.cast(i, tl.int64) * BLOCK_K
    within_right = (i_s * right_s + i_t * right_t)[:, None] + o_i[None, :]
    right = tl.load(
        p_right + i_g * right_g + within_right, mask=m_n[:, None] & m_i[None, :], other=0.0
    )
    sums = tl.sum(product * right.to(tl.float32), axis=1)
    row = ((i_m * s + i_s) * g + i_g) * t + i_t
    tl.store(p_out + row * tiles + i_tile, sums, mask=m_n)


def _launch_rows(x: Tensor, y: Tensor, index: Tensor | None, bias: Tensor | None) -> Tensor:
    """<x, y_m> per sample, y_m [s t k]; with an index, rows of a table [1 r k]."""
    x, y = addressable(x[None])[0], addressable(y)
    (s, t, k), m = x.shape, len(y)
    if 0 in (s, t, m, k):
        return x.new_zeros(s, m, dtype=torch.float32)
    # Of an indexed table, "sample" is the direction; else there is one direction.
    strides = (*x.stride()[:2], y.stride(1) if index is None else y.stride(0), y.stride(2))
    unit = unit_of(x[None], y)
    out = x.new_empty(m * s, t, dtype=torch.float32)
    with on_device(x):
        _rows_kernel[(-(-s * t // ROWS.blocks["ROWS"]), m)](
            x, y, None if index is None else index.to(torch.int64).contiguous(),
            None if bias is None else bias.to(torch.float32).contiguous(),
            out, s * t, t, *(n // unit for n in (k, *strides)),
            UNIT=unit, GATHERS=index is not None, HAS_BIAS=bias is not None, **ROWS.options,
        )  # fmt: skip
    return sum_partials(out).view(m, s).T.contiguous()


@jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    p_x, p_y, p_index, p_bias, p_out, n, t, k, x_s, x_t, y_s, y_t,
    UNIT: tl.constexpr, GATHERS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x . (y - bias) of a few tokens; with an index, y is the row that it names."""
    k = k * UNIT
    o_n, i_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    m_n = o_n < n
    i_s, i_t = (o_n // t).to(tl.int64), (o_n % t).to(tl.int64)
    row_x = (i_s * x_s + i_t * x_t) * UNIT
    if GATHERS:
        index = tl.load(p_index + o_n, mask=m_n, other=0)
        row_y = (i_m * y_s + index * y_t) * UNIT
    else:
        row_y = (i_s * y_s + i_t * y_t) * UNIT
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mask = m_n[:, None] & (o_k < k)[None, :]
        x = tl.load(p_x + row_x[:, None] + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + row_y[:, None] + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y -= tl.load(p_bias + o_k, mask=o_k < k, other=0.0)[None, :]
        total += x * y
    tl.store(p_out + i_m * n + o_n, tl.sum(total, axis=1), mask=m_n)


# Estimated, not yet tuned on a device (2026-11-22). Keyed by architecture and the bytes of an
# element of the left factor.
CONFIGS: Mapping[int, Mapping[int, Config]] = {
    80: {
        2: Config({"ROWS": 64, "BLOCK_I": 64, "BLOCK_K": 32}, 4, 3),
        4: Config({"ROWS": 64, "BLOCK_I": 64, "BLOCK_K": 16}, 8, 2),
    },
}
ROWS = Config({"ROWS": 4, "BLOCK_K": 256}, 4, 3)


def _table(left: Tensor) -> Config:
    return CONFIGS[_key(architecture(left.device))][left.element_size()]


def _key(architecture: int) -> int:
    return max(a for a in CONFIGS if a <= max(architecture, min(CONFIGS)))


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched on this architecture."""
    kinds = ("bf16", "fp16", "fp32")
    strides = ("left_s", "left_g", "left_t", "right_s", "right_g", "right_t")
    for x, y in ((x, y) for x in kinds for y in kinds):
        config = CONFIGS[_key(architecture)][4 if x == "fp32" else 2]
        for unit in (1, 16):
            types = {"p_left": f"*{x}", "p_right": f"*{y}", "p_v": "*fp32", "p_out": "*fp32"}
            types |= dict.fromkeys(("s", "t", "tiles", "blocks", "o", "i"), "i32")
            types |= dict.fromkeys(strides, "i64")
            constants: dict[str, Any] = {
                "UNIT": unit, "IS_HALF": x != "fp32", "PRECISION": "ieee", "g": 1, **config.blocks
            }  # fmt: skip
            yield Variant(
                f"product_{x}_{y}_{unit}", _product_kernel, types, constants,
                config.num_warps, config.num_stages,
            )  # fmt: skip
            for gathers, biased in ((True, False), (False, True), (False, False)):
                types = {"p_x": f"*{x}", "p_y": f"*{y}", "p_out": "*fp32"}
                types |= dict.fromkeys(("n", "t", "k"), "i32")
                types |= dict.fromkeys(("x_s", "x_t", "y_s", "y_t"), "i64")
                constants = {"UNIT": unit, "GATHERS": gathers, "HAS_BIAS": biased, **ROWS.blocks}
                for name, given, kind in (
                    ("p_index", gathers, "*i64"), ("p_bias", biased, "*fp32"),
                ):  # fmt: skip
                    if given:
                        types[name] = kind
                    else:
                        constants[name] = None
                yield Variant(
                    f"rows_{x}_{y}{'_index' * gathers}{'_bias' * biased}_{unit}", _rows_kernel,
                    types, constants, ROWS.num_warps, ROWS.num_stages,
                )  # fmt: skip
