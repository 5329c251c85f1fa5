"""Diagonal curvature read off the second moments that Adam left: no pass over the corpus.

Shapes: r and c the sides of a parameter as a matrix.

With v̂ = v / (1 - β2^t) the bias-corrected running mean of the squared gradient, entry by entry:

    adam       G = diag(v̂)     a stand-in for the diagonal of the Fisher information
    adam_root  G = diag(√v̂)    with λ = ε, (G + λI)^-1 is what Adam multiplies its step by

The gradient squared is that of a batch's mean loss, with the labels of the data and as it was
clipped, at weights of some 1 / (1 - β2) steps before the checkpoint. For batches of b independent
rows E[v̂] = F / b + (1 - 1/b) ḡ², F = E[g²] of rows and ḡ their mean gradient: near an optimum a
b-th of `diagonal` on the labels of the data, which under damping relative to its mean changes
the scale alone. (Kingma and Ba 2015, algorithm 1; Li et al. 2025, arXiv 2507.18807, who measure
what the reading as Fisher information costs.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curate.scorers.adam_readout import Moments
from curate.scorers.curvature import CurvatureRefused, CurvatureSettings
from curate.scorers.curvature_layers import Cover, full_cover
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch


class MomentCurvature:
    """Takes the place of a `CurvatureEstimate`; of the rows it reads only what they use.

    Raises:
        CurvatureRefused: the moments are of before the first step.
    """

    stages = 1

    def __init__(
        self, engine: Engine, settings: CurvatureSettings, params: str, moments: Moments
    ) -> None:
        if not any(moments.steps.values()):
            raise CurvatureRefused(
                f"curvature={settings.kind} needs moments of some steps, but these are of before "
                "the first: leave this checkpoint out"
            )
        self.engine, self.settings, self.params = engine, settings, params
        self.moments = moments
        self.cover: Cover | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._dtype = torch.float32

    def add(self, batch: Batch, numbers: Sequence[int]) -> bool:
        """Learn from the first batch which parameters the losses depend on. Always True.

        Raises:
            CurvatureRefused: none of those asked for, or one that was not trained.
        """
        if self.cover is not None:
            return True
        params = self.engine.target_params(batch, self.params)
        cover = full_cover(self.engine.plan, {name: p.shape for name, p in params.items()})
        if not cover.layers:
            raise CurvatureRefused(
                f"curvature={self.settings.kind} covers none of the parameters asked for: "
                f"{cover.left_out_aloud()}; choose others by params="
            )
        used = [name for layer in cover.layers for name in layer.names]
        if absent := [name for name in used if name not in self.moments.square]:
            raise CurvatureRefused(
                f"{absent[0]} has no Adam moments: it was not trained; limit params= to others"
            )
        self._shapes = {n: _matrix(params[n]) for n in used}
        if any(p.dtype == torch.float64 for p in params.values()):
            self._dtype = torch.float64
        self.cover = cover
        return True

    def end_stage(self) -> None:
        """Nothing is summed."""

    def found(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return G's diagonal by name, on the CPU, and what there is to say of it (as JSON)."""
        assert self.cover is not None, "a batch was added"
        tensors = {f"{n}:squares": self._diagonal(n).to(self._dtype) for n in self._shapes}
        layers = [[layer.weight, layer.bias] for layer in self.cover.layers]
        left_out = self.cover.left_out_aloud()
        return tensors, {"layers": layers, "left_out": left_out, "eps": self.moments.eps}

    def _diagonal(self, name: str) -> Tensor:
        v, steps = self.moments.square[name].double(), self.moments.steps[name]
        # A parameter that no step has moved has v = 0, and nothing to correct.
        corrected = (v / (1 - self.moments.beta2**steps) if steps else v).cpu()
        root = self.settings.kind == "adam_root"
        return (corrected.sqrt() if root else corrected).reshape(self._shapes[name])


def _matrix(p: Tensor) -> tuple[int, int]:
    """Return the sides of a parameter as `Gradient.matrix_shape` has them."""
    return (p.shape[0], p.shape[1:].numel()) if p.dim() > 1 else (1, p.numel())
