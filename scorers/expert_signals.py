"""What leads from a model's weights to an expert's, and rows' inner products with it.

Shapes: B rows.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from curate.kernels.grad_norm import accumulable
from curate.scorers.needs import Harvest
from curate.scorers.prepared import named_parameters
from curate.scorers.protocol import EXPERT_KINDS, Signal
from curate.scorers.readouts import Dots, Readout
from curate.scorers.watched_model import WatchedModel, total

Weights = Callable[[Collection[str]], Mapping[str, Tensor]]
"""Gives an expert's parameters by name; those that it lacks are absent."""
KEY = "weights"


class ExpertSignals:
    """Signals of kinds `weights_dot` and `weights_norm`, for the weights that a model has now.

    The differences θ - θ_expert of the wanted parameters are made when they are first asked for,
    in float32 at least, and kept until `compare_with` is called anew: where weights are swapped.
    """

    def __init__(self, wanted: Iterable[Signal], core: WatchedModel) -> None:
        self._core = core
        self.params = sorted({s.params for s in wanted if s.kind in EXPERT_KINDS})
        self._weights: Weights | None = None
        self._differences: dict[str, Tensor] = {}

    def compare_with(self, weights: Weights) -> None:
        """Take these for the expert's weights."""
        self._weights, self._differences = weights, {}

    def check(self) -> None:
        """Make the differences, of a model whose parameters are known from a batch.

        Raises:
            ValueError: the expert lacks a parameter, or has the model's own weights.
        """
        if not self.params or self._differences:
            return
        assert self._weights is not None, "an expert is given before the first batch"
        own = named_parameters(self._core.passes.model)
        names = sorted(frozenset().union(*map(self._core.names, self.params)))
        theirs = self._weights(names)
        for name in names:
            if name not in theirs or theirs[name].shape != own[name].shape:
                has = "none" if name not in theirs else f"one of {list(theirs[name].shape)}"
                raise ValueError(
                    f"the weights cannot be compared: the model has a parameter {name} of "
                    f"{list(own[name].shape)}, the reference {has}; give a reference that the "
                    "checkpoints' model was trained into, or name other parameters by params="
                )
        found = {
            name: (
                accumulable(own[name].detach())
                - accumulable(theirs[name].detach().to(own[name].device))
            )[None]
            for name in names
        }
        for params in self.params:
            if not any(found[name].any() for name in self._core.names(params)):
                raise ValueError(
                    "the reference has the weights of the checkpoint itself"
                    f"{f' in {params!r}' if params else ''}: nothing leads from one to the other, "
                    "so give the model that was trained further"
                )
        self._differences = found

    def readouts(self) -> dict[str, tuple[frozenset[str], Readout]]:
        """Return one inner product per parameter, shared by all sets of them."""
        if not self.params:
            return {}
        self.check()
        return {KEY: (frozenset(self._differences), Dots(self._differences))}

    def value(self, signal: Signal, harvest: Harvest) -> Float[Tensor, " b"]:
        """Return the signal of each row."""
        names = self._core.names(signal.params)
        if signal.kind == "weights_dot":
            dots = total(harvest, KEY, names)
            return dots[:, 0] if dots.dim() == 2 else dots  # [B] where no row has a gradient
        parts = [torch.linalg.vector_norm(self._differences[name]) for name in sorted(names)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(parts)).to(harvest.loss.dtype)
        return norm.expand(len(harvest.loss))
