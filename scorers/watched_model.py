"""A model while the engine watches it: its plan, and what a name or pattern of parameters means."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curate.scorers.needs import Harvest
from curate.scorers.passes import Passes
from curate.scorers.plan import Plan, summary
from curate.scorers.prepared import bare, canonical_name, named_parameters
from curate.scorers.probe import PROBE_ROWS, discover, verify
from curate.scorers.protocol import Outputs
from curate.scorers.recompute import repeated_blocks
from curate.scorers.rows import count_rows

log = logging.getLogger("curate.engine")

LossFn = Callable[[nn.Module, Any], Outputs | Tensor]
HEAD = "head"
FIRST_LAYER = "first_encoder_layer"
"""The first of the model's repeated blocks (PRESENCE: Thakkar et al. 2023)."""


class WatchedModel:
    """A model with its plan, and which of its parameters a name or pattern means."""

    def __init__(self, model: nn.Module, outputs: LossFn, probe: bool) -> None:
        self.passes = Passes(bare(model), outputs, Plan())
        self._probe, self._seen_rows = probe, 0
        params = {canonical_name(n): p for n, p in self.passes.model.named_parameters()}
        self.all = tuple(params)
        self.trainable = tuple(n for n, p in params.items() if p.requires_grad)
        self._params: list[str] = []
        self._head = self._logits = False

    @property
    def paths(self) -> dict[str, str]:
        choices = self.passes.plan.choices
        return summary({name: choices[name] for name in self._needed() if name in choices})

    def check(self, params: str) -> None:
        """Raise ValueError where a pattern names no parameter that requires gradients."""
        if params == HEAD:
            return
        if _is_first_layer(params):
            self._first_layer_names()
            return
        try:
            pattern = re.compile(params)
        except re.error as error:
            raise ValueError(f"params={params!r} is no regular expression: {error}") from None
        if not self.trainable:
            raise ValueError(
                "no parameter of the model requires gradients; "
                "call model.requires_grad_(True), or on those to be scored"
            )
        if not any(pattern.search(name) for name in self.trainable):
            some = ", ".join(self.trainable[:5])
            raise ValueError(
                f"params={params!r} matches no trainable parameter; there are "
                f"{len(self.trainable)}, such as {some}"
            )

    def want(self, params: Sequence[str], *, head: bool, logits: bool = False) -> None:
        self._params, self._head, self._logits = list(params), head, logits

    def names(self, params: str) -> frozenset[str]:
        if params == HEAD:
            return frozenset(self._head_names())
        if _is_first_layer(params):
            return self._first_layer_names()
        return frozenset(n for n in self.trainable if re.search(params, n))

    def _head_names(self) -> tuple[str, ...]:
        head = self.passes.plan.head
        if head is None:
            raise ValueError(
                "cannot tell which parameters are the head: it takes Outputs with the logits as "
                "they come from one linear layer (or hidden and head); name it by params= instead"
            )
        return head.names

    def _first_layer_names(self) -> frozenset[str]:
        block = next(iter(repeated_blocks(self.passes.model)), None)
        names = [n for n in self.trainable if block is not None and n.startswith(f"{block}.")]
        if not names:
            raise ValueError(
                "params=first_encoder_layer: the model has no repeated blocks with trainable "
                "parameters; name the layer by a regular expression instead"
            )
        return frozenset(names)

    def _refuse_complex(self) -> None:
        params = named_parameters(self.passes.model)
        if found := [n for n in self._needed() if params[n].is_complex()]:
            raise ValueError(
                f"{found[0]} is complex, and per-row gradients are taken of real parameters only; "
                "name the others by params="
            )

    def _needed(self) -> list[str]:
        needed = frozenset().union(*map(self.names, self._params))
        return [name for name in self.all if name in needed]

    def ready(self, batch: Any) -> None:
        rows = count_rows(batch)
        # One row alone says nothing of what a second one would change.
        if self._seen_rows >= min(rows, PROBE_ROWS):
            return
        if self._probe:
            self.verify(batch)
        else:
            self._discover(batch)
            if doubtful := [n for n in self._needed() if self.passes.plan.doubtful(n)]:
                verify(self.passes, doubtful, batch)
            self._check_head()
        self._seen_rows = rows

    def _discover(self, batch: Any) -> None:
        if self._params or self._head or self._logits:
            discover(self.passes, list(self.all), batch)
        self._refuse_complex()

    def _check_head(self) -> None:
        head = self.passes.plan.head
        if self._head:
            self._head_names()
            assert head is not None, "it has names"
            if head.key is None or head.key not in self.passes.plan.layouts:
                raise ValueError("the head is used in a form whose gradient cannot be watched")

    def verify(self, batch: Any) -> None:
        self._discover(batch)
        verify(self.passes, self._needed(), batch)
        # Of rows that depend on one another no layer is understood: that is told first.
        self._check_head()
        self._seen_rows = count_rows(batch)
        for name, path in self.paths.items():
            log.debug("%s: %s", name, path)


def _is_first_layer(params: str) -> bool:
    return params.replace("-", "_") == FIRST_LAYER


def total(harvest: Harvest, key: str, names: Iterable[str]) -> Tensor:
    found = harvest.readouts[key]
    # A fixed order: the same bits in every process.
    values = [found[name] for name in sorted(names) if name in found]
    return torch.stack(values).sum(0) if values else torch.zeros_like(harvest.loss)


def alignment(harvest: Harvest) -> Tensor:
    # No gradient at the head means no direction: 0, like a zero gradient's cosine.
    return torch.zeros_like(harvest.loss) if harvest.alignment is None else harvest.alignment
