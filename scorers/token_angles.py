"""Angles between the hidden states of a row's tokens, where they enter the last block's MLP.

Shapes: B rows, S sequences, T tokens, D hidden size.

Pairs are never made: with unit vectors u_t, the sum of all cosines is ‖Σ_t u_t‖².
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from curate.kernels.summation import accumulable
from curate.scorers.logit_grad import own_tokens
from curate.scorers.needs import Harvest
from curate.scorers.prepared import canonical_name
from curate.scorers.protocol import ANGLE_KINDS, Batch, Signal
from curate.scorers.row_map import RowMap
from curate.scorers.rows import sequences_of

UP = re.compile(
    r"(^|\.)("
    r"mlp\.(up_proj|gate_up_proj|c_fc|fc_in|fc1|dense_h_to_4h)"  # Llama, Phi-3, GPT-2, GPT-J, NeoX
    r"|layers\.\d+\.fc1"  # OPT
    r"|intermediate\.dense|ffn\.lin1|mlp\.Wi"  # BERT and ViT, DistilBERT, ModernBERT
    r"|blocks\.\d+\.widen"  # the built-in gpt
    r")$"
)
"""Names of the layer that widens the hidden state; the gate beside it has the same input."""


def up_projection(model: nn.Module, layer: str) -> nn.Module:
    """Return the last module whose name matches `layer`, or by structure where that is "".

    Raises:
        ValueError: there is none, or `layer` is no regular expression.
    """
    try:
        pattern = re.compile(layer) if layer else UP
    except re.error as error:
        raise ValueError(f"layer={layer!r} is no regular expression: {error}") from None
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    found = [m for name, m in modules if pattern.search(canonical_name(name))]
    if found:
        return found[-1]
    if layer:
        raise ValueError(f"layer={layer!r} matches no module of the model")
    raise ValueError(
        "angle_concentration looks at what enters the last block's MLP, and found no layer of a "
        "known name in this model: name it by layer=REGEX"
    )


NO_TOKEN = (
    "there are no angles, as no token of the row's own is run: the last of a document predicts "
    "nothing, so that behind a prompt it needs two"
)
"""Why a row's angles are NaN where its loss is a number."""


class TokenAngles:
    """Reads the angles off forward passes."""

    def __init__(self, model: nn.Module, wanted: Iterable[Signal]) -> None:
        self._model = model
        self._signals = [s for s in wanted if s.kind in ANGLE_KINDS]
        self._layers = {s.params: up_projection(model, s.params) for s in self._signals}
        self._seen: dict[str, Tensor] = {}
        self._is_over = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: what enters the layers is kept, of the model's last run."""
        if not self._layers:
            yield
            return

        def start(module: nn.Module, args: Any) -> None:
            self._is_over = False

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._is_over = True  # a block that runs again does so in the backward pass

        def keep(layer: str) -> Any:
            def enter(module: nn.Module, args: Any) -> None:
                if not self._is_over:
                    self._seen[layer] = args[0].detach()

            return enter

        self._seen.clear()
        self._is_over = False
        hooks = [m.register_forward_pre_hook(keep(name)) for name, m in self._layers.items()]
        hooks.append(self._model.register_forward_pre_hook(start))
        hooks.append(self._model.register_forward_hook(end))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def values(self, harvest: Harvest, batch: Any) -> dict[Signal, Float[Tensor, " b"]]:
        """Return the wanted signals of the run that was watched, and forget it.

        Raises:
            ValueError: the layer did not run, or sees no tokens.
        """
        found: dict[Signal, Tensor] = {}
        for layer in self._layers:
            if layer not in self._seen:
                raise ValueError(
                    f"the layer {layer or 'of the last MLP'} was not run; name another"
                )
            angles = _angles(self._seen[layer], harvest, batch)
            for signal in self._signals:
                if signal.params == layer:
                    found[signal] = angles[signal.kind].to(harvest.loss.dtype)
        self._seen.clear()
        return found


def _angles(h: Tensor, harvest: Harvest, batch: Any) -> dict[str, Float[Tensor, " b"]]:
    sequences, row_ids = sequences_of(batch)
    row_map = RowMap(len(harvest.loss), row_ids)
    own = own_tokens(batch, harvest.targets)
    h = _by_sequence(h, sequences)
    if own is None:
        own = h.new_ones(h.shape[:2], dtype=torch.bool)
    if own.shape != h.shape[:2]:
        raise ValueError(
            f"the layer sees {h.shape[1]} tokens of a row at once, but the batch tells of "
            f"{own.shape[1]}: name another layer"
        )
    unit = nn.functional.normalize(accumulable(h), dim=-1)
    is_prompt = _prompt(batch, own)
    is_own = own & ~is_prompt
    own_unit, own_sum = _masked(unit, is_own), row_map.add(_sum(unit, is_own))
    count = row_map.total(is_own.to(unit.dtype))
    with_itself = row_map.total(own_unit.square().sum(2))
    all_pairs = own_sum.square().sum(1)
    in_order = row_map.end_to_end(own_unit, 1)
    neighbours = (in_order[:, 1:] * in_order[:, :-1]).sum((1, 2))
    prompts = row_map.total(is_prompt.to(unit.dtype))
    across = (own_sum * row_map.add(_sum(unit, is_prompt))).sum(1)
    # A row of one token has no pair; one of none has no angle, and NaN.
    different = (all_pairs - with_itself) / (count * (count - 1)).clamp(min=1)
    return {
        "angle_paper": all_pairs / count**2,
        "angle_pairs": torch.where(count > 0, different, torch.nan),
        "angle_code": ((all_pairs + with_itself) / 2 + neighbours) / count**2,
        "angle_prompt": across / (count * prompts).clamp(min=1),
    }


def _by_sequence(h: Tensor, sequences: int) -> Float[Tensor, "s t d"]:
    """Return the hidden states with the sequences first; some models lay tokens end to end."""
    if h.dim() == 2 and len(h) > sequences and len(h) % sequences == 0:
        h = h.reshape(sequences, -1, h.shape[-1])
    if h.dim() != 3 or len(h) != sequences:
        raise ValueError(
            f"angles are between the tokens of a row, but what enters the layer has shape "
            f"{tuple(h.shape)} for {sequences} sequences: name another layer"
        )
    return h


def _prompt(batch: Any, own: Bool[Tensor, "s t"]) -> Bool[Tensor, "s t"]:
    """Return which tokens are among the first of their sequence that make the prompt."""
    prompt = batch.prompt if isinstance(batch, Batch) else None
    if prompt is None:
        return torch.zeros_like(own)
    return torch.arange(own.shape[1], device=own.device) < prompt.to(own.device)[:, None]


def _masked(unit: Tensor, mask: Tensor) -> Float[Tensor, "s t d"]:
    return unit.masked_fill(~mask[..., None], 0.0)


def _sum(unit: Tensor, mask: Tensor) -> Float[Tensor, "s d"]:
    return _masked(unit, mask).sum(1)
