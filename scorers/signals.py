"""`curate.signals`: per-row quantities of one batch of any torch model, by name.

Shapes: B rows, k sketch size, M directions, D hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curate.scorers.head import STATISTICS
from curate.scorers.needs import Harvest, Needs
from curate.scorers.prepared import named_parameters
from curate.scorers.readouts import Dots, sq_norm
from curate.scorers.row_vectors import Sketch, embedding, sketch_kind, sketches
from curate.scorers.watched_model import LossFn, WatchedModel, alignment, total

_VECTORS = frozenset({"grad_norm", "sketch", "grad_dot", "input_grad", "embedding"})
_WANT = frozenset({"loss", "el2n_seq", "grad_sq_norm", "weight_alignment"}) | STATISTICS | _VECTORS


def signals(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    want: Sequence[str] = ("loss", "grad_norm"),
    *,
    params: str | None = None,
    sketch_dim: int | tuple[int, ...] = 32,
    jl: str | None = None,
    seed: int = 0,
    directions: Sequence[Mapping[str, Tensor]] | None = None,
    probe: bool = True,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Return the wanted per-row quantities of a batch, by name, from one pass over it.

    `loss_fn(model, batch)` gives the rows' losses [B], or `Outputs` where what the prediction says
    is wanted too. `batch` is whatever it takes, tensors with the rows along axis 0. `params` is a
    regular expression over parameter names, or "head"; all trainable parameters by default.

    Per row [B]: loss, grad_norm, grad_sq_norm, el2n, el2n_seq, entropy, margin, correct, tokens,
    weight_alignment. Per row a vector:
        sketch       `sketch_dim=k` or `(k_o, k_i)`: every matrix two-sided to k_o x k_i, every
                     vector one-sided to k_o * k_i, concatenated in the order of the model's
                     parameters; `(k,)`: the whole gradient one-sided to k, by a sparse map where
                     k is a power of two up to 16384 and a dense one elsewhere, or as `jl` says.
                     Inner products of sketches of one kind and `seed` estimate those of
                     gradients without bias.
        grad_dot     inner products with `directions`, each {parameter name: tensor}; [B, M]
        embedding    the input of the head; a mean over target tokens where there are several
        input_grad   gradient of the loss with respect to the model's float input (or the
                     embeddings of its token input); one entry `input_grad/<argument>` each
                     where there are several

    The probe checks every parameter on three rows first (see `Engine.verify`); for many batches of
    one model use an `Engine`, or check once and pass `probe=False`. `recompute` runs repeated
    blocks a second time in the backward pass, so that long rows fit in memory (see `Engine`).

    Raises:
        ValueError: a wrong argument, or a signal that this loss function cannot give.
        EngineError: rows that depend on one another, or a gradient that no path gets right.
    """
    if unknown := sorted(set(want) - _WANT):
        raise ValueError(f"unknown signal {unknown[0]!r}; choose from {', '.join(sorted(_WANT))}")
    pattern, wants = params or "", set(want)
    core = WatchedModel(model, loss_fn, probe)
    core.passes.recompute.on = recompute
    gradients = bool(wants & {"grad_norm", "grad_sq_norm", "sketch", "grad_dot"})
    if gradients:
        core.check(pattern)
    core.want(
        [pattern] if gradients else [],
        head=bool(wants & {"weight_alignment", "embedding"}),
        logits=bool(wants & {"el2n_seq", "input_grad"}),
    )
    core.ready(batch)
    names = core.names(pattern) if gradients else frozenset()
    needs = Needs(
        readouts=_readouts(wants, names, sketch_dim, jl, seed, directions, core),
        statistics=bool(wants & STATISTICS),
        logit_norm="el2n_seq" in wants,
        alignment="weight_alignment" in wants,
        hidden="embedding" in wants,
        input_grad="input_grad" in wants,
    )
    harvest = core.passes.run(batch, needs)
    return _named(want, harvest, core, names, needs)


def _readouts(
    wants: set[str],
    names: frozenset[str],
    sketch_dim: int | tuple[int, ...],
    jl: str | None,
    seed: int,
    directions: Sequence[Mapping[str, Tensor]] | None,
    core: WatchedModel,
) -> dict[str, tuple[frozenset[str], Any]]:
    readouts: dict[str, tuple[frozenset[str], Any]] = {}
    if wants & {"grad_norm", "grad_sq_norm"}:
        readouts["sq_norm"] = names, sq_norm
    if "sketch" in wants:
        readouts["sketch"] = names, sketch_kind(sketch_dim, jl, seed)
    if "grad_dot" in wants:
        stacked = _stacked(directions, core)
        readouts["grad_dot"] = names & stacked.keys(), Dots(stacked)
    return readouts


def _stacked(
    directions: Sequence[Mapping[str, Tensor]] | None, core: WatchedModel
) -> dict[str, Tensor]:
    """Return {parameter: [M, *shape]}; a direction without a parameter is 0 there."""
    if not directions:
        raise ValueError("grad_dot needs directions=, a list of {parameter name: tensor}")
    params = named_parameters(core.passes.model)
    for m, direction in enumerate(directions):
        for name, v in direction.items():
            if name not in params:
                raise ValueError(f"directions[{m}] names {name!r}, which is no parameter")
            if v.shape != params[name].shape:
                raise ValueError(
                    f"directions[{m}][{name!r}] has shape {tuple(v.shape)}, "
                    f"the parameter {tuple(params[name].shape)}"
                )
    names = dict.fromkeys(name for direction in directions for name in direction)
    return {
        name: torch.stack(
            [d[name].to(params[name].device) if name in d else torch.zeros_like(params[name])
             for d in directions]
        )
        for name in names
    }  # fmt: skip


def _named(
    want: Sequence[str], harvest: Harvest, core: WatchedModel, names: frozenset[str], needs: Needs
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for kind in want:
        if kind == "loss":
            out[kind] = harvest.loss
        elif kind in STATISTICS:
            out[kind] = harvest.statistics[kind]
        elif kind == "el2n_seq":
            assert harvest.logit_norm is not None, "asked for"
            out[kind] = harvest.logit_norm
        elif kind == "weight_alignment":
            out[kind] = alignment(harvest)
        elif kind in ("grad_norm", "grad_sq_norm"):
            square = total(harvest, "sq_norm", names)
            out[kind] = square.sqrt() if kind == "grad_norm" else square
        elif kind == "sketch":
            _, sketch = needs.readouts[kind]
            assert isinstance(sketch, Sketch), "made above"
            out[kind] = sketches(harvest, kind, [n for n in core.all if n in names], sketch)
        elif kind == "grad_dot":
            values = list(harvest.readouts[kind].values())
            _, dots = needs.readouts[kind]
            assert isinstance(dots, Dots), "made above"
            m = len(next(iter(dots.directions.values())))
            zero = harvest.loss.new_zeros(len(harvest.loss), m)
            out[kind] = torch.stack([zero, *values]).sum(0)
        elif kind == "embedding":
            out[kind] = embedding(harvest, core)
        elif len(harvest.input_grad) == 1:
            out[kind] = next(iter(harvest.input_grad.values()))
        else:
            out |= {f"input_grad/{name}": g for name, g in harvest.input_grad.items()}
    return out
