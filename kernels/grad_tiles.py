"""Squared norm, weighted squared norm and dots of each sample's matrix gradient, tile by tile.

Shapes: s samples, g groups (of a grouped convolution, else 1), t tokens, o rows and i columns of
the matrix within a group, r = g * o rows in all, m directions; n tokens of all samples end to end.
A sample has the gradient G_g = sum_t left_gt right_gt^T; G is those of the groups, one above
another.

One pass makes G a tile at a time, on chip, and takes from it whatever is asked:

    square    sum G^2            weighted    sum W G^2            dots    sum G V_m

which costs t o i multiplications and reads the factors once; no G is written to memory. Beyond
that, W and V are read once per sample, mostly from the cache.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels import summation
from curate.kernels.launch import Config, Variant, architecture, jit, precision, tl, uses_triton
from curate.kernels.summation import (
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


class TileSums(NamedTuple):
    """What was asked of each sample's gradient; None where it was not."""

    square: Float[Tensor, " s"] | None
    """||G||^2"""
    weighted: Float[Tensor, " s"] | None
    """sum W * G^2"""
    dots: Float[Tensor, "s m"] | None
    """<G, V_m>"""


def grad_tile_sums(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    *,
    square: bool = False,
    weight: Float[Tensor, "r c"] | None = None,
    directions: Float[Tensor, "m r c"] | None = None,
) -> TileSums:
    """Return what is asked of each sample's gradient, the factors read once for all of it.

    Accumulates in float32 (float64 for float64 factors). Scratch on a GPU: a number per sample,
    tile of G and quantity.
    """
    _check(left.shape[1] * left.shape[3], right.shape[3], weight, directions)
    if not uses_triton(left, right):
        return _tile_sums_torch(left, right, square, weight, directions)
    return _launch(left, right, None, square, weight, directions)


def grad_tile_sums_packed(
    left: Float[Tensor, "n o"],
    right: Float[Tensor, "n i"],
    starts: Int[Tensor, " e"],
    *,
    square: bool = False,
    weight: Float[Tensor, "o i"] | None = None,
    directions: Float[Tensor, "m o i"] | None = None,
) -> TileSums:
    """Return the same for samples of any lengths: tokens starts[s] to starts[s + 1] are sample s's.

    No work is done for padding, and none is needed. `starts` rises from 0 to n.
    """
    _check(left.shape[1], right.shape[1], weight, directions)
    if uses_triton(left, right):
        spans = spans_of(starts.to(left.device))
        return _launch(left[None, None], right[None, None], spans, square, weight, directions)
    samples, m = len(starts) - 1, 0 if directions is None else len(directions)
    dtype = torch.promote_types(accumulator(left), accumulator(right))
    sizes = {"square": (samples,), "weighted": (samples,), "dots": (samples, m)}
    asked = square, weight is not None, directions is not None
    out = TileSums(
        *(
            left.new_zeros(sizes[f], dtype=dtype) if a else None
            for f, a in zip(sizes, asked, strict=True)
        )
    )
    for rows, x, y in by_length(left, right, starts):
        part = _tile_sums_torch(x, y, square, weight, directions)
        for whole, some in zip(out, part, strict=True):
            if whole is not None and some is not None:
                whole[rows] = some
    return out


