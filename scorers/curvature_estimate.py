"""A curvature estimated from rows that come in batches, in one or two passes over them.

Shapes: B rows of a batch.

    for stage in range(estimate.stages):
        for batch, numbers in batches:
            estimate.add(batch, numbers)
        estimate.end_stage()
    tensors, said = estimate.found()

What is held is one number per entry of the factors, in float64, and a batch's share of it.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curate.scorers.curvature import Curvature, CurvatureRefused, CurvatureSettings
from curate.scorers.curvature_diagonal import DiagonalCurvature, squares
from curate.scorers.curvature_kronecker import (
    Factors,
    KroneckerCurvature,
    RotatedSquares,
    SideMoment,
    TokenCount,
    Tokens,
    decomposed,
)
from curate.scorers.curvature_labels import relabelled
from curate.scorers.curvature_layers import Cover, Layer, full_cover, matrix_cover
from curate.scorers.engine import Engine
from curate.scorers.logit_grad import own_tokens
from curate.scorers.protocol import Batch
from curate.scorers.readouts import Readout
from curate.scorers.row_map import RowMap

log = logging.getLogger("curate.score")

MOST_BYTES = 16 << 30
"""What the factors at one checkpoint may take."""
FACTORS = "left", "right", "eigenvalues"


class CurvatureEstimate:
    """Collects what one curvature is made of, at the checkpoint that the engine has."""

    def __init__(
        self, engine: Engine, settings: CurvatureSettings, params: str = "", seed: int = 0
    ) -> None:
        self.engine, self.settings, self.params, self.seed = engine, settings, params, seed
        self.labels = settings.labels
        self.cover: Cover | None = None
        self.layers: dict[str, Layer] = {}
        self.factors: dict[str, Factors] = {}
        self._stage, self._rows = 0, 0
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._diagonal: dict[str, Tensor] = {}
        self._dtype = torch.float32
        self._rows_used = 0
        self._moved: torch.device | None = None
        self._factors_there: dict[str, Factors] = {}

    @property
    def stages(self) -> int:
        """How many passes over the rows it takes."""
        return 2 if self.settings.kind == "ekfac" else 1

    def add(self, batch: Batch, numbers: Sequence[int]) -> bool:
        """Add these rows, whose numbers in the corpus are given.

        Returns False, and adds none, where a loss or a sum is not finite. Raises what the model
        does.

        Raises:
            CurvatureRefused: there is nothing that this kind of curvature covers, or too much.
        """
        self._begin(batch)
        if self.labels == "model":
            batch = relabelled(batch, self.engine.evaluate(batch), numbers, self.seed)
        loss, found = self.engine.read(batch, self._names, self._readouts(batch))
        parts = {key: {n: v.sum(0) for n, v in of.items()} for key, of in found.items()}
        values = [loss, *(v for of in parts.values() for v in of.values())]
        if not bool(torch.stack([v.isfinite().all() for v in values]).all()):
            return False
        for key, of in parts.items():
            sums = self._sums.setdefault(key, {})
            for name, value in of.items():
                if name in sums:
                    sums[name] += value.double()
                else:
                    sums[name] = value.double()
        self._rows += batch.rows
        return True

    def end_stage(self) -> None:
        """Make of the sums what the next pass, or the curvature itself, needs.

        Raises:
            ValueError: no row was added.
        """
        if not self._rows:
            raise ValueError("no row of the corpus could be used for the curvature")
        if self.settings.kind == "diagonal":
            self._diagonal = {n: v / self._rows for n, v in self._sums["squares"].items()}
        elif self._stage == 0:
            self._decompose()
        else:
            values = self._sums.get("rotated", {})
            self.factors = {
                name: Factors(own.left, own.right, values[name].cpu() / self._rows)
                for name, own in self.factors.items()
                if name in values
            }
        self._stage += 1
        self._rows_used = self._rows
        self._rows, self._sums = 0, {}

    def found(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the factors by name, on the CPU, and what there is to say of them (as JSON)."""
        assert self._stage == self.stages and self.cover is not None, "all passes are made"
        dtype = self._dtype
        tensors = {f"{n}:squares": v.to(dtype).cpu() for n, v in self._diagonal.items()}
        for name, own in self.factors.items():
            tensors |= {f"{name}:{k}": v.to(dtype).contiguous() for k, v in vars(own).items()}
        said = {
            "rows": self._rows_used,
            "labels": self.labels,
            "layers": [[layer.weight, layer.bias] for layer in self.cover.layers],
            "left_out": self.cover.left_out_aloud(),
        }
        return tensors, said

    # -- the passes

    def _begin(self, batch: Batch) -> None:
        """Find out on the first batch what is covered, and whether labels can be drawn."""
        if self.cover is not None:
            return
        params = self.engine.target_params(batch, self.params)
        shapes = {name: p.shape for name, p in params.items()}
        kind = self.settings.kind
        make = full_cover if kind == "diagonal" else matrix_cover
        cover = make(self.engine.plan, shapes)
        if not cover.layers:
            raise CurvatureRefused(
                f"curvature={kind} covers none of the parameters asked for: "
                f"{cover.left_out_aloud()}; choose curvature=diagonal, or others by params="
            )
        size = 4 * sum(_entries(layer, shapes, kind) for layer in cover.layers)
        if size > MOST_BYTES:
            raise CurvatureRefused(
                f"the factors of curvature={kind} take {size / 2**30:.1f} GiB at each checkpoint, "
                f"more than {MOST_BYTES / 2**30:.0f}: name fewer parameters by params="
            )
        if self.labels == "model" and (why := self._cannot_draw(batch)):
            log.warning("the curvature takes the labels of the data: %s", why)
            self.labels = "data"
        doubles = any(p.dtype == torch.float64 for p in params.values())
        self._dtype = torch.float64 if doubles else torch.float32
        self.layers = {layer.weight: layer for layer in cover.layers}
        self.cover = cover

    def _cannot_draw(self, batch: Batch) -> str:
        """Return why labels cannot be drawn from the model, "" if they can."""
        before = self.engine.evaluate(batch)
        try:
            drawn = relabelled(batch, before, range(batch.rows), self.seed)
        except ValueError as reason:
            return str(reason)
        after = self.engine.evaluate(drawn)
        changed = (drawn.targets != batch.targets).any()
        same_loss = torch.equal(before.loss, after.loss)
        same = after.targets is not None and torch.equal(after.targets, drawn.targets)
        if not same or (bool(changed) and same_loss):
            return "its task does not compute the loss from the batch's targets"
        return ""

    @property
    def _names(self) -> frozenset[str]:
        if self.settings.kind == "diagonal":
            return frozenset(name for layer in self.layers.values() for name in layer.names)
        return frozenset(self.layers if self._stage == 0 else self.factors)

    def _readouts(self, batch: Batch) -> Mapping[str, Readout]:
        if self.settings.kind == "diagonal":
            return {"squares": squares}
        if self._stage == 1:
            return {"rotated": RotatedSquares(self.layers, self._on_device(batch))}
        ids = None if batch.row_ids is None else batch.row_ids.long()
        tokens = Tokens(RowMap(batch.rows, ids), own_tokens(batch, batch.targets))
        return {
            "left": SideMoment(self.layers, tokens, on_left=True),
            "right": SideMoment(self.layers, tokens, on_left=False),
            "tokens": TokenCount(tokens),
        }

    def _decompose(self) -> None:
        """Take eigenvectors, and the eigenvalues of A x S, of what was summed."""
        sums = self._sums
        for name in sums.get("left", {}):
            tokens = sums["tokens"][name].clamp(min=1).cpu()
            on_left, left = decomposed(sums["left"][name] / self._rows)
            on_right, right = decomposed(sums["right"][name].cpu() / tokens)
            self.factors[name] = Factors(left, right, on_left[:, :, None] * on_right[:, None])

    def _on_device(self, batch: Batch) -> Mapping[str, Factors]:
        device = batch.targets.device
        if self._moved != device:
            self._factors_there = {
                n: Factors(*(x.to(device, self._dtype) for x in vars(f).values()))
                for n, f in self.factors.items()
            }
            self._moved = device
        return self._factors_there


