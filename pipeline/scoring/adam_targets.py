"""What LESS compares rows with at each checkpoint: unit gradients of the target, Adam's moments.

Shapes: B rows of a batch, M groups, k numbers of a projection.
"""

import hashlib
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from curate.pipeline.models.moments import read_moments
from curate.pipeline.scoring.target_gradients import MOST_BYTES, Directions, TargetGradients
from curate.pipeline.scoring.work import Work, model_signals
from curate.scorers.adam_readout import AdamComparison, Moments
from curate.scorers.engine import Engine
from curate.scorers.protocol import ADAM_KINDS, Batch, Signal
from curate.scorers.readouts import Projection, Readout, sq_norm

PROJECTION_SEED = 0
WHOLE = ""
"""The name that a projection of all parameters together goes by."""


class AdamTargets:
    """Gives the engine's comparisons with Adam's step at a checkpoint, on the device.

    `keeps` as in `TargetGradients`.
    """

    def __init__(self, work: Work, device: torch.device, keeps: bool) -> None:
        self.work, self.device = work, device
        wanted = [s for s in model_signals(work.made) if s.kind in ADAM_KINDS]
        self.signals = sorted({replace(s, kind="adam_target_dot") for s in wanted})
        self._targets = {
            of: UnitTarget(work, device, keeps, *of)
            for of in dict.fromkeys((s.params, s.projection) for s in self.signals)
        }
        self._held: dict[int, Moments] = {}

    def at(self, k: int, engine: Engine) -> dict[Signal, AdamComparison]:
        """Return them at checkpoint k, whose weights `engine` has.

        Raises:
            ValueError: the checkpoint has no moments, or the target cannot be used.
        """
        if k not in self._held:
            moments = self._moments(k, engine)
            size = 8 * sum(v.numel() for v in moments.mean.values())
            if size * len(self.work.checkpoints) > MOST_BYTES:
                self._held.clear()
            self._held[k] = moments
        # Made anew: what a comparison holds of the target is the target's to hold or to let go.
        return {s: self._comparison(s, k, engine, self._held[k]) for s in self.signals}

    def _comparison(
        self, signal: Signal, k: int, engine: Engine, moments: Moments
    ) -> AdamComparison:
        target = self._targets[signal.params, signal.projection]
        directions = target.at(k, engine)
        return AdamComparison(moments, signal.adam, directions, target.projection or target.sketch)

    def _moments(self, k: int, engine: Engine) -> Moments:
        found = read_moments(self.work.checkpoints[k].path, engine.model)
        mean, square = (
            {name: v.to(self.device) for name, v in moment.items()}
            for moment in (found.mean, found.square)
        )
        return replace(found, mean=mean, square=square)


class UnitTarget(TargetGradients):
    """The mean over each group of its rows' gradients, each row's brought to length 1 first.

    Over the parameters that `params` names; a row without a gradient counts as 0. With a
    `projection` it is of the rows' projected gradients, brought to length 1 once projected.
    """

    def __init__(
        self, work: Work, device: torch.device, keeps: bool, params: str, projection: int
    ) -> None:
        super().__init__(work, device, keeps)
        self.params = params
        self.projection = Projection(PROJECTION_SEED, projection) if projection else None

    def _name(self, k: int) -> str:
        folder, _, name = super()._name(k).rpartition("/")
        of = hashlib.sha256(self.params.encode()).hexdigest()[:8]
        size = f"-{self.projection.k}" if self.projection else ""
        return f"{folder}/unit-{of}{size}-{name}"

    def _params(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        return engine.target_params(batch, self.params)

    def _start(self, engine: Engine, batch: Batch) -> Directions:
        if self.projection is None:
            return super()._start(engine, batch)
        dtype = torch.promote_types(next(iter(self._params(engine, batch).values())).dtype, _F32)
        zeros = partial(torch.zeros, len(self.target.groups), self.projection.k)
        return {WHOLE: zeros(dtype=dtype, device=self.device)}

    def _summed(self, engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        names = self._params(engine, batch)
        if self.projection is not None:
            loss, found = engine.read(batch, names, {"projection": self.projection})
            rows = _total(found["projection"], loss)
            scale = _inverse(torch.linalg.vecdot(rows, rows))
            return loss, {WHOLE: scale @ rows}
        readouts: dict[str, Readout] = {"square": sq_norm}
        if self.sketch is not None:
            readouts["sketch"] = self.sketch
        loss, found = engine.read(batch, names, readouts)
        scale = _inverse(_total(found["square"], loss))
        if self.sketch is not None:
            return loss, {name: scale @ s for name, s in found["sketch"].items()}
        _, grads = engine.summed_gradient(batch, names, scale)
        return loss, grads


_F32 = torch.float32


def _total(found: dict[str, Tensor], loss: Float[Tensor, " b"]) -> Tensor:
    """Return the sum over parameters, in a fixed order."""
    zero = torch.zeros_like(loss)
    values = [found[name] for name in sorted(found)]
    return torch.stack(values).sum(0) if values else zero


def _inverse(square: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return 1 / length, 0 where there is none."""
    # Squares come in float32: below its normal range they have no digits left, and count as none.
    is_none = square < torch.finfo(torch.float32).tiny
    length = square.masked_fill(is_none, 1).masked_fill(square.isinf(), torch.nan)
    return length.rsqrt().masked_fill(is_none, 0)
