"""Cross entropy of a linear head from hidden states, and what its error tells; logits never stored.

Shapes: b rows, t tokens, d width, v classes, n target tokens worked on at a time, w classes of a
tile, u kept columns, k sketch size, m directions.

The head's own gradient per row is sum_t e_t h_t^T with e = p - y. Everything that is linear or
bilinear in e is taken tile by tile from E = exp(z - shift) (`kernels/online_softmax.py`) before the
log-sum is known, as attention kernels do, and put right at the end:

    e_t = scale_t E_t + e_y unit(y_t),      E_t[y_t] = 0

so each tile of logits is made once, read while it is in cache, and dropped. Only tokens with a
target are computed at all.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from curate.kernels.cross_entropy import active_gathering, token_cross_entropy
from curate.kernels.head_forward import head_partial_sums
from curate.kernels.head_readouts import (
    Columns,
    Dots,
    Gram,
    Product,
    Readout,
    Tile,
    multiplies_16_bits,
    multiply,
)
from curate.kernels.launch import uses_triton
from curate.kernels.online_softmax import (
    IGNORE,
    LOG2E,
    OnlineSoftmax,
    TokenStatistics,
    TokenSums,
)
from curate.kernels.rademacher import Key, signs
from curate.kernels.softmax_tiles import OnlineSoftmaxKernels, exponentials, totals
from curate.kernels.summation import accumulator, inner
from curate.kernels.token_blocks import TokenBlock, token_blocks

# Elements of a tile of logits. CPU: logits and errors (4 MiB each) stay in the last-level cache.
SCRATCH_CPU = 1 << 20
SCRATCH_GPU = 1 << 27
# Tokens of a tile on a CPU: enough that the weights, read once per this many, cost little.
TOKENS_CPU = 1024


@dataclass(frozen=True)
class HeadWants:
    """What is wanted beside the loss."""

    statistics: bool = False
    gram: bool = False
    columns: Int[Tensor, "b u"] | None = None
    """Classes whose errors are kept (tied embeddings)"""
    sketch: tuple[Key, int] | None = None
    """The stream and number of signs of the vocabulary rows"""
    directions: Float[Tensor, "m v d"] | None = None
    aligned: bool = False
    hidden_grad: bool = False


class HeadSums(NamedTuple):
    """Results per token, float32 (float64 for float64 hidden), 0 where the target is IGNORE."""

    loss: Float[Tensor, "b t"]
    error_target: Float[Tensor, "b t"]
    """e_y = p_y - 1"""
    lse: Float[Tensor, "b t"]
    statistics: TokenStatistics | None
    error_sq: Float[Tensor, "b t"]
    """||e||^2"""
    hidden_grad: Float[Tensor, "b t d"] | None
    """e W in the model's dtype: the loss's gradient"""
    gram: Float[Tensor, "b t t"] | None
    """e_t . e_s within a row"""
    columns: Float[Tensor, "b t u"] | None
    """e_t at the wanted classes of the row"""
    sketch: Float[Tensor, "b t k"] | None
    """e_t S, unscaled"""
    dots: Float[Tensor, "b t m"] | None
    """e_t^T V_m h_t"""
    aligned: Float[Tensor, "b t"] | None
    """e_t^T W h_t"""


def linear_cross_entropy(
    hidden: Float[Tensor, "*t d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*t"],
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, "*t"]:
    """Return -log softmax(hidden weight^T + bias)[target] of every token, 0 where it is IGNORE.

    One function to whoever watches calls (`__torch_function__`). Logits are never stored, unless
    the weight or the bias needs a gradient. Within `gathering()` the statistics are kept.
    """
    tensors = (hidden, weight, targets) + (() if bias is None else (bias,))
    if has_torch_function_variadic(*tensors):
        out: Tensor = handle_torch_function(
            linear_cross_entropy, tensors, hidden, weight, targets, bias=bias
        )
        return out
    if torch.is_grad_enabled() and any(x.requires_grad for x in (weight, bias) if x is not None):
        return token_cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets)
    gathered = active_gathering()
    wants = HeadWants(statistics=gathered is not None)
    flat = hidden.reshape(1, targets.numel(), hidden.shape[-1])
    loss, sums = head_pass(flat, weight, bias, targets.reshape(1, -1), wants)
    if gathered is not None and sums.statistics is not None:
        gathered.head = TokenStatistics(*(x.view(targets.shape) for x in sums.statistics))
        gathered.keep(hidden, gathered.head)
    # A row without targets may have an infinite seed (1 / 0): no gradient, as of its logits.
    return loss.view(targets.shape).masked_fill(targets == IGNORE, 0.0)


def head_pass(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, "b t"],
    wants: HeadWants,
) -> tuple[Float[Tensor, "b t"], HeadSums]:
    """Return the loss, differentiable once in `hidden`, and what was wanted from the same pass.

    Raises:
        ValueError: weight or bias need a gradient, which this does not give.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (weight, bias) if x is not None):
        raise ValueError(
            "head_pass gives no gradient of the head's weight and bias: freeze them "
            "(requires_grad_(False)) or use linear_cross_entropy"
        )
    is_differentiable = torch.is_grad_enabled() and hidden.requires_grad
    if is_differentiable:
        wants = replace(wants, hidden_grad=True)
    sums = head_sums(hidden.detach(), weight, bias, targets, wants)
    if not is_differentiable:
        return sums.loss, sums
    loss: Tensor = _Loss.apply(hidden, sums.loss, sums.hidden_grad)  # type: ignore[no-untyped-call]
    return loss, sums