def made_curvature(
    settings: CurvatureSettings, tensors: Mapping[str, Tensor], said: Mapping[str, Any]
) -> Curvature:
    """Return the curvature that `CurvatureEstimate.found` told of, damped as the settings say."""
    layers = {weight: Layer(weight, bias) for weight, bias in said["layers"]}
    if settings.kind == "diagonal" or settings.from_moments:
        by_name = {key.removesuffix(":squares"): v for key, v in tensors.items()}
        damping = settings.damping
        if damping is None and settings.kind == "adam_root":
            damping = said["eps"]
        return DiagonalCurvature(layers, by_name, damping)
    factors: dict[str, Factors] = {}
    for name in layers:
        if f"{name}:left" in tensors:  # else no row's loss depends on it
            factors[name] = Factors(*(tensors[f"{name}:{part}"] for part in FACTORS))
    return KroneckerCurvature({name: layers[name] for name in factors}, factors, settings.damping)


def _entries(layer: Layer, shapes: Mapping[str, torch.Size], kind: str) -> int:
    """Return the numbers that a layer's factors hold, without groups."""
    shape = shapes[layer.weight]
    if kind == "diagonal":
        return sum(shapes[name].numel() for name in layer.names)
    rows, columns = shape[0], shape[1:].numel() + (layer.bias is not None)
    return rows * rows + columns * columns + rows * columns
