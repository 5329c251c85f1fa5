"""Each sample's gradient of a convolution kernel: its squared norm, its sketch, inner products.

Shapes: s samples, c input and o output channels, g groups, *x input and *y output positions, t
their product, i = c / g * kernel size the columns of the matrix [o, i] that the kernel is, m
directions.

G = sum_t left_t right_t^T with right_t the patch that position t reads. Patches are k^d times as
large as the input, so they are made of a few samples at a time, or not at all. The forms:

    gram        the norm from the products of pixels, added along diagonals (conv_gram.py)
    matrix      G of a few samples at a time, while it is in the cache: by the convolution's own
                backward pass, the samples side by side as groups, or from patches
    projected   the sketch from a convolution with the signs; G is never made
    tiles       Triton: tiles of G in registers, patches read by their addresses (conv_tiles.py)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import grad as conv_grad

from curate.kernels.conv_geometry import Geometry, matrix_shape, split, unfold
from curate.kernels.conv_gram import conv_sq_norm_gram
from curate.kernels.conv_tiles import conv_sq_norm_tiles, is_addressable
from curate.kernels.launch import precision, uses_triton
from curate.kernels.rademacher import Key, signs
from curate.kernels.summation import accumulable, accumulator, inner

__all__ = [
    "ConvSums", "Geometry", "conv_dot", "conv_matrix", "conv_sketch", "conv_sq_norm", "conv_sums",
    "split", "unfold",
]  # fmt: skip

# Elements of G at a time. Measured on an AMD EPYC (AVX-512, 1 MiB of L2), 2026-11: beyond a core's
# cache the grouped backward pass of oneDNN is two to four times slower, and so it is for one or
# two samples at a time.
TILE = 5 << 16
# Elements of patches at a time.
PATCHES = 1 << 20
_CONVOLUTION: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHT_GRADIENT: dict[int, Any] = {
    1: conv_grad.conv1d_weight,
    2: conv_grad.conv2d_weight,
    3: conv_grad.conv3d_weight,
}


class ConvSums(NamedTuple):
    """What was asked for of G."""

    sq_norm: Float[Tensor, " s"] | None
    sketch: Float[Tensor, "s kk"] | None


def conv_sums(
    grad: Float[Tensor, "s o *y"],
    input: Float[Tensor, "s c *x"],
    geometry: Geometry,
    *,
    square: bool,
    sketch: tuple[tuple[Key, Key], tuple[int, int]] | None,
) -> ConvSums:
    """Return ||G||_F^2 and the sketch of G per sample, as asked, in the cheapest way to both.

    `sketch` is (the streams of rows and columns, (k_o, k_i)); it comes flattened, as `sketch` does
    of a linear layer's gradient. Accumulates in float32 (float64 for float64 inputs). Scratch: TILE
    elements of G, a Gram matrix of as many, or the projections [s, k, t].
    """
    s, o, dtype = len(grad), grad.shape[1], accumulator(grad)
    if s == 0 or grad.numel() == 0 or input.numel() == 0:
        return ConvSums(
            grad.new_zeros(s, dtype=dtype) if square else None,
            grad.new_zeros(s, prod(sketch[1]), dtype=dtype) if sketch else None,
        )
    way = _cheapest(grad, input, geometry, square, sketch[1] if sketch else None)
    sq_norm = grad.new_empty(s, dtype=dtype) if way.norm == "matrix" else None
    if way.norm == "gram":
        sq_norm = conv_sq_norm_gram(grad, input, geometry)
    elif way.norm == "tiles":
        sq_norm = conv_sq_norm_tiles(grad, input, geometry)
    sketched: Tensor | None = None
    if sketch is not None:
        (keys, k), (_, i) = sketch, matrix_shape(grad, input, geometry)
        rows, columns = (
            signs(key, torch.arange(n, device=grad.device), size, dtype=dtype)
            for key, n, size in zip(keys, (o, i), k, strict=True)
        )
        if way.sketch == "projected":
            sketched = _projected(grad, input, geometry, rows, columns)
        else:
            sketched = grad.new_empty(s, prod(k), dtype=dtype)
    if "matrix" in (way.norm, way.sketch):
        for part, matrix in _matrices(grad, input, geometry, way.matrix):
            if way.norm == "matrix":
                assert sq_norm is not None
                sq_norm[part] = inner(matrix, matrix)
            if way.sketch == "matrix":
                assert sketched is not None
                sketched[part] = (rows.T @ (matrix @ columns)).flatten(1)
    return ConvSums(sq_norm, None if sketched is None else sketched / sqrt(sketched.shape[1]))


def conv_sq_norm(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample; see `conv_sums`."""
    sq_norm = conv_sums(grad, input, geometry, square=True, sketch=None).sq_norm
    assert sq_norm is not None
    return sq_norm


