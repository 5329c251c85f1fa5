"""Inner products of rows with what leads to an expert's weights, against autograd and subtraction.

Shapes: B rows.
"""

import pytest
import torch
from torch import Tensor, nn

from curate.scorers.expert_signals import ExpertSignals
from curate.scorers.needs import Harvest
from curate.scorers.parts import Full, Gradient
from curate.scorers.protocol import Signal
from curate.scorers.watched_model import WatchedModel

B = 3
DOT, NORM = Signal("weights_dot"), Signal("weights_norm")
FIRST = Signal("weights_dot", "0")
SIZES = {"0.weight": (3, 4), "0.bias": (3,), "2.weight": (2, 3), "2.bias": (2,)}


def network(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def core(model: nn.Module) -> WatchedModel:
    return WatchedModel(model, lambda m, x: m(x).sum(1), probe=False)


def signals(model: nn.Module, weights: dict[str, Tensor], *wanted: Signal) -> ExpertSignals:
    found = ExpertSignals(wanted or (DOT, NORM, FIRST), core(model))
    found.compare_with(lambda names: {n: weights[n] for n in names if n in weights})
    return found


def harvest(found: ExpertSignals, g: dict[str, Tensor]) -> Harvest:
    read = {
        key: {n: read(Gradient(n, g[n].shape[1:], full=Full(g[n]))) for n in names if n in g}
        for key, (names, read) in found.readouts().items()
    }
    return Harvest(torch.zeros(B, dtype=torch.float64), read)


GRADIENTS = {n: torch.randn(B, *size, dtype=torch.float64) for n, size in SIZES.items()}


def test_the_difference_is_the_models_weights_less_the_experts() -> None:
    model, expert = network(0), dict(network(1).named_parameters())
    found = signals(model, expert)
    assert found.params == ["", "0"]
    parts, squares = {}, {}
    for name, p in model.named_parameters():
        difference = (p - expert[name]).detach()
        parts[name] = (GRADIENTS[name] * difference).flatten(1).sum(1)
        squares[name] = difference.square().sum()
    got = harvest(found, GRADIENTS)
    torch.testing.assert_close(found.value(DOT, got), sum(parts.values()))
    torch.testing.assert_close(found.value(FIRST, got), parts["0.weight"] + parts["0.bias"])
    norm = sum(squares.values()).sqrt().expand(B)
    torch.testing.assert_close(found.value(NORM, got), norm)


def test_a_step_along_the_difference_changes_the_loss_by_the_inner_product() -> None:
    """A finite difference of the loss on the way to the expert; of second order in the step."""
    model, expert, step = network(0), network(1), 1e-5
    x = torch.randn(B, 4, dtype=torch.float64)

    def loss(share: float) -> Tensor:
        mixed = {n: p + share * (p - q) for (n, p), q in zip(
            model.named_parameters(), expert.parameters(), strict=True)}  # fmt: skip
        return torch.func.functional_call(model, mixed, x).square().sum(1)

    rows = [torch.autograd.grad(loss(0.0)[b], list(model.parameters())) for b in range(B)]
    g = {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(SIZES)}
    found = signals(model, dict(expert.named_parameters()))
    slope = (loss(step) - loss(-step)).detach() / (2 * step)
    torch.testing.assert_close(found.value(DOT, harvest(found, g)), slope, rtol=1e-6, atol=1e-8)


def test_differences_are_taken_in_float32_at_least() -> None:
    """In bfloat16 256 - 1/256 is 256."""
    model, expert = network(0, torch.bfloat16), network(0, torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(model.parameters(), expert.parameters(), strict=True):
            p.fill_(256.0)
            q.fill_(1 / 256)
    found = signals(model, dict(expert.named_parameters()))
    _, (_, read) = found.readouts().popitem()
    assert (read.directions["0.bias"] == 256 - 1 / 256).all()


def test_new_weights_are_compared_with_anew() -> None:
    model, expert = network(0), dict(network(1).named_parameters())
    found = signals(model, expert)
    (_, first), (_, again) = (found.readouts()["weights"] for _ in range(2))
    assert first.directions is again.directions  # made once
    other = dict(network(2).named_parameters())
    found.compare_with(lambda names: other)
    (_, changed) = found.readouts()["weights"]
    true = (model[0].bias - other["0.bias"]).detach()[None]
    torch.testing.assert_close(changed.directions["0.bias"], true)


def test_rows_without_a_gradient() -> None:
    found = signals(network(0), dict(network(1).named_parameters()))
    assert found.value(DOT, harvest(found, {})).tolist() == [0.0] * B


def test_nothing_is_read_where_nothing_is_wanted() -> None:
    found = ExpertSignals([Signal("grad_sq_norm")], core(network(0)))
    assert found.readouts() == {} and found.params == []
    found.check()


def test_what_cannot_be_compared_is_refused() -> None:
    model, own = network(0), dict(network(0).named_parameters())
    lacking = {n: p for n, p in own.items() if n != "2.bias"}
    with pytest.raises(ValueError, match=r"has a parameter 2\.bias of \[2\], the reference none"):
        signals(model, lacking).check()
    with pytest.raises(ValueError, match=r"the reference one of \[5\]"):
        signals(model, own | {"2.bias": torch.zeros(5)}).check()
    with pytest.raises(ValueError, match="the weights of the checkpoint itself: nothing leads"):
        signals(model, own).check()
    changed = own | {"2.bias": own["2.bias"] + 1}
    signals(model, changed, DOT).check()
    with pytest.raises(ValueError, match="the checkpoint itself in '0'"):
        signals(model, changed).check()
