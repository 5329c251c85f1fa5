"""What several tests of scoring ask: how often a scoring pass runs the model."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from curate.pipeline.scoring import signal_pass
from curate.pipeline.scoring.signal_pass import SignalPass


@pytest.fixture
def passes_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of every unit that is scored from now on: its batches, forward and backward passes."""
    counts: Counter[str] = Counter()
    grad, call, load = torch.autograd.grad, SignalPass.__call__, signal_pass.load_model
    seen: list[tuple[int, int, int]] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        counts["backward"] += 1
        return grad(*arguments, **named)

    def counting(*arguments: Any) -> nn.Module:
        model = load(*arguments)
        model.register_forward_pre_hook(lambda *_: counts.update(["forward"]))
        return model

    def scoring(self: SignalPass, batches: Any, begin: Any) -> Any:
        counts.clear()
        out = call(self, batches, begin)
        seen.append((len(batches), counts["forward"], counts["backward"]))
        return out

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(signal_pass, "load_model", counting)
    monkeypatch.setattr(SignalPass, "__call__", scoring)
    return seen
