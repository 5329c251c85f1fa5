"""Sums of elementwise products over tokens or positions: gradients of norms' weights and biases.

Shapes: s samples, t tokens, d features; c channels, p positions.

A norm's weight has the gradient sum_t g_t * xhat_t. The normalised input xhat is made again while
g and x are read, and never stored: on a GPU from each token's mean and scale, found in a pass over
x alone, on a CPU for a few samples at a time.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.launch import Config, Variant, jit, tl, uses_triton
from curate.kernels.summation import accumulable, accumulator, chunks, on_device, sum_partials

# Elements at a time on a CPU, so that what is made of them is still in a cache when it is summed.
TILE = 1 << 19


def token_products(x: Float[Tensor, "s t d"], y: Float[Tensor, "s t d"]) -> Float[Tensor, "s d"]:
    """Return sum_t x * y, accumulated in float32 (float64 for float64 inputs)."""
    if uses_triton(x, y):
        products, _ = _launch_tokens(x, y, None, product=True, sums=False)
        assert products is not None
        return products
    out = x.new_zeros(x.shape[0], x.shape[2], dtype=accumulator(x))
    for part in chunks(len(x), x.shape[1] * x.shape[2], TILE):
        torch.sum(accumulable(x[part]) * accumulable(y[part]), 1, out=out[part])
    return out


def token_sum(x: Float[Tensor, "s t d"]) -> Float[Tensor, "s d"]:
    """Return sum_t x, accumulated in float32 (float64 for float64 inputs)."""
    if uses_triton(x):
        _, sums = _launch_tokens(x, x, None, product=False, sums=True)
        assert sums is not None
        return sums
    return x.sum(1, dtype=accumulator(x))


def norm_products(
    grad: Float[Tensor, "s t d"], input: Float[Tensor, "s t d"], *, eps: float, centred: bool
) -> Float[Tensor, "s d"]:
    """Return sum_t grad * xhat, with xhat = (x - m) / sqrt(var + eps) over d (layer norm).

    Not `centred`: m = 0, and the variance is the mean square (RMS norm).
    """
    if uses_triton(grad, input):
        stats = _launch_statistics(input, eps, centred)
        products, _ = _launch_tokens(grad, input, stats, product=True, sums=False)
        assert products is not None
        return products
    s, t, d = grad.shape
    out = grad.new_zeros(s, d, dtype=accumulator(grad))
    for part in chunks(s, t * d, TILE):
        x = accumulable(input[part])
        if centred:
            x = x - x.mean(2, keepdim=True)
        scale = (torch.linalg.vecdot(x, x) / d + eps).rsqrt_()
        out[part] = torch.bmm(scale[:, None], x * accumulable(grad[part]))[:, 0]
    return out


def channel_products(
    x: Float[Tensor, "s c p"], y: Float[Tensor, "s c p"], mean: Float[Tensor, " c"] | None = None
) -> Float[Tensor, "s c"]:
    """Return sum_p (x - mean) * y, accumulated in float32 (float64 for float64 inputs).

    The mean is taken off before the product: x may be far from zero, and its sum with y small.
    """
    if uses_triton(x, y):
        return _launch_channels(x, y, mean, product=True)
    out = x.new_zeros(x.shape[:2], dtype=accumulator(x))
    for part in chunks(len(x), x.shape[1] * x.shape[2], TILE):
        a, b = accumulable(x[part]), accumulable(y[part])
        product = a * b if mean is None else (a - mean.to(a.dtype)[:, None]).mul_(b)
        torch.sum(product, 2, out=out[part])
    return out


def channel_sum(x: Float[Tensor, "s c p"]) -> Float[Tensor, "s c"]:
    """Return sum_p x, accumulated in float32 (float64 for float64 inputs)."""
    if uses_triton(x):
        return _launch_channels(x, x, None, product=False)
    return x.sum(2, dtype=accumulator(x))


# -- Triton --------------------------------------------------------------------------------------

Statistics = tuple[Float[Tensor, "s t"], Float[Tensor, "s t"]]
"""Each token's mean and scale, 1 / sqrt(var + eps)."""