def grad_sq_norm_tiles(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"]
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 per sample in the direct form: G is made, tile by tile."""
    sums = grad_tile_sums(left, right, square=True)
    assert sums.square is not None
    return sums.square


def grad_weighted_sq_norm(
    left: Float[Tensor, "s g t o"], right: Float[Tensor, "s g t i"], weight: Float[Tensor, "r c"]
) -> Float[Tensor, " s"]:
    """Return sum W * G^2 per sample, elementwise (Adam's second moment: W = 1 / (sqrt(v) + eps)^2).

    W may have any sign; nothing is clamped.
    """
    sums = grad_tile_sums(left, right, weight=weight)
    assert sums.weighted is not None
    return sums.weighted


def rotated_sq_norm(
    left: Float[Tensor, "s g t o"],
    right: Float[Tensor, "s g t i"],
    left_basis: Float[Tensor, "o o"],
    right_basis: Float[Tensor, "i i"],
    weight: Float[Tensor, "r i"],
) -> Float[Tensor, " s"]:
    """Return sum W * (Q_o^T G Q_i)^2 per sample, elementwise.

    EK-FAC self-influence for W = 1 / (lambda + damping), the bases holding eigenvectors in their
    columns (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296).
    Rotates the factors, t (o^2 + i^2) multiplications, in the wider of the dtypes.
    """
    turned = []
    for x, basis in ((left, left_basis), (right, right_basis)):
        dtype = torch.promote_types(x.dtype, basis.dtype)
        turned.append(x.to(dtype) @ basis.to(dtype))
    return grad_weighted_sq_norm(turned[0], turned[1], weight)


def _check(rows: int, columns: int, weight: Tensor | None, directions: Tensor | None) -> None:
    for name, x in (("weight", weight), ("directions", directions)):
        if x is not None and x.shape[-2:] != (rows, columns):
            raise ValueError(
                f"{name} is {tuple(x.shape[-2:])}, but the factors are of a matrix "
                f"{(rows, columns)}: give it the matrix's shape"
            )


def grad_sq_norm_spans(
    left: Float[Tensor, "n o"], right: Float[Tensor, "n i"], spans: Int[Tensor, "s 2"]
) -> Float[Tensor, " s"]:
    """Return ||G||_F^2 of the samples in these spans of tokens, in the direct form, in Triton."""
    square = _launch(left[None, None], right[None, None], spans, True, None, None).square
    assert square is not None
    return square


def spans_of(starts: Int[Tensor, " e"]) -> Int[Tensor, "s 2"]:
    """Return the first token and the number of tokens of each sample."""
    return torch.stack([starts[:-1], starts.diff()], 1).to(torch.int64)


def by_length(
    left: Float[Tensor, "n o"], right: Float[Tensor, "n i"], starts: Int[Tensor, " e"]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (samples, left, right) of each length that there is, as [s, 1, t, ...]."""
    lengths = starts.diff()
    for t in sorted(set(lengths.tolist())):
        if t == 0:
            continue
        rows = (lengths == t).nonzero().squeeze(1)
        if len(rows) == len(lengths):  # all of one length: nothing is gathered
            yield rows, left.view(-1, 1, t, left.shape[1]), right.view(-1, 1, t, right.shape[1])
            return
        at = starts[rows, None] + torch.arange(t, device=starts.device)
        yield rows, left[at][:, None], right[at][:, None]


def _tile_sums_torch(
    left: Tensor,
    right: Tensor,
    square: bool,
    weight: Tensor | None,
    directions: Tensor | None,
) -> TileSums:
    s, g, _, o = left.shape
    i = right.shape[3]
    dtype = torch.promote_types(accumulator(left), accumulator(right))
    squares, weighted = (left.new_zeros(s, dtype=dtype) for _ in range(2))
    w = None if weight is None else weight.to(dtype).reshape(g, o, i)
    v = None if directions is None else directions.to(dtype).reshape(len(directions), g, o, i)
    dots = None if v is None else left.new_zeros(s, len(v), dtype=dtype)
    # Small matrices several at a time within the cache; large ones whole, since library products
    # lose a tenth of their speed on fewer rows.
    budget = min(summation.SCRATCH, max(quick_scratch(left), g * o * i))
    for rows in chunks(s, g * o * i, budget):
        r = right[rows].to(dtype)
        for tile in chunks(o, (rows.stop - rows.start) * g * i, budget):
            grad = left[rows, :, :, tile].to(dtype).mT @ r
            if v is not None and dots is not None:
                dots[rows] += grad.flatten(1) @ v[:, :, tile].flatten(1).T
            if square:
                squares[rows] += inner(grad, grad)
            if w is not None:
                weighted[rows] += inner(grad * w[:, tile], grad)
    return TileSums(squares if square else None, None if w is None else weighted, dots)


def _launch(
    left: Tensor,
    right: Tensor,
    spans: Tensor | None,
    square: bool,
    weight: Tensor | None,
    directions: Tensor | None,
) -> TileSums:
    left, right = addressable(left), addressable(right)
    samples, g, t, o = left.shape
    if spans is not None:
        samples = len(spans)
    i = right.shape[3]
    w = None if weight is None else weight.to(torch.float32).contiguous()
    v = None if directions is None else directions.to(torch.float32).contiguous()
    m = 0 if v is None else len(v)
    config = _config(left, right)
    rows, columns = -(-o // config.blocks["BLOCK_O"]), -(-i // config.blocks["BLOCK_I"])
    tiles = g * rows * columns
    quantities = int(square) + int(w is not None) + m
    unit = unit_of(left, right)
    sizes = (o, i, *left.stride()[:3], *right.stride()[:3])
    parts = []
    for some in chunks(samples if t * tiles else 0, quantities * tiles, summation.PARTIALS):
        n, at = some.stop - some.start, some if spans is None else slice(None)
        partials = left.new_empty(quantities, n, tiles, dtype=torch.float32)
        with on_device(left):
            _tile_kernel[(tiles * n,)](
                left[at], right[at], None if spans is None else spans[some], w, v,
                partials, n, t, g, m, rows, columns, *(size // unit for size in sizes),
                PACKED=spans is not None, SQUARE=square, WEIGHTED=w is not None,
                DIRECTIONS=v is not None, UNIT=unit,
                PRECISION=precision(left if left.dtype == torch.float32 else right),
                **config.options,
            )  # fmt: skip
        parts.append(sum_partials(partials.view(-1, tiles)).view(quantities, n))
    if not parts:
        parts.append(left.new_zeros(quantities, samples, dtype=torch.float32))
    sums = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    first = int(square) + int(w is not None)
    return TileSums(
        sums[0] if square else None,
        sums[int(square)] if w is not None else None,
        None if v is None else sums[first:].T.contiguous(),
    )


@jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    p_left, p_right, p_spans, p_weight, p_directions, p_out,
    s, t, g, m, rows, columns, o, i,
    left_s, left_g, left_t, right_s, right_g, right_t,
    PACKED: tl.constexpr, SQUARE: tl.constexpr, WEIGHTED: tl.constexpr, DIRECTIONS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of one sample's G; a number per quantity."""
    # Multiplied here, what is a multiple of 16 is known to be: loads are vectors.
    o, i = o * UNIT, i * UNIT
    left_s, left_g, left_t = wide(left_s) * UNIT, wide(left_g) * UNIT, left_t * UNIT
    right_s, right_g, right_t = wide(right_s) * UNIT, wide(right_g) * UNIT, right_t * UNIT
    tiles = g * rows * columns
    i_tile, i_s = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    i_g, i_within = i_tile // (rows * columns), i_tile % (rows * columns)
    i_row, i_column = _banded(i_within, rows, columns)
    i_row, i_column = i_row * BLOCK_O, i_column * BLOCK_I
    if PACKED:
        first = tl.load(p_spans + 2 * i_s)
        t = tl.load(p_spans + 2 * i_s + 1).to(tl.int32)
        p_left += first * left_t
        p_right += first * right_t
    else:
        p_left += i_s * left_s + i_g.to(tl.int64) * left_g
        p_right += i_s * right_s + i_g.to(tl.int64) * right_g
    p_left += i_row
    p_right += i_column
    # 64-bit addresses of the blocks, 32-bit ones within: half the registers.
    o_o, o_i, o_t = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_T)
    m_o, m_i = i_row + o_o < o, i_column + o_i < i
    within_left = o_t[:, None] * tl.cast(left_t, tl.int32) + o_o[None, :]
    within_right = o_t[:, None] * tl.cast(right_t, tl.int32) + o_i[None, :]
    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, t, BLOCK_T):
        m_t = start + o_t < t
        b_left = tl.load(p_left + within_left, mask=m_t[:, None] & m_o[None, :], other=0.0)
        b_right = tl.load(p_right + within_right, mask=m_t[:, None] & m_i[None, :], other=0.0)
        grad = dot(tl.trans(b_left), b_right, grad, PRECISION)
        p_left += tl.cast(left_t, tl.int64) * BLOCK_T
        p_right += tl.cast(right_t, tl.int64) * BLOCK_T
    p_out += i_s * tiles + i_tile
    step = tl.cast(s, tl.int64) * tiles
    if SQUARE:
        tl.store(p_out, tl.sum(tl.sum(grad * grad, axis=1), axis=0))
        p_out += step
    corner = (i_g * o + i_row).to(tl.int64) * i + i_column
    within = o_o[:, None] * i + o_i[None, :]
    m_matrix = m_o[:, None] & m_i[None, :]
    if WEIGHTED:
        weight = tl.load(p_weight + corner + within, mask=m_matrix, other=0.0)
        tl.store(p_out, tl.sum(tl.sum(weight * grad * grad, axis=1), axis=0))
        p_out += step
    if DIRECTIONS:
        for _ in range(m):
            v = tl.load(p_directions + corner + within, mask=m_matrix, other=0.0)
            tl.store(p_out, tl.sum(tl.sum(v * grad, axis=1), axis=0))
            p_out += step
            p_directions += tl.cast(g * o, tl.int64) * i


@jit
def _banded(i_tile, rows, columns):  # type: ignore[no-untyped-def]
    """Tile number -> (row, column), in bands of eight rows: neighbours share what is cached."""
    band = i_tile // (8 * columns)
    height = tl.minimum(rows - 8 * band, 8)
    within = i_tile % (8 * columns)
    return 8 * band + within % height, within // height


# Estimated, not yet tuned on a device (2026-11-22). Keyed by architecture, then by the bytes of an
# element as it is multiplied (factors of two dtypes: as float32), then by whether tiles are small:
# where a side is at most 64, and where registers are short, of two dtypes or unaligned rows.
CONFIGS: Mapping[int, Mapping[tuple[int, bool], Config]] = {
    80: {
        (2, False): Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 32}, 8, 3),
        (2, True): Config({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 64}, 4, 3),
        (4, False): Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 16}, 8, 2),
        (4, True): Config({"BLOCK_O": 32, "BLOCK_I": 64, "BLOCK_T": 16}, 4, 2),
    },
    90: {
        (2, False): Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 64}, 8, 3),
        (2, True): Config({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 32}, 4, 3),
        (4, False): Config({"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 16}, 8, 2),
        (4, True): Config({"BLOCK_O": 32, "BLOCK_I": 64, "BLOCK_T": 16}, 4, 2),
    },
}