class _Loss(torch.autograd.Function):
    """The loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, hidden_grad: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_grad)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor, None, None]:
        (hidden_grad,) = ctx.saved_tensors
        return (hidden_grad * seed[..., None]).to(hidden_grad.dtype), None, None


@torch.no_grad()
def head_sums(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, "b t"],
    wants: HeadWants,
) -> HeadSums:
    """Return the loss of every token and what is wanted, from one pass over tiles of logits."""
    results = _Results(hidden, targets, wants)
    by_row = wants.gram or wants.columns is not None
    size = _Size.of(hidden, weight, wants)
    if (
        _is_forward_only(wants, bias)
        and uses_triton(hidden, weight)
        and hidden.dtype == weight.dtype
    ):
        for block in token_blocks(targets, max(1, size.scratch // hidden.shape[2]), by_row=False):
            results.put(block, _forward_sums(hidden, weight, bias, targets, block))
        return results.sums()
    for block in token_blocks(targets, size.tokens, by_row):
        results.put(block, _block_sums(hidden, weight, bias, targets, block, wants, size))
    return results.sums()


@torch.no_grad()
def head_sq_norm(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, "b t"],
    lse: Float[Tensor, "b t"],
    error_target: Float[Tensor, "b t"],
    seeds: Float[Tensor, "b t"],
) -> Float[Tensor, " b"]:
    """Return ||sum_t seed_t e_t h_t^T||_F^2 per row, rows of the gradient at a time.

    e is made again from `lse` and `error_target`. For rows longer than the width is large, or where
    the seeds are not known when `head_sums` makes the Gram matrix.
    """
    dtype, d = accumulator(hidden), weight.shape[1]
    scratch = SCRATCH_GPU if hidden.is_cuda else SCRATCH_CPU
    out = hidden.new_zeros(len(hidden), dtype=dtype)
    for block in token_blocks(targets, TOKENS_CPU, by_row=True):
        r, p = len(block.rows), block.places
        h = block.fill(hidden, _factors(hidden, weight))
        y, lse_, e_y = (x.flatten()[block.index] for x in (targets.clamp(min=0), lse, error_target))
        seed = block.fill(seeds[..., None], dtype).view(r, p)
        # Half precision holds nothing below 6e-8: the largest seed of a row is made 1024.
        raised = 1024 / seed.abs().amax(1).clamp(min=1e-30)
        seed = (seed * raised[:, None]).flatten()
        width = max(1, scratch // (r * max(p, d)))
        for first in range(0, len(weight), width):
            classes = slice(first, min(first + width, len(weight)))
            e = _errors(h, weight, bias, y, lse_, e_y, classes, seed)
            grad = multiply(e.view(r, p, -1).mT, h.view(r, p, d))
            out[block.rows] += inner(grad, grad) / raised.square()
    return out


def head_gram_sq_norm(
    gram: Float[Tensor, "b t t"], hidden: Float[Tensor, "b t d"], seeds: Float[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """Return sum_{t, s} seed_t seed_s gram_ts (h_t . h_s), not below 0.

    Tokens without an error (a zero on the diagonal) count as 0, whatever they hold.
    """
    dtype = gram.dtype
    out = gram.new_zeros(len(gram))
    scratch = SCRATCH_GPU if hidden.is_cuda else SCRATCH_CPU
    step = max(1, scratch // max(1, gram.shape[1] * max(gram.shape[1], hidden.shape[2])))
    for first in range(0, len(gram), step):
        rows = slice(first, first + step)
        nothing = torch.diagonal(gram[rows], dim1=1, dim2=2) == 0
        seeded = hidden[rows].to(dtype) * seeds[rows, :, None].to(dtype)
        seeded = seeded.masked_fill_(nothing[..., None], 0.0)
        out[rows] = inner(gram[rows], torch.bmm(seeded, seeded.mT))
    return out.clamp_(min=0)


@torch.no_grad()
def head_error(
    hidden: Float[Tensor, "b t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, "b t"],
    lse: Float[Tensor, "b t"],
    error_target: Float[Tensor, "b t"],
    rows: slice,
) -> Float[Tensor, "r t v"]:
    """Return the error p - y itself of a few rows, 0 at ignored tokens."""
    dtype = accumulator(hidden)
    y = targets[rows].flatten()
    index = (y != IGNORE).nonzero()[:, 0]
    h = hidden[rows].flatten(0, 1)[index].to(dtype)
    lse, error_target = (x[rows].flatten()[index] for x in (lse, error_target))
    e = _errors(h, weight, bias, y[index], lse, error_target, slice(0, len(weight)))
    out = h.new_zeros(len(y), len(weight)).index_copy_(0, index, e)
    return out.view(*targets[rows].shape, -1)


def _errors(
    h: Float[Tensor, "n d"],
    weight: Tensor,
    bias: Tensor | None,
    y: Int[Tensor, " n"],
    lse: Float[Tensor, " n"],
    e_y: Float[Tensor, " n"],
    classes: slice,
    seed: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n w"]:
    """Return the errors of some classes, times the seed, in the dtype of h."""
    z = h.new_empty(len(h), classes.stop - classes.start, dtype=accumulator(h))
    logits(h, weight, bias, classes, out=z)
    if uses_triton(h, weight):
        e = z if z.dtype == h.dtype else torch.empty_like(z, dtype=h.dtype)
        exponentials(z, y, lse, e_y, e, seed=seed, first=classes.start)
        return e
    z.sub_(lse[:, None]).mul_(LOG2E).exp2_()
    here = ((y >= classes.start) & (y < classes.stop)).nonzero()[:, 0]
    z[here, y[here] - classes.start] = e_y[here].to(z.dtype)
    return z if seed is None else z.mul_(seed[:, None])


def _factors(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which hidden states and errors are multiplied; sums are float32."""
    is_16_bit = hidden.dtype == weight.dtype and multiplies_16_bits(hidden.device)
    return hidden.dtype if is_16_bit and uses_triton(hidden) else accumulator(hidden)


