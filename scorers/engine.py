"""The signals engine: every per-row quantity from one forward and at most one backward pass.

Shapes: B rows.

`Engine` serves scorers, which name their needs as `Signal`s; `curate.signals` is for people.
"""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from curate.scorers.head import STATISTICS
from curate.scorers.passes import Harvest, Needs
from curate.scorers.probe import EngineError
from curate.scorers.protocol import RECORD_KINDS, Signal
from curate.scorers.readouts import sq_norm
from curate.scorers.watched_model import LossFn, WatchedModel, alignment, total

__all__ = ["Engine", "EngineError"]


class Engine:
    """Computes the union of some signals, batch by batch, for one model.

    The model is run in evaluation mode with its weights frozen, and left as it was found. Weights
    may be swapped in place between calls. Only parameters that require gradients count, except
    that the preset `head` names the head's in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: LossFn,
        wanted: Iterable[Signal],
        *,
        probe: bool = True,
        recompute: bool = False,
    ) -> None:
        """`outputs(model, batch)` gives `Outputs`, or the rows' losses [B] alone.

        `recompute`: a model's repeated blocks run a second time in the backward pass, so that no
        more than one block's activations are held at once; about a third more operations. It may
        be set and unset between batches.

        Raises:
            ValueError: a signal needs parameters that match nothing, or no pass computes it.
        """
        self.wanted = tuple(dict.fromkeys(wanted))
        if records := sorted({s.kind for s in self.wanted if s.kind in RECORD_KINDS}):
            raise ValueError(f"{', '.join(records)} come from training records, not from a pass")
        kinds = {s.kind for s in self.wanted}
        self._core = WatchedModel(model, outputs, probe)
        self._sets = [s.params for s in self.wanted if s.kind == "grad_sq_norm"]
        for params in self._sets:
            self._core.check(params)
        self._core.want(
            params=self._sets,
            head="weight_alignment" in kinds,
            logits="el2n_seq" in kinds,
        )
        self._kinds = kinds
        self.recompute = recompute

    @property
    def recompute(self) -> bool:
        """Whether repeated blocks run twice, to save memory."""
        return self._core.passes.recompute.on

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self._core.passes.recompute.on = on

    @property
    def differentiates(self) -> bool:
        """Whether there is a backward pass."""
        return bool(self._kinds & {"grad_sq_norm", "el2n_seq", "weight_alignment"})

    @property
    def paths(self) -> dict[str, str]:
        """How each parameter's gradient is taken; known after the first batch."""
        return self._core.paths

    def verify(self, batch: Any) -> None:
        """Find the parameters' paths on this batch and check them against autograd row by row.

        Done on the first batch by itself.

        Raises:
            EngineError: a parameter that no path gets right, or rows that depend on one another.
        """
        self._core.verify(batch)

    def __call__(self, batch: Any) -> dict[Signal, Float[Tensor, " b"]]:
        """Return every wanted signal [B], float32 (float64 for a float64 model), on its device."""
        core = self._core
        core.ready(batch)
        needs = Needs(
            readouts={p: (core.names(p), sq_norm) for p in self._sets},
            statistics=bool(self._kinds & STATISTICS),
            logit_norm="el2n_seq" in self._kinds,
            alignment="weight_alignment" in self._kinds,
        )
        harvest = core.passes.run(batch, _merged(needs))
        return {s: _signal(s, harvest, core) for s in self.wanted}


def _merged(needs: Needs) -> Needs:
    """Several sets of parameters share one squared norm per parameter."""
    if not needs.readouts:
        return needs
    merged = {"sq_norm": (needs.params, sq_norm)}
    return Needs(merged, needs.statistics, needs.logit_norm, needs.alignment)


def _signal(signal: Signal, harvest: Harvest, core: "WatchedModel") -> Tensor:
    if signal.kind == "loss":
        return harvest.loss
    if signal.kind == "grad_sq_norm":
        return total(harvest, "sq_norm", core.names(signal.params))
    if signal.kind == "el2n_seq":
        assert harvest.logit_norm is not None, "asked for"
        return harvest.logit_norm
    if signal.kind == "weight_alignment":
        return alignment(harvest)
    return harvest.statistics[signal.kind]