def conv_sketch(
    grad: Float[Tensor, "s o *y"],
    input: Float[Tensor, "s c *x"],
    geometry: Geometry,
    keys: tuple[Key, Key],
    k: tuple[int, int],
) -> Float[Tensor, "s kk"]:
    """Return the flattened k_o x k_i sketch of G; see `conv_sums`."""
    sketch = conv_sums(grad, input, geometry, square=False, sketch=(keys, k)).sketch
    assert sketch is not None
    return sketch


def conv_dot(
    grad: Float[Tensor, "s o *y"],
    input: Float[Tensor, "s c *x"],
    geometry: Geometry,
    directions: Float[Tensor, "m o i"],
) -> Float[Tensor, "s m"]:
    """Return <G, V_m> per sample, from G or as <grad, input convolved with V_m>."""
    m, s = len(directions), len(grad)
    v = directions.to(accumulator(grad))
    if m == 0 or grad.numel() == 0 or input.numel() == 0:
        return v.new_zeros(s, m)
    out = v.new_empty(s, m)
    costs = _Costs.of(grad, input, geometry, (0, 0))
    if costs.matrix + m * costs.elements < m * costs.convolved and not grad.is_cuda:
        for part, matrix in _matrices(grad, input, geometry, costs.cheaper_matrix):
            out[part] = matrix.flatten(1) @ v.flatten(1).T
        return out
    x, left = accumulable(input), accumulable(grad)
    kernels = v.view(m, -1, x.shape[1] // geometry.groups, *geometry.kernel)
    for direction, kernel in enumerate(kernels):
        out[:, direction] = inner(left, _convolve(x, kernel, geometry, precision(grad)))
    return out


def conv_matrix(
    grad: Float[Tensor, "s o *y"], input: Float[Tensor, "s c *x"], geometry: Geometry
) -> Float[Tensor, "s o i"]:
    """Return G itself of a few samples: one backward pass with the samples as groups."""
    samples, rows = grad.shape[:2]
    groups = samples * geometry.groups
    shape = samples * rows, input.shape[1] // geometry.groups, *geometry.kernel
    weight: Tensor = _WEIGHT_GRADIENT[len(geometry.kernel)](
        accumulable(input).reshape(1, -1, *input.shape[2:]), shape,
        accumulable(grad).reshape(1, -1, *grad.shape[2:]),
        geometry.stride, geometry.padding, geometry.dilation, groups,
    )  # fmt: skip
    return weight.reshape(samples, rows, -1)


def _patch_matrix(grad: Tensor, input: Tensor, geometry: Geometry) -> Float[Tensor, "s o i"]:
    """Return G itself of a few samples, from their patches."""
    # The wider side of a product is the rows' in BLAS's terms: patches first.
    patches = unfold(accumulable(input), geometry).mT
    return (patches @ split(accumulable(grad), geometry)).mT.flatten(1, 2)


def _matrices(
    grad: Tensor, input: Tensor, geometry: Geometry, form: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield G a few samples at a time, and which they are."""
    o, i = matrix_shape(grad, input, geometry)
    make, step = conv_matrix, TILE // max(1, o * i)
    if form == "patches":
        patches = i * geometry.groups * prod(grad.shape[2:])
        make, step = _patch_matrix, min(step, PATCHES // max(1, patches))
    count = -(-len(grad) // max(1, step))
    bounds = [len(grad) * n // count for n in range(count + 1)]  # none much smaller than the rest
    for first, last in pairwise(bounds):
        part = slice(first, last)
        yield part, make(grad[part], input[part], geometry)


def _projected(
    grad: Tensor, input: Tensor, geometry: Geometry, rows: Tensor, columns: Tensor
) -> Float[Tensor, "s kk"]:
    """Return S_o^T G S_i = sum_t (S_o^T left_t)(S_i^T right_t)^T, without G or patches."""
    s, groups, n = len(grad), geometry.groups, len(geometry.kernel)
    k_i = columns.shape[1]
    wide = columns.T.reshape(k_i, -1, *geometry.kernel).repeat(groups, *[1] * (n + 1))
    # A group's outputs are summed over on their own: its positions pair with its own patches.
    tall = rows.view(groups, -1, rows.shape[1]).mT.reshape(-1, grad.shape[1] // groups, *[1] * n)
    point = Geometry((1,) * n, (1,) * n, (0,) * n, (1,) * n, groups)
    # 16-bit inputs and signs are exact in tf32.
    how = precision(grad)
    right = _convolve(accumulable(input), wide, geometry, how)
    left = _convolve(accumulable(grad), tall, point, how)
    products = left.reshape(s * groups, rows.shape[1], -1) @ (right.reshape(s * groups, k_i, -1).mT)
    return products.view(s, groups, -1).sum(1)


def _convolve(x: Tensor, kernel: Tensor, geometry: Geometry, how: str) -> Tensor:
    """Return the convolution, on a GPU in tf32 only if `how` says so, and the same in every run."""
    convolve = _CONVOLUTION[len(geometry.kernel)]
    rest = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    out: Tensor
    if not x.is_cuda:
        out = convolve(x, kernel, None, *rest)
        return out
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=how == "tf32"
    ):
        out = convolve(x, kernel, None, *rest)
    return out


# -- which form ----------------------------------------------------------------------------------


class _Way(NamedTuple):
    norm: str | None
    sketch: str | None
    matrix: str


def _cheapest(
    grad: Tensor, input: Tensor, geometry: Geometry, square: bool, k: tuple[int, int] | None
) -> _Way:
    costs = _Costs.of(grad, input, geometry, k or (0, 0))
    if uses_triton(grad, input) and is_addressable(grad, input):  # nothing is written per sample
        norm = "gram" if costs.gram_beats_tiles else "tiles"
        return _Way(norm if square else None, "projected" if k else None, "")
    norms: dict[str | None, float] = {None: 0}
    if square:
        norms = {"gram": costs.gram, "matrix": 2 * costs.elements}
    sketches: dict[str | None, float] = {None: 0}
    if k:
        sketches = {"projected": costs.projected, "matrix": costs.from_matrix}
    ways = {
        _Way(norm, sketch, costs.cheaper_matrix): norms[norm]
        + sketches[sketch]
        + costs.matrix * ("matrix" in (norm, sketch))
        for norm in norms
        for sketch in sketches
    }
    return min(ways, key=ways.__getitem__)


@dataclass(frozen=True)
class _Costs:
    """What each form costs per sample, in multiply-adds of MKL's batched matrix product.

    The constants are fits to one thread of an AMD EPYC (AVX-512), 2026-11-22, where that product
    ran at 42 multiply-adds per nanosecond (MKL takes its AVX2 path there) and a convolution of
    oneDNN at up to twice as many.
    """

    elements: int
    gram: int | float
    grouped: int | float
    patches: int | float
    projected: int | float
    from_matrix: int | float
    convolved: int | float
    tiles: int | float
    is_half: bool

    @classmethod
    def of(cls, grad: Tensor, input: Tensor, geometry: Geometry, k: tuple[int, int]) -> "_Costs":
        t, groups = prod(grad.shape[2:]), geometry.groups
        (o, i), size = matrix_shape(grad, input, geometry), prod(geometry.kernel)
        rows, channels = o // groups, i // size
        # Pixels of one phase of the stride, and how many phases the kernel reads.
        pixels = prod(input.shape[2:]) / prod(geometry.stride)
        phases = prod(min(a, b) for a, b in zip(geometry.kernel, geometry.stride, strict=True))
        gram = t * t * (rows + 5 * sum(geometry.kernel)) + phases * pixels * pixels * channels
        if rows == channels == 1:  # depthwise: oneDNN has kernels of its own for 3 x 3
            grouped = float(groups * t * i * (5 if max(geometry.kernel) <= 3 else 26))
        else:  # vectors of 16 channels, and G is written and summed over once
            grouped = groups * max(rows, 16) * max(channels, 16) * size * (t / 2 + 30)
        # A 1 x 1 kernel's patches are its input, unless it skips some of it.
        is_input = size == 1 and prod(geometry.stride) == 1 and not any(geometry.padding)
        return cls(
            elements=o * i,
            gram=groups * gram,
            grouped=grouped,
            patches=t * i * (o + (0 if is_input else 20 * groups)),
            projected=t * groups * (0.4 * max(channels, 16) * size * k[1] + k[0] * k[1])
            + t * o * k[0],
            from_matrix=o * i * k[1] + o * k[0] * k[1],
            convolved=t * o * (0.4 * max(channels, 16) * size + 2),
            tiles=t * o * i,
            is_half=grad.element_size() == 2,
        )

    @property
    def matrix(self) -> int | float:
        return min(self.grouped, self.patches)

    @property
    def cheaper_matrix(self) -> str:
        return "patches" if self.patches < self.grouped else "grouped"

    @property
    def gram_beats_tiles(self) -> bool:
        """On a GPU. Tensor cores multiply 16 bits about eight times as fast as float32."""
        return self.gram * (8 if self.is_half else 1) < self.tiles
