"""The engine's squared norms against autograd on the row alone, before anything is timed."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.scorers.needs import Needs
from curate.scorers.passes import Passes
from curate.scorers.protocol import IGNORE, Batch
from curate.scorers.readouts import sq_norm

# Elements of logits, and of attention scores over all layers, of a row in float64: 2 and 4 GiB.
_LOGITS, _SCORES = 1 << 28, 1 << 29


def compare_with_autograd(passes: Passes, batch: Batch) -> float:
    """Return the largest relative error of two rows' squared norms against float64 autograd.

    Rows that are too long for float64 are cut for that; at full length they are compared with
    autograd in the model's own dtype.

    Raises:
        RuntimeError: an error is larger than that of autograd itself in the model's dtype and 1e-3
            in 32 bits or 3e-2 in 16.
    """
    short, model = _short(batch, passes.model), passes.model
    exact = copy.deepcopy(model).double()
    worst = _compare(passes, short, exact)
    del exact
    if short is not batch:
        _compare(passes, batch, model)
    return worst


def _compare(passes: Passes, batch: Batch, exact: nn.Module) -> float:
    params = dict(passes.model.named_parameters())
    found = passes.run(batch, Needs({"n": (frozenset(params), sq_norm)})).readouts["n"]
    tolerance = 1e-3 if next(iter(params.values())).dtype == torch.float32 else 3e-2
    worst = 0.0
    for row in {0, batch.rows - 1}:
        alone = batch.select_rows([row])
        got = sum(float(values[row]) for values in found.values())
        truth = _sq_norm(exact, alone)
        error = abs(got - truth) / truth
        if error > tolerance + abs(_sq_norm(passes.model, alone) - truth) / truth:
            raise RuntimeError(f"row {row}: squared norm {got}, autograd says {truth}")
        worst = max(worst, error)
    return worst


def _sq_norm(model: nn.Module, batch: Batch) -> float:
    """By the plainest loss there is: nothing of ours."""
    params = [p for p in model.parameters() if p.requires_grad]
    cast = next(iter(params)).dtype
    inputs = {k: v.to(cast) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    out = model(**inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    if cast != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORE)
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in grads if g is not None)


def _short(batch: Batch, model: Any) -> Batch:
    if "input_ids" not in batch.inputs:
        return batch
    length, config = batch.inputs["input_ids"].shape[1], model.config
    scores = _SCORES // (config.num_hidden_layers * config.num_attention_heads)
    tokens = min(length, int(scores**0.5))
    if batch.targets.dim() == 2:
        tokens = min(tokens, _LOGITS // config.vocab_size)
    if tokens == length:
        return batch
    inputs = {name: x[:, :tokens] for name, x in batch.inputs.items()}
    targets = batch.targets
    if targets.dim() == 2:
        targets = targets[:, :tokens].clone()
        targets[:, -1] = IGNORE
    return Batch(inputs, targets, batch.rows)