class _Size(NamedTuple):
    """How many tokens, and how many classes of each token, are worked on at a time."""

    tokens: int
    scratch: int
    per_class: int
    """Elements that a class of a tile costs beside its logits"""

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, wants: HeadWants) -> "_Size":
        v, d = weight.shape
        scratch = SCRATCH_GPU if hidden.is_cuda else SCRATCH_CPU
        tokens = scratch // max(v, d, 1) if hidden.is_cuda else min(TOKENS_CPU, scratch)
        k = 0 if wants.sketch is None else 8 * wants.sketch[1]  # the hash works on int64
        converts = weight.dtype != accumulator(hidden)
        return _Size(max(1, tokens), scratch, max(d if converts else 1, k))

    def tiles(self, v: int, tokens: int) -> list[slice]:
        width = min(v, max(1, self.scratch // max(tokens, self.per_class)))
        if 64 < width < v:
            width -= width % 64
        return [slice(first, min(first + width, v)) for first in range(0, v, width)]


def _is_forward_only(wants: HeadWants, bias: Tensor | None) -> bool:
    """Return whether running sums over the classes give all that is wanted."""
    kept = wants.columns, wants.sketch, wants.directions
    return not (
        any(x is not None for x in kept)
        or wants.gram
        or wants.hidden_grad
        or (wants.aligned and bias is not None)
    )


def _forward_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, block: TokenBlock
) -> dict[str, Tensor]:
    """Return the sums of one block of tokens from tiles of logits that are never written."""
    y = targets.flatten()[block.index]
    h = block.fill(hidden, hidden.dtype)
    out, index = totals(head_partial_sums(h, weight, bias, y), y)
    sums = TokenSums._make((*out[:-1], index))
    return sums._asdict() | {"error_sq": sums.el2n.square()}


def _block_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    block: TokenBlock,
    wants: HeadWants,
    size: _Size,
) -> dict[str, Tensor]:
    """Return the results of one block by the names of HeadSums; statistics by their own."""
    dtype = accumulator(hidden)
    on_gpu = uses_triton(hidden, weight)
    h = block.fill(hidden, _factors(hidden, weight))
    y = targets.flatten()[block.index].clamp(min=0)
    wants_spread = wants.statistics or (wants.aligned and not wants.hidden_grad)
    online = OnlineSoftmaxKernels(y, h.dtype) if on_gpu else OnlineSoftmax(y, wants_spread)
    readouts = _readouts(h, weight, bias, y, block, wants)
    tiles = size.tiles(len(weight), len(y))
    room = len(y) * (tiles[0].stop - tiles[0].start)
    # A second buffer where E may not take the place of the logits.
    is_shared = h.dtype == dtype and not wants_spread and wants.directions is None
    spare = h.new_empty(room, dtype=dtype)
    weights = spare if is_shared else h.new_empty(room)
    for classes in tiles:
        shape = len(y), classes.stop - classes.start
        z, e = (x[: shape[0] * shape[1]].view(shape) for x in (spare, weights))
        logits(h, weight, bias, classes, out=z)
        factor = online.add(z, e, classes.start)
        tile = Tile(classes, len(tiles) == 1, e, factor, spare)
        for readout in readouts.values():
            readout.add(tile)
    sums, scale = online.sums()
    scale, e_y = scale.to(dtype), sums.error_target.to(dtype)
    out = {name: value.to(dtype) for name, value in sums._asdict().items()}
    out |= {name: readout.finish(scale, e_y) for name, readout in readouts.items()}
    if wants.hidden_grad:
        out["aligned"] = (out["hidden_grad"] * h).sum(1)
    elif "bias" in out:
        out["aligned"] = out["aligned"] - out["bias"][:, 0]
    return out | {"error_sq": sums.el2n.square().to(dtype)}