def _config(left: Tensor, right: Tensor) -> Config:
    size = left.element_size() if left.dtype == right.dtype else 4
    is_narrow = min(left.shape[-1], right.shape[-1]) <= 64
    is_small = is_narrow or left.dtype != right.dtype or unit_of(left, right) == 1
    return _table(architecture(left.device))[size, is_small]


def _table(architecture: int) -> Mapping[tuple[int, bool], Config]:
    return CONFIGS[max(a for a in CONFIGS if a <= max(architecture, min(CONFIGS)))]


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every configuration that may be launched on this architecture.

    Of the flags, all combinations for one dtype each of 2 and of 4 bytes, the most demanding for
    the others: what a tile's sums take does not depend on the dtype of the factors.
    """
    flags = [(q, w, d) for q in (1, 0) for w in (0, 1) for d in (0, 1) if q or w or d]
    kinds = ("bf16", "fp16", "fp32")
    for left, right in ((x, y) for x in kinds for y in kinds):
        size = 4 if left != right or left == "fp32" else 2
        for aligned, small in ((True, False), (True, True), (False, True)):
            if left != right and not small:
                continue
            for packed in (False, True):
                is_whole = left == right != "fp16" and aligned and not packed
                for q, w, d in flags if is_whole else [(1, 1, 1)]:
                    asked = "".join(n for n, on in zip("qwd", (q, w, d), strict=True) if on)
                    name = f"tiles_{left}_{right}_{asked}{'_small' * small}"
                    name += "_ragged" * (not aligned) + "_packed" * packed
                    config = _table(architecture)[size, small]
                    yield _variant(name, left, right, (packed, q, w, d, aligned), config)


def _variant(
    name: str, left: str, right: str, flags: tuple[int, int, int, int, bool], config: Config
) -> Variant:
    packed, q, w, d, aligned = flags
    types = {"p_left": f"*{left}", "p_right": f"*{right}", "p_out": "*fp32"}
    types |= dict.fromkeys(("s", "t", "o", "i", "m", "rows", "columns"), "i32")
    types |= {f"{side}_{axis}": "i64" for side in ("left", "right") for axis in "sgt"}
    constants: dict[str, Any] = {
        "PACKED": bool(packed), "SQUARE": bool(q), "WEIGHTED": bool(w), "DIRECTIONS": bool(d),
        "UNIT": 16 if aligned else 1, "PRECISION": "ieee" if "fp32" in (left, right) else "tf32",
        **config.blocks,
    }  # fmt: skip
    # Triton makes a constant of an integer that is 1, as the number of groups is nearly always.
    if aligned:
        constants["g"] = 1
    else:
        types["g"] = "i32"
    given = (("p_spans", packed, "*i64"), ("p_weight", w, "*fp32"), ("p_directions", d, "*fp32"))
    for argument, is_given, kind in given:
        if is_given:
            types[argument] = kind
        else:
            constants[argument] = None
    return Variant(name, _tile_kernel, types, constants, config.num_warps, config.num_stages)
