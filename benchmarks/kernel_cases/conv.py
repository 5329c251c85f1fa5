"""Squared norms, sketches and both of convolution kernels' per-sample gradients.

Shapes: S images, C input and O output channels, N x N pixels, a K x K kernel of stride P.
"""

from collections.abc import Callable

import torch
from kernel_cases.case import Case, Inputs
from torch import Tensor

from curate.kernels.conv import Geometry, conv_matrix, conv_sketch, conv_sq_norm, conv_sums
from curate.kernels.rademacher import stream_key
from curate.kernels.sketch import sketch_matrix

_KEYS = stream_key(0, "conv", "rows"), stream_key(0, "conv", "columns")
_K = 32, 32
# (S, C, O, N, K, P, groups, fits a CPU): the small ResNet of benchmarks/engine.py; ResNet-18 and
# -50 on 224 x 224; a ResNeXt and a MobileNet layer.
_SHAPES = [
    (64, 3, 32, 32, 3, 1, 1, True), (64, 32, 32, 32, 3, 1, 1, True),
    (64, 32, 64, 32, 3, 2, 1, True), (64, 64, 64, 16, 3, 1, 1, True),
    (64, 128, 128, 8, 3, 1, 1, True), (64, 64, 128, 16, 1, 2, 1, True),
    (16, 64, 64, 56, 3, 1, 1, True), (16, 256, 256, 14, 3, 1, 1, True),
    (16, 512, 512, 7, 3, 1, 1, True), (256, 64, 256, 56, 1, 1, 1, False),
    (256, 64, 64, 56, 3, 1, 1, False), (256, 256, 256, 14, 3, 1, 1, False),
    (256, 512, 512, 7, 3, 1, 1, False), (64, 128, 128, 28, 3, 1, 32, False),
    (64, 128, 128, 28, 3, 1, 128, False),
]  # fmt: skip


def _plain(geometry: Geometry, square: bool, sketch: bool) -> Callable[..., Tensor]:
    def run(grad: Tensor, input: Tensor) -> Tensor:
        matrix = conv_matrix(grad, input, geometry)
        found = []
        if square:
            found.append(matrix.square().sum((1, 2))[:, None])
        if sketch:
            found.append(sketch_matrix(matrix, _KEYS, _K))
        return torch.cat(found, 1).squeeze(1)

    return run


def _both(geometry: Geometry) -> Callable[..., Tensor]:
    def run(grad: Tensor, input: Tensor) -> Tensor:
        found = conv_sums(grad, input, geometry, square=True, sketch=(_KEYS, _K))
        assert found.sq_norm is not None and found.sketch is not None
        return torch.cat([found.sq_norm[:, None], found.sketch], 1)

    return run


def _cases(
    s: int, c: int, o: int, n: int, k: int, p: int, groups: int, is_small: bool
) -> list[Case]:
    """Count the fewest multiplications of the forms: G, or the Gram matrices of pixels; the sketch
    from G, or from a convolution with the signs."""
    geometry = Geometry((k, k), (p, p), (k // 2, k // 2), (1, 1), groups)
    side = (n + 2 * (k // 2) - k) // p + 1
    t, i = side * side, c // groups * k * k

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        make = torch.Generator(device).manual_seed(s + c + o + n)
        sizes = (s, o, side, side), (s, c, n, n)
        return tuple(torch.randn(size, generator=make, device=device).to(dtype) for size in sizes)

    matrix = 2 * s * t * o * i
    phases = min(k, p) ** 2
    pixels = n * n // (p * p)
    gram = 2 * s * (t * t * o + phases * pixels * pixels * c)
    of_matrix = 2 * s * (o * i * _K[1] + o * _K[0] * _K[1])
    projected = 2 * s * t * (groups * i * _K[1] + o * _K[0] + groups * _K[0] * _K[1])
    counts = {
        "sq_norm": min(matrix, gram),
        "sketch": min(matrix + of_matrix, projected),
        "sums": min(matrix + min(of_matrix, projected), gram + projected),
    }
    runs: dict[str, Callable[..., Tensor]] = {
        "sq_norm": lambda grad, input: conv_sq_norm(grad, input, geometry),
        "sketch": lambda grad, input: conv_sketch(grad, input, geometry, _KEYS, _K),
        "sums": _both(geometry),
    }
    return [
        Case(
            op=f"conv_{name}",
            shape=f"S={s} C={c} O={o} N={n} K={k} P={p}" + (f" g={groups}" if groups > 1 else ""),
            inputs=inputs,
            run=run,
            plain=_plain(geometry, name != "sketch", name != "sq_norm"),
            flops=counts[name],
            elements=s * (o * t + c * n * n),
            is_small=is_small,
        )
        for name, run in runs.items()
    ]


CASES = [case for shape in _SHAPES for case in _cases(*shape)]