def logits(
    h: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    classes: slice,
    out: Float[Tensor, "n w"],
) -> None:
    """Write the logits of some classes, added up in float32 (float64)."""
    w = weight[classes].to(h.dtype)
    if bias is not None and h.dtype == out.dtype:
        torch.addmm(bias[classes].to(out.dtype), h, w.T, out=out)
        return
    multiply(h, w.T, out=out)
    if bias is not None:
        out.add_(bias[classes])


def _readouts(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    block: TokenBlock,
    wants: HeadWants,
) -> dict[str, Readout]:
    """Return what takes in the tiles for each thing wanted, by its name in HeadSums."""
    dtype, readouts = h.dtype, dict[str, Readout]()
    of_rows = y.view(len(block.rows), -1) if wants.gram or wants.columns is not None else y
    if wants.hidden_grad:
        readouts["hidden_grad"] = Product(
            lambda classes: weight[classes].to(dtype), lambda: weight[y].to(dtype)
        )
    elif wants.aligned and bias is not None:
        column = bias[:, None].to(dtype)
        readouts["bias"] = Product(lambda classes: column[classes], lambda: column[y])
    if wants.sketch is not None:
        key, k = wants.sketch
        readouts["sketch"] = Product(
            lambda classes: signs(
                key, torch.arange(classes.start, classes.stop, device=y.device), k, dtype=dtype
            ),
            lambda: signs(key, y, k, dtype=dtype),
        )
    if wants.gram:
        readouts["gram"] = Gram(of_rows)
    if wants.columns is not None:
        readouts["columns"] = Columns(wants.columns[block.rows], of_rows)
    if wants.directions is not None:
        readouts["dots"] = Dots(h, y, wants.directions)
    return readouts


