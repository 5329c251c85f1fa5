"""Measure when the Gram form beats the tiles form, and the product form of a dot the tiles form.

    python benchmarks/cost_model.py            on the CPU, one thread, in CPU seconds
    python benchmarks/cost_model.py --device cuda

Both forms are timed on a grid of shapes; the costs of `cheaper_form` (kernels/grad_norm.py) and of
`cheaper_dot_form` (kernels/dot.py) are those that lose least against always taking the faster form.
Printed: each shape with both times, their ratio and what the shipped costs take, what those lose,
and the fitted costs with what they lose. (A GPU's Gram form has one cost, BLOCK_COST_GPU.)
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, log

import checkout  # noqa: F401  (makes curate importable)
import torch
from torch import Tensor

from curate.kernels import dot, grad_norm
from curate.kernels.grad_tiles import grad_sq_norm_tiles, grad_tile_sums

# Elements of the factors in one call: the samples of a batch of that many tokens.
ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
NORM_SHAPES = [
    (t, o, i)
    for t in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    for o, i in ((10, 64), (64, 64), (64, 256), (64, 576), (256, 256), (1024, 256), (768, 768),
                 (768, 3072), (2048, 2048))
]  # fmt: skip
DOT_SHAPES = [
    (t, o, i, m)
    for t in (1, 4, 16, 64, 256)
    for o, i in ((64, 64), (64, 576), (256, 256), (1024, 256), (768, 768))
    for m in (1, 2, 4, 16)
]


@dataclass(frozen=True)
class Timed:
    """Seconds per call of both forms at one shape."""

    shape: tuple[int, ...]
    first: float
    second: float


def main() -> None:
    """Print the tables and the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    norms = list(_norms(device, dtype))
    _report("Gram / tiles", norms, lambda s: grad_norm.cheaper_form(*s[:3], device.type) == "gram")
    if device.type == "cpu":
        _fit_norm(norms)
    else:
        _fit_norm_gpu(norms)
    dots = list(_dots(device, dtype))
    _report(
        "product / tiles",
        dots,
        lambda s: dot.cheaper_dot_form(s[0], s[3], device.type) == "product",
    )
    _fit_dot(dots, device.type)


def _norms(device: torch.device, dtype: torch.dtype) -> Iterator[Timed]:
    for t, o, i in NORM_SHAPES:
        left, right = _factors(t, o, i, device, dtype)
        gram = _seconds(lambda: grad_norm.grad_sq_norm_gram(left, right), device)  # noqa: B023
        tiles = _seconds(lambda: grad_sq_norm_tiles(left, right), device)  # noqa: B023
        yield Timed((t, o, i), gram / len(left), tiles / len(left))


def _dots(device: torch.device, dtype: torch.dtype) -> Iterator[Timed]:
    for t, o, i, m in DOT_SHAPES:
        left, right = _factors(t, o, i, device, dtype)
        v = torch.randn(m, o, i, device=device)
        product = _seconds(lambda: dot.grad_dot_product(left, right, v), device)  # noqa: B023
        tiles = _seconds(lambda: grad_tile_sums(left, right, directions=v), device)  # noqa: B023
        yield Timed((t, o, i, m), product / len(left), tiles / len(left))


def _factors(
    t: int, o: int, i: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    samples = max(1, min(256, ELEMENTS[device.type] // (t * (o + i))))
    return (
        torch.randn(samples, 1, t, o, device=device).to(dtype),
        torch.randn(samples, 1, t, i, device=device).to(dtype),
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least of several calls: of the process's CPU time, or of the GPU's."""
    best = float("inf")
    call()
    for _ in range(4):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            before = time.process_time()
            call()
            best = min(best, time.process_time() - before)
    return best


def _report(title: str, rows: list[Timed], takes_first: Callable[[tuple[int, ...]], bool]) -> None:
    print(f"\n{title}\n{'shape':>24}{'first us':>12}{'second us':>12}{'ratio':>8}  model takes")
    for row in rows:
        first = takes_first(row.shape)
        wrong = "" if first == (row.first <= row.second) else "  (the slower)"
        print(
            f"{row.shape!s:>24}{row.first * 1e6:12.1f}{row.second * 1e6:12.1f}"
            f"{row.first / row.second:8.2f}  {'first' if first else 'second'}{wrong}"
        )
    print(f"loss against the faster form: {_loss(rows, takes_first):.2%} (geometric mean)")


def _loss(rows: list[Timed], takes_first: Callable[[tuple[int, ...]], bool]) -> float:
    losses = [
        log((r.first if takes_first(r.shape) else r.second) / min(r.first, r.second)) for r in rows
    ]
    return exp(sum(losses) / len(losses)) - 1


def _fit_norm(rows: list[Timed]) -> None:
    shares, passes = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0), (0, 2, 4, 8, 16, 32, 64, 128)

    def loss(costs: tuple[float, ...]) -> float:
        return _loss(rows, lambda s: grad_norm.gram_is_cheaper(s[0], s[1], s[2], *costs[:3]))

    best = min(itertools.product(shares, passes, passes), key=loss)
    print(f"fitted COSTS of kernels/grad_norm.py: {best}, loss {loss(best):.2%}")


def _fit_norm_gpu(rows: list[Timed]) -> None:
    shipped, losses = grad_norm.BLOCK_COST_GPU, {}
    for cost in (0, 16, 32, 64, 128, 256, 512, 1024):
        grad_norm.BLOCK_COST_GPU = cost
        losses[cost] = _loss(rows, lambda s: grad_norm.cheaper_form(*s[:3], "cuda") == "gram")
    grad_norm.BLOCK_COST_GPU = shipped
    best = min(losses, key=lambda cost: losses[cost])
    print(f"fitted BLOCK_COST_GPU of kernels/grad_norm.py: {best}, loss {losses[best]:.2%}")


def _fit_dot(rows: list[Timed], device: str) -> None:
    products = (1.0,) if device == "cpu" else (1.0, 2.0, 4.0, 8.0)
    passes = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)

    def loss(costs: tuple[float, ...]) -> float:
        return _loss(rows, lambda s: dot.product_is_cheaper(s[0], s[3], *costs[:3]))

    best = min(itertools.product(products, passes, passes), key=loss)
    print(f"fitted costs of kernels/dot.py: {best}, loss {loss(best):.2%}")


if __name__ == "__main__":
    main()
