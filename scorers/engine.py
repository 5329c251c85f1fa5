"""The signals engine: every per-row quantity from one forward and at most one backward pass.

Shapes: B rows, M groups of a target, N coordinates of a row's input.

The gradient of the target logit takes a backward pass of its own, on the same forward pass.
`Engine` serves scorers, which name their needs as `Signal`s; `curate.signals` is for people.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curate.scorers.adam_readout import AdamComparison
from curate.scorers.curvature_signals import CurvedSignals
from curate.scorers.expert_signals import ExpertSignals
from curate.scorers.fallback import summed_gradient
from curate.scorers.gradient_vectors import GradientVectors
from curate.scorers.head import STATISTICS
from curate.scorers.needs import Harvest, Needs
from curate.scorers.plan import Plan
from curate.scorers.prepared import named_parameters, prepared
from curate.scorers.probe import EngineError
from curate.scorers.protocol import (
    ADAM_KINDS,
    EXPERT_KINDS,
    RECORD_KINDS,
    SPREAD_KINDS,
    TARGET_KINDS,
    Outputs,
    Signal,
)
from curate.scorers.readouts import Dots, Readout, TwoSidedSketch, sq_norm
from curate.scorers.row_vectors import Sketch, embedding, sketches
from curate.scorers.token_angles import TokenAngles
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
        if spreads := sorted(kinds & SPREAD_KINDS):
            raise ValueError(f"{', '.join(spreads)} is made of several checkpoints: see RunState")
        self._core = WatchedModel(model, outputs, probe)
        self.curved = CurvedSignals(self.wanted)
        self.expert = ExpertSignals(self.wanted, self._core)
        plain = [s for s in self.wanted if not s.curvature]
        self._sets = [s.params for s in plain if s.kind == "grad_sq_norm"]
        self._target_sets = [s.params for s in plain if s.kind in TARGET_KINDS]
        self._compared = [s.params for s in self.wanted if s.kind in TARGET_KINDS]
        self._directions: Mapping[str, Tensor] = {}
        self.sketch: TwoSidedSketch | None = None
        """Where set, `directions` are sketches of this kind, and products those of sketches."""
        self._target_norms: dict[str, Tensor] = {}
        self.row_sketch: Sketch | None = None
        """The kind of the signal `sketch`; set before the first batch."""
        self._sketched = [s.params for s in self.wanted if s.kind == "sketch"]
        self.comparisons: Mapping[Signal, AdamComparison] = {}
        """By each wanted `adam_target_dot`, for the weights that are loaded."""
        self._adam = sorted({_comparison(s) for s in self.wanted if s.kind in ADAM_KINDS})
        gradients = [*self._sets, *self._target_sets, *self._sketched]
        gradients += [*(s.params for s in self._adam), *self.curved.params, *self.expert.params]
        self._vectors = GradientVectors(self._core, self.wanted)
        self._angles = TokenAngles(self._core.passes.model, self.wanted)
        gradients += self._vectors.params
        for params in gradients:
            self._core.check(params)
        self._core.want(
            params=gradients,
            head=bool(kinds & {"weight_alignment", "embedding"}),
            logits=bool(kinds & {"el2n_seq", "logit_grad"}),
        )
        self._kinds = kinds
        self.recompute = recompute

    @property
    def model(self) -> nn.Module:
        """The model itself, without wrappers."""
        return self._core.passes.model

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
        kinds = {"grad_sq_norm", "el2n_seq", "weight_alignment", "target_dot", "logit_grad"}
        kinds |= {"sketch", "grad_vector"}
        return bool(self._kinds & (kinds | ADAM_KINDS | EXPERT_KINDS))

    @property
    def paths(self) -> dict[str, str]:
        """How each parameter's gradient is taken; known after the first batch."""
        return self._core.paths

    @property
    def directions(self) -> Mapping[str, Float[Tensor, "m ..."]]:
        """The target groups' mean gradients by parameter, for the weights that are loaded.

        Signals that compare rows with a target need them. Set anew where weights are swapped.
        """
        return self._directions

    @directions.setter
    def directions(self, given: Mapping[str, Float[Tensor, "m ..."]]) -> None:
        self._directions, self._target_norms = given, {}

    def target_params(self, batch: Any, params: str | None = None) -> dict[str, Tensor]:
        """Return the parameters that are compared with a target, or those that `params` names."""
        self._core.ready(batch)
        sets = self._compared if params is None else [params]
        names = self._union(sets)
        own = named_parameters(self._core.passes.model)
        return {name: own[name].detach() for name in self._core.all if name in names}

    def summed_gradient(
        self,
        batch: Any,
        among: Collection[str] | None = None,
        row_weights: Float[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        """Return the rows' losses and their sum's gradient, by plain autograd over the batch.

        Of the parameters that are compared with a target, or those `among` all; one that plays
        no part is absent. Losses count by their `row_weights`, and are returned so.
        """
        passes = self._core.passes
        names = self.target_params(batch) if among is None else among
        own = named_parameters(passes.model)

        def losses(some: Any) -> Tensor:
            loss = passes.evaluate(some).loss
            return loss if row_weights is None else loss * row_weights.to(loss.dtype)

        with prepared(passes.model):
            return summed_gradient(batch, losses, {n: own[n] for n in self._core.all if n in names})

    def read(
        self, batch: Any, names: Collection[str], readouts: Mapping[str, Readout]
    ) -> tuple[Float[Tensor, " b"], dict[str, dict[str, Tensor]]]:
        """Return the rows' losses and what some readouts give of these parameters' gradients."""
        self._core.ready(batch)
        among = frozenset(names)
        needs = Needs({key: (among, readout) for key, readout in readouts.items()})
        harvest = self._core.passes.run(batch, needs)
        return harvest.loss, harvest.readouts

    def evaluate(self, batch: Any) -> Outputs:
        """Return what the task makes of a forward pass, nothing differentiated."""
        with prepared(self.model), torch.no_grad():
            return self._core.passes.evaluate(batch)

    @property
    def plan(self) -> Plan:
        """How each parameter's gradient is taken, and its uses; known after the first batch."""
        return self._core.passes.plan

    def verify(self, batch: Any) -> None:
        """Find the parameters' paths on this batch and check them against autograd row by row.

        Done on the first batch by itself.

        Raises:
            EngineError: a parameter that no path gets right, or rows that depend on one another.
        """
        self._core.verify(batch)

    def __call__(self, batch: Any) -> dict[Signal, Float[Tensor, "b ..."]]:
        """Return every wanted signal [B], float32 (float64 for a float64 model), on its device.

        Those that compare a row with a target are [B, M], sketches, embeddings and probabilities a
        vector per row; the logit's gradient is [B, N], of tokens in the model's own dtype.
        """
        core = self._core
        core.ready(batch)
        needs = Needs(
            readouts=self._readouts(),
            statistics=bool(self._kinds & STATISTICS),
            logit_norm="el2n_seq" in self._kinds,
            alignment="weight_alignment" in self._kinds,
            logit_grad="logit_grad" in self._kinds,
            hidden="embedding" in self._kinds,
            probs="probs" in self._kinds,
        )
        with self._angles.watching():
            harvest = core.passes.run(batch, needs)
        angles = self._angles.values(harvest, batch)
        return {s: angles[s] if s in angles else self._signal(s, harvest) for s in self.wanted}

    def _readouts(self) -> dict[str, tuple[frozenset[str], Readout]]:
        """Several sets of parameters share one squared norm, and one dot, per parameter."""
        readouts: dict[str, tuple[frozenset[str], Readout]] = {}
        if self._sets:
            readouts["sq_norm"] = self._union(self._sets), sq_norm
        if self._target_sets:
            assert self._directions, "a target's directions are set before the first batch"
            read = self.sketch or Dots(dict(self._directions))
            readouts["target"] = self._union(self._target_sets), read
        if self._sketched:
            assert self.row_sketch is not None, "set before the first batch"
            readouts["sketch"] = self._union(self._sketched), self.row_sketch
        for signal in self._adam:
            assert signal in self.comparisons, "set before the first batch"
            readouts[str(signal)] = self._core.names(signal.params), self.comparisons[signal]
        readouts |= self._vectors.readouts()
        return readouts | self.curved.readouts(self._directions) | self.expert.readouts()

    def sketched(self, params: str) -> list[str]:
        """Return the parameters that a sketch is of, in the order of its parts."""
        names = self._core.names(params)
        return [name for name in self._core.all if name in names]

    def _union(self, sets: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*map(self._core.names, sets))

    def _signal(self, signal: Signal, harvest: Harvest) -> Tensor:
        core = self._core
        if signal.kind == "loss":
            return harvest.loss
        if signal.curvature:
            return self.curved.value(signal, harvest)
        if signal.kind in EXPERT_KINDS:
            return self.expert.value(signal, harvest)
        if signal.kind == "grad_vector":
            return self._vectors.value(signal, harvest)
        if signal.kind == "grad_sq_norm":
            return total(harvest, "sq_norm", core.names(signal.params))
        if signal.kind == "target_dot":
            zero = harvest.loss.new_zeros(len(harvest.loss), self._groups)
            found, names = harvest.readouts["target"], sorted(core.names(signal.params))
            if self.sketch is not None:
                found = {n: found[n] @ self._directions[n].T for n in names if n in found}
            return torch.stack([zero, *(found[n] for n in names if n in found)]).sum(0)
        if signal.kind == "target_norm":
            return self._target_norm(signal.params).expand(len(harvest.loss), -1)
        if signal.kind in ADAM_KINDS:
            square, dots = self._adam_values(_comparison(signal), harvest)
            return square if signal.kind == "adam_sq_norm" else dots
        if signal.kind == "sketch":
            assert self.row_sketch is not None, "set before the first batch"
            return sketches(harvest, "sketch", self.sketched(signal.params), self.row_sketch)
        if signal.kind == "embedding":
            return embedding(harvest, core)
        if signal.kind == "probs":
            assert harvest.probs is not None, "asked for"
            return harvest.probs
        if signal.kind == "el2n_seq":
            assert harvest.logit_norm is not None, "asked for"
            return harvest.logit_norm
        if signal.kind == "weight_alignment":
            return alignment(harvest)
        if signal.kind in ("logit_grad", "coordinates"):
            assert harvest.logit_grad is not None, "asked for"
            is_count = signal.kind == "coordinates"
            return harvest.logit_grad.coordinates if is_count else harvest.logit_grad.values
        return harvest.statistics[signal.kind]

    def _adam_values(self, signal: Signal, harvest: Harvest) -> tuple[Tensor, Tensor]:
        names, own = self._core.names(signal.params), named_parameters(self._core.passes.model)
        shapes = {name: own[name].shape for name in names}
        return self.comparisons[signal].values(harvest.readouts[str(signal)], shapes, harvest.loss)

    @property
    def _groups(self) -> int:
        return len(next(iter(self._directions.values())))

    def _target_norm(self, params: str) -> Float[Tensor, " m"]:
        if params not in self._target_norms:
            found = [self._directions[name] for name in sorted(self._core.names(params))]
            norms = [torch.linalg.vector_norm(v.reshape(len(v), -1), dim=1) for v in found]
            self._target_norms[params] = torch.stack(norms).norm(dim=0)
        return self._target_norms[params]


def _comparison(signal: Signal) -> Signal:
    """Return the signal by which a comparison with Adam's step is known."""
    return replace(signal, kind="adam_target_dot")