class _Results:
    """The results of all tokens, filled block by block; 0 where no block puts anything."""

    def __init__(self, hidden: Tensor, targets: Tensor, wants: HeadWants) -> None:
        self._hidden, self._targets, self._wants = hidden, targets, wants
        self._t, self._all = targets.shape[1], dict[str, Tensor]()
        names = ["loss", "error_target", "lse", "error_sq"]
        if wants.statistics:
            names += TokenStatistics._fields
        for name in names:
            self._make(name)
        if wants.hidden_grad:
            self._make("hidden_grad", hidden.shape[2], dtype=hidden.dtype)
        if wants.gram:
            self._make("gram", self._t)
        if wants.columns is not None:
            self._make("columns", wants.columns.shape[1])
        if wants.sketch is not None:
            self._make("sketch", wants.sketch[1])
        if wants.directions is not None:
            self._make("dots", len(wants.directions))
        if wants.aligned:
            self._make("aligned")

    def _make(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or accumulator(self._hidden)
        self._all[name] = self._hidden.new_zeros(*self._targets.shape, *shape, dtype=dtype)

    def put(self, block: TokenBlock, values: dict[str, Tensor]) -> None:
        """Write a block's results where its tokens are."""
        real = slice(None) if block.is_real is None else block.is_real
        index = block.index[real]
        for name, out in self._all.items():
            if name == "gram":
                self._put_gram(block, out, values[name])
            else:
                flat = out.flatten(0, 1)
                flat[index] = (
                    values[name].reshape(len(block.index), *out.shape[2:])[real].to(out.dtype)
                )

    def _put_gram(self, block: TokenBlock, out: Tensor, gram: Tensor) -> None:
        r, places, _ = gram.shape
        if block.is_real is not None:
            real = block.is_real.view(r, places)
            gram = gram * (real[:, :, None] & real[:, None, :])
        at = block.index.view(r, places) - block.rows[:, None] * self._t
        out[block.rows[:, None, None], at[:, :, None], at[:, None, :]] = gram

    def sums(self) -> HeadSums:
        """Return everything as it is now."""
        each = self._all
        statistics = None
        if self._wants.statistics:
            statistics = TokenStatistics(*(each[name] for name in TokenStatistics._fields))
        rest = [name for name in HeadSums._fields if name != "statistics"]
        return HeadSums(statistics=statistics, **{name: each.get(name) for name in rest})  # type: ignore[arg-type]
