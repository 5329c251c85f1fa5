"""How the kernels of gradients add up: in which dtype, in how much scratch, in which order.

Shapes: s samples, n rows of p partial sums each.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.launch import HAS_TRITON, IS_INTERPRETED, Variant, jit, tl, uses_triton

# Elements of scratch at a time: 4 Mi float32 = 16 MiB.
SCRATCH = 1 << 22
# Elements that stay in a core's cache: twice as many are slower, and far more are memory that the
# system hands out anew each time. Measured on an AMD EPYC, one thread, 2026-11-22.
CACHED = 1 << 18
# Partial sums that a kernel writes at a time: 64 Mi float32 = 256 MiB.
PARTIALS = 1 << 26


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over x are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulable(x: Tensor) -> Tensor:
    """Return x in the dtype its sums are taken in."""
    return x.to(accumulator(x))


def chunks(count: int, cost: int, budget: int | None = None) -> list[slice]:
    """Return slices of range(count) that keep count * cost elements within a budget (SCRATCH)."""
    step = max(1, (SCRATCH if budget is None else budget) // max(1, cost))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


def quick_scratch(x: Tensor) -> int:
    """Return the elements of scratch to work in where x is: a core's cache, or a GPU's SCRATCH."""
    return SCRATCH if x.is_cuda else min(SCRATCH, CACHED)


def inner(x: Float[Tensor, "s ..."], y: Float[Tensor, "s ..."]) -> Float[Tensor, " s"]:
    """Return the inner product of each sample's tensors; of a tensor with itself in one read.

    Along the last axis first, then over the rest: one dot product over millions of elements would
    lose three digits in float32, since BLAS adds them up one after another.
    """
    if x is y:
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norms.square_().flatten(1).sum(1)
    along: Tensor = torch.linalg.vecdot(x, y)
    return along.flatten(1).sum(1)


def addressable(x: Float[Tensor, "s g t k"]) -> Float[Tensor, "s g t k"]:
    """Return x as the kernels read it: rows unbroken, a block of 128 of them within 2^31 elements.

    Copied only where it is not so, such as a transposed view.
    """
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on x's GPU, be it the current one or not."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def unit_of(*tensors: Float[Tensor, "..."]) -> int:
    """Return 16 where every row starts and ends on a multiple of 16 elements, else 1."""
    is_aligned = all(
        x.data_ptr() % 16 == 0 and not any(n % 16 for n in (x.shape[-1], *x.stride()[:-1]))
        for x in tensors
    )
    return 16 if is_aligned else 1


def sum_partials(partials: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """Return the sum of each row, in an order that neither n nor zeros at a row's end change.

    So a sample has the same bits alone, in any batch, and beside longer ones. (The order of
    `torch.sum` on a GPU depends on both sizes.)
    """
    n, p = partials.shape
    if p == 0:
        return partials.new_zeros(n)
    if p == 1:
        return partials[:, 0]
    if not uses_triton(partials):
        return partials.sum(1)
    partials = partials.contiguous()
    out = partials.new_empty(n)
    if n:
        with on_device(partials):
            grid = (-(-n // _BLOCKS["ROWS"]),)
            _sum_kernel[grid](partials, out, n, p, **_BLOCKS, num_warps=4)
    return out


@jit
def dot(x, y, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + x @ y in float32; blocks of two dtypes are multiplied as float32."""
    # The interpreter multiplies the bits of bfloat16 as integers (Triton 3.7).
    if _INTERPRETED or x.dtype != y.dtype:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision=PRECISION)


@jit
def wide(n):  # type: ignore[no-untyped-def]
    """A size or stride as 64 bits: an argument that fits into 32 has 32, but not its multiples."""
    return tl.cast(n, tl.int64)


_INTERPRETED = tl.constexpr(IS_INTERPRETED) if HAS_TRITON else None


@jit
def _sum_kernel(p_in, p_out, n, p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    p_rows = p_in + o_n.to(tl.int64)[:, None] * p
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, p, COLUMNS):
        o_p = start + tl.arange(0, COLUMNS)
        mask = (o_n[:, None] < n) & (o_p[None, :] < p)
        total += tl.load(p_rows + o_p[None, :], mask=mask, other=0.0)
    tl.store(p_out + o_n, tl.sum(total, axis=1), mask=o_n < n)


# One configuration for all: another would add up in another order.
_BLOCKS = {"ROWS": 4, "COLUMNS": 256}


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched."""
    types = {"p_in": "*fp32", "p_out": "*fp32", "n": "i32", "p": "i32"}
    yield Variant("sum", _sum_kernel, types, _BLOCKS)