def _launch_tokens(
    x: Tensor, y: Tensor, stats: Statistics | None, *, product: bool, sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return sum x * yhat, and sum x, of which only those asked for are made."""
    s, t, d = x.shape
    x, y = _alike(x, y)
    blocks = _TOKENS.blocks
    runs = -(-t // _RUN)
    partials = [
        torch.empty(s, d, runs, dtype=torch.float32, device=x.device) if wanted else None
        for wanted in (product, sums)
    ]
    some = next(p for p in partials if p is not None)
    mean, scale = stats or (some, some)
    if some.numel():
        grid = (s * -(-d // blocks["FEATURES"]) * runs,)
        with on_device(x):
            _token_kernel[grid](
                x, y, mean, scale, *(some if p is None else p for p in partials),
                t, d, runs, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
                RUN=_RUN, PRODUCT=product, NORMALISED=stats is not None, SUMS=sums,
                **_TOKENS.options,
            )  # fmt: skip
    found = [None if p is None else sum_partials(p.flatten(0, 1)).view(s, d) for p in partials]
    return found[0], found[1]


@jit
def _token_kernel(  # type: ignore[no-untyped-def]
    p_x, p_y, p_mean, p_scale, p_products, p_sums,
    t, d, runs, x_s, x_t, y_s, y_t,
    RUN: tl.constexpr, PRODUCT: tl.constexpr, NORMALISED: tl.constexpr, SUMS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(d, FEATURES)
    i_run = pid % runs
    i_tile = pid // runs % tiles
    i_s = (pid // (runs * tiles)).to(tl.int64)
    o_d = i_tile * FEATURES + tl.arange(0, FEATURES)
    m_d = o_d < d
    products = tl.zeros((TOKENS, FEATURES), tl.float32)
    sums = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(i_run * RUN, min(i_run * RUN + RUN, t), TOKENS):
        o_t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        m_t = o_t < t
        mask = m_t[:, None] & m_d[None, :]
        p_block = p_x + i_s * x_s + o_t[:, None] * x_t + o_d[None, :]
        b_x = tl.load(p_block, mask=mask, other=0.0).to(tl.float32)
        if SUMS:
            sums += b_x
        if PRODUCT:
            p_block = p_y + i_s * y_s + o_t[:, None] * y_t + o_d[None, :]
            b_y = tl.load(p_block, mask=mask, other=0.0).to(tl.float32)
            if NORMALISED:
                b_mean = tl.load(p_mean + i_s * t + o_t, mask=m_t, other=0.0)
                b_scale = tl.load(p_scale + i_s * t + o_t, mask=m_t, other=0.0)
                b_y = (b_y - b_mean[:, None]) * b_scale[:, None]
            products += b_x * b_y
    at = (i_s * d + o_d) * runs + i_run
    if PRODUCT:
        tl.store(p_products + at, tl.sum(products, axis=0), mask=m_d)
    if SUMS:
        tl.store(p_sums + at, tl.sum(sums, axis=0), mask=m_d)


def _launch_statistics(x: Tensor, eps: float, centred: bool) -> Statistics:
    s, t, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    mean, scale = (torch.empty(s, t, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        grid = (-(-s * t // _STATISTICS.blocks["ROWS"]),)
        with on_device(x):
            _statistics_kernel[grid](
                x, mean, scale, s * t, t, d, eps, x.stride(0), x.stride(1),
                CENTRED=centred, **_STATISTICS.options,
            )  # fmt: skip
    return mean, scale


@jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    p_x, p_mean, p_scale, rows, t, d, eps, x_s, x_t,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    p_row = p_x + (o_row // t) * x_s + (o_row % t) * x_t
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTRED:
        total = tl.zeros((ROWS, FEATURES), tl.float32)
        for start in range(0, d, FEATURES):
            o_d = start + tl.arange(0, FEATURES)
            mask = m_row[:, None] & (o_d < d)[None, :]
            total += tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / d
    squares = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, d, FEATURES):  # a second read, from the cache: no cancellation
        o_d = start + tl.arange(0, FEATURES)
        mask = m_row[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_row[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = tl.where(mask, b_x - mean[:, None], 0.0)
        squares += b_x * b_x
    scale = 1 / tl.sqrt(tl.sum(squares, axis=1) / d + eps)
    tl.store(p_mean + o_row, mean, mask=m_row)
    tl.store(p_scale + o_row, scale, mask=m_row)


def _launch_channels(x: Tensor, y: Tensor, mean: Tensor | None, *, product: bool) -> Tensor:
    s, c, p = x.shape
    if x.dtype != y.dtype:
        x, y = x.float(), y.float()
    out = torch.empty(s, c, dtype=torch.float32, device=x.device)
    if p == 0:
        return out.zero_()
    if out.numel():
        grid = (-(-s * c // _CHANNELS.blocks["ROWS"]),)
        with on_device(x):
            _channel_kernel[grid](
                x, y, out if mean is None else mean.float().contiguous(), out, s * c, c, p,
                *x.stride(), *y.stride(), PRODUCT=product, CENTRED=mean is not None,
                **_CHANNELS.options,
            )  # fmt: skip
    return out


@jit
def _channel_kernel(  # type: ignore[no-untyped-def]
    p_x, p_y, p_mean, p_out, rows, c, p, x_s, x_c, x_p, y_s, y_c, y_p,
    PRODUCT: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_s, o_c = o_row // c, o_row % c
    p_x += o_s * x_s + o_c * x_c
    p_y += o_s * y_s + o_c * y_c
    total = tl.zeros((ROWS, POSITIONS), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTRED:
        mean = tl.load(p_mean + o_c, mask=m_row, other=0.0)
    for start in range(0, p, POSITIONS):
        o_p = (start + tl.arange(0, POSITIONS)).to(tl.int64)
        mask = m_row[:, None] & (o_p < p)[None, :]
        b_x = tl.load(p_x[:, None] + o_p[None, :] * x_p, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            b_x = b_x - mean[:, None]
        if PRODUCT:
            b_x *= tl.load(p_y[:, None] + o_p[None, :] * y_p, mask=mask, other=0.0).to(tl.float32)
        total += b_x
    tl.store(p_out + o_row, tl.sum(total, axis=1), mask=m_row)


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype, features side by side."""
    if x.dtype != y.dtype:
        x, y = x.float(), y.float()
    return (
        x if x.stride(2) == 1 else x.contiguous(),
        y if y.stride(2) == 1 else y.contiguous(),
    )


# Reading is all that these kernels do: 16 KiB in flight per program. One configuration for every
# GPU; estimated, not yet tuned on a device (2026-11-22).
_RUN = 512
_TOKENS = Config({"TOKENS": 16, "FEATURES": 128}, 4, 3)
_STATISTICS = Config({"ROWS": 4, "FEATURES": 512}, 4, 3)
_CHANNELS = Config({"ROWS": 4, "POSITIONS": 256}, 4, 3)


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched."""
    for dtype in ("fp32", "bf16", "fp16"):
        for name, flags in {
            "products": (True, False, False), "sum": (False, False, True),
            "norm": (True, True, False),
        }.items():  # fmt: skip
            constants = dict(zip(("PRODUCT", "NORMALISED", "SUMS"), flags, strict=True))
            yield _variant(
                f"token_{name}_{dtype}", _token_kernel, dtype, constants | {"RUN": _RUN}, _TOKENS
            )
        for name, centred in {"layer": True, "rms": False}.items():
            yield _variant(
                f"{name}_statistics_{dtype}",
                _statistics_kernel,
                dtype,
                {"CENTRED": centred},
                _STATISTICS,
            )
        for name, product, centred in (
            ("products", True, False), ("centred_products", True, True), ("sum", False, False),
        ):  # fmt: skip
            constants = {"PRODUCT": product, "CENTRED": centred}
            yield _variant(f"channel_{name}_{dtype}", _channel_kernel, dtype, constants, _CHANNELS)


def _variant(
    name: str, kernel: Any, dtype: str, constants: Mapping[str, object], config: Config
) -> Variant:
    inputs = {"p_x", "p_y"}
    sizes = {"t", "d", "runs", "c", "p", "rows"}
    types = {}
    for argument in kernel.arg_names:
        if argument in inputs:
            types[argument] = f"*{dtype}"
        elif argument.startswith("p_"):
            types[argument] = "*fp32"
        elif argument == "eps":
            types[argument] = "fp32"
        elif not argument.isupper():
            types[argument] = "i32" if argument in sizes else "i64"
    blocks = {**constants, **config.blocks}
    return Variant(name, kernel, types, blocks, config.num_warps, config.num_stages)
