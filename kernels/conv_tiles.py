"""||G||_F^2 of a convolution kernel's gradient from tiles of G in registers.

Shapes: s samples, c input and o output channels, g groups, *x input and *y output positions, t
their product, r = o / g rows and i = c / g * kernel size columns of the matrix of one group.

A program makes a tile of rows and columns of one sample's and one group's G, going through the
positions; the patches are read from the input by their addresses, with zeros for the padding. The
tile is squared and summed in registers: per sample, one number per tile is written. One, two and
three axes are one kernel: missing axes have a single position.
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.conv_geometry import Geometry, matrix_shape
from curate.kernels.launch import Config, Variant, architecture, jit, precision, tl
from curate.kernels.summation import dot, on_device, sum_partials


def conv_sq_norm_tiles(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample, accumulated in float32. Scratch: a number per tile and sample.

    Any strides will do; reading is fastest where positions lie side by side.
    """
    if grad.dtype != input.dtype:
        grad, input = grad.float(), input.float()
    s, groups = len(grad), geometry.groups
    (o, i), axes = matrix_shape(grad, input, geometry), len(geometry.kernel)
    rows = o // groups
    config = _config(architecture(grad.device), grad.dtype, rows, i)
    tiles = [-(-rows // config.blocks["ROWS"]), -(-i // config.blocks["COLUMNS"])]
    partials = torch.empty(s, groups * prod(tiles), dtype=torch.float32, device=grad.device)
    if s == 0 or grad.numel() == 0 or input.numel() == 0:
        return partials.new_zeros(s)
    arguments = {
        "p_grad": grad, "p_input": input, "p_out": partials,
        "rows": rows, "columns": i, "channels": input.shape[1] // groups, "groups": groups,
        "row_tiles": tiles[0], "column_tiles": tiles[1],
        "grad_s": grad.stride(0), "grad_o": grad.stride(1),
        "input_s": input.stride(0), "input_c": input.stride(1),
    }  # fmt: skip
    for axis in range(3):
        own = axis - (3 - axes)  # missing axes come first
        here = own >= 0
        arguments |= {
            f"y{axis}": grad.shape[2 + own] if here else 1,
            f"x{axis}": input.shape[2 + own] if here else 1,
            f"k{axis}": geometry.kernel[own] if here else 1,
            f"stride{axis}": geometry.stride[own] if here else 1,
            f"padding{axis}": geometry.padding[own] if here else 0,
            f"dilation{axis}": geometry.dilation[own] if here else 1,
            f"grad_y{axis}": grad.stride(2 + own) if here else 0,
            f"input_x{axis}": input.stride(2 + own) if here else 0,
        }
    with on_device(grad):
        _tile_kernel[(partials.numel(),)](
            **arguments, AXES=max(2, axes), PRECISION=precision(grad), **config.options
        )
    return sum_partials(partials)


@jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    p_grad, p_input, p_out,
    rows, columns, channels, groups, row_tiles, column_tiles,
    grad_s, grad_o, input_s, input_c,
    y0, y1, y2, x0, x1, x2, k0, k1, k2,
    stride0, stride1, stride2, padding0, padding1, padding2, dilation0, dilation1, dilation2,
    grad_y0, grad_y1, grad_y2, input_x0, input_x1, input_x2,
    AXES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    # Tiles of one sample run next to one another: they read the same input.
    pid = tl.program_id(0)
    i_column = pid % column_tiles
    i_row = (pid // column_tiles) % row_tiles
    i_group = (pid // (column_tiles * row_tiles)) % groups
    i_sample = (pid // (column_tiles * row_tiles * groups)).to(tl.int64)

    o_row = i_row * ROWS + tl.arange(0, ROWS)
    o_column = i_column * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_column = o_row < rows, o_column < columns

    # Addresses are 64 bits to the sample and 32 within it. A column is an input channel and an
    # offset within the kernel: all of an address but what the position adds.
    p_grad += i_sample * grad_s
    p_input += i_sample * input_s
    size = k0 * k1 * k2
    at2 = (o_column % k2) * dilation2 - padding2
    at1 = (o_column // k2 % k1) * dilation1 - padding1
    at0 = (o_column // (k2 * k1) % k0) * dilation0 - padding0
    from_column = (i_group * channels + o_column // size) * input_c + at1 * input_x1
    from_column += at2 * input_x2
    from_row = (i_group * rows + o_row) * grad_o
    if AXES > 2:
        from_column += at0 * input_x0

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    positions = y0 * y1 * y2
    for start in range(0, positions, POSITIONS):
        o_t = start + tl.arange(0, POSITIONS)
        m_t = o_t < positions
        t2, t1 = o_t % y2, o_t // y2 % y1
        o_grad = t1 * grad_y1 + t2 * grad_y2
        o_input = t1 * stride1 * input_x1 + t2 * stride2 * input_x2
        in2 = at2[:, None] + (t2 * stride2)[None, :]
        in1 = at1[:, None] + (t1 * stride1)[None, :]
        m_patch = m_column[:, None] & m_t[None, :] & (in2 >= 0) & (in2 < x2)
        m_patch = m_patch & (in1 >= 0) & (in1 < x1)
        if AXES > 2:
            t0 = o_t // (y2 * y1)
            o_grad += t0 * grad_y0
            o_input += t0 * stride0 * input_x0
            in0 = at0[:, None] + (t0 * stride0)[None, :]
            m_patch = m_patch & (in0 >= 0) & (in0 < x0)
        m_grad = m_row[:, None] & m_t[None, :]
        b_grad = tl.load(p_grad + from_row[:, None] + o_grad[None, :], mask=m_grad, other=0.0)
        p_patch = p_input + from_column[:, None] + o_input[None, :]
        b_patch = tl.load(p_patch, mask=m_patch, other=0.0)
        total = dot(b_grad, tl.trans(b_patch), total, PRECISION)
    tl.store(p_out + pid.to(tl.int64), tl.sum(total * total))


# Block sizes by bytes per element and by the narrower side of a group's matrix. Estimated from
# registers and shared memory, not yet tuned on a device (2026-11-22).
_BLOCKS: Mapping[tuple[int, str], Config] = {
    (4, "wide"): Config({"ROWS": 64, "COLUMNS": 64, "POSITIONS": 32}, 8, 3),
    (4, "thin"): Config({"ROWS": 16, "COLUMNS": 16, "POSITIONS": 64}, 4, 3),
    (2, "wide"): Config({"ROWS": 64, "COLUMNS": 64, "POSITIONS": 32}, 8, 3),
    (2, "thin"): Config({"ROWS": 16, "COLUMNS": 16, "POSITIONS": 64}, 4, 3),
}
CONFIGS = {80: _BLOCKS, 90: _BLOCKS}


def is_addressable(*tensors: Tensor) -> bool:
    """Return whether the kernel can read these: a sample of each within 2^31 elements."""
    return all(
        sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
        < 1 << 31
        for x in tensors
    )


def _config(arch: int, dtype: torch.dtype, rows: int, columns: int) -> Config:
    table = CONFIGS[max(key for key in CONFIGS if key <= arch)]
    return table[dtype.itemsize, "thin" if min(rows, columns) <= 16 else "wide"]


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched."""
    table = CONFIGS[max(key for key in CONFIGS if key <= architecture)]
    scalars = {name: "i32" for name in _tile_kernel.arg_names if not name.isupper()}
    scalars |= {"grad_s": "i64", "input_s": "i64"}
    for dtype, size, how in (
        ("fp32", 4, "ieee"), ("fp32", 4, "tf32"), ("bf16", 2, "tf32"), ("fp16", 2, "tf32"),
    ):  # fmt: skip
        pointers = {"p_grad": f"*{dtype}", "p_input": f"*{dtype}", "p_out": "*fp32"}
        label = "fp32_tf32" if (size, how) == (4, "tf32") else dtype
        for (itemsize, shape), config in table.items():
            for axes in (2, 3) if itemsize == size else ():
                yield Variant(
                    f"conv_tiles_{axes}d_{shape}_{label}",
                    _tile_kernel,
                    scalars | pointers,
                    {"AXES": axes, "PRECISION": how, **config.blocks},
                    config.num_warps,
                    config.num_stages,
                )
