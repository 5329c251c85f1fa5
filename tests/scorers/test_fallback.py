"""Gradients of rows by running a module, or the model, again: against autograd in one graph.

Shapes: S sequences, B rows, T tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.scorers import fallback
from curate.scorers.fallback import Catcher, Replay, summed_gradient, whole_model_rows
from curate.scorers.parts import Gradient
from curate.scorers.plan import CallAxes
from curate.scorers.taps import Replan

S, T = 4, 3
# float64 on both sides; what is left is the order of sums.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
IDS = torch.tensor([1, 0, 1, 1])


class Scale(nn.Module):
    """What no reader knows: a division, among outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.rand(5, dtype=torch.float64) + 1)

    def forward(self, x: Tensor, power: int = 1, *, plus: Tensor | None = None) -> dict[str, Any]:
        out = x**power / self.by
        return {"name": "scaled", "out": out if plus is None else out + plus * self.by.sin()}


class Model(nn.Module):
    """Calls the module by way of `forward` alone, so that a test may call it otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = Scale(), torch.randn(T, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, 3)["out"].exp()
        return out


AXES = CallAxes((0,), (0,))
X = torch.randn(S, T, 5, dtype=torch.float64)


def caught(model: Model, axes: CallAxes, **more: Any) -> tuple[Replay, list[Gradient]]:
    """Run forward and backward with every row's loss a sum of squares; return the replay."""
    anchor, got = torch.zeros((), requires_grad=True), list[Gradient]()
    model.requires_grad_(False)
    catcher = Catcher(model, ["inner"], anchor)
    with catcher.listening():
        loss = model(X).square().sum()
    torch.autograd.grad(loss, anchor, allow_unused=True)
    given = {"rows": S, "row_ids": None, **more}
    params = {"inner.by": model.inner.by}
    return Replay("inner", catcher, axes, params, consume=got.append, **given), got


def truth(model: Model) -> Tensor:
    model.requires_grad_(True)
    rows = [
        torch.autograd.grad(model(X[s : s + 1]).square().sum(), model.inner.by)[0] for s in range(S)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("way", [Replay.by_rows, Replay.by_vmap])
@pytest.mark.parametrize(("scratch", "pieces"), [(2, 4), (3, 2), (1 << 22, 1)])
class TestReplay:
    def test_each_row_alone(self, way, scratch, pieces, monkeypatch) -> None:
        monkeypatch.setattr(fallback, "SCRATCH", scratch)
        model = Model()
        replay, got = caught(model, AXES)
        way(replay)
        found = torch.cat([g.full.grad for g in got])
        torch.testing.assert_close(found, truth(model), **EXACT)
        assert len(got) == pieces

    def test_windows_of_a_row_are_added(self, way, scratch, pieces, monkeypatch) -> None:
        monkeypatch.setattr(fallback, "SCRATCH", scratch)
        model = Model()
        replay, got = caught(model, AXES, rows=2, row_ids=IDS)
        way(replay)
        each = truth(model)
        true = torch.stack([each[IDS == row].sum(0) for row in range(2)])
        torch.testing.assert_close(torch.cat([g.full.grad for g in got]), true, **EXACT)


def test_two_calls_with_keywords_and_inputs_that_all_rows_share() -> None:
    class Twice(Model):
        def forward(self, x: Tensor) -> Tensor:
            once = self.inner(x, 2, plus=self.table)["out"]
            once = once.clone().tanh_()
            return self.inner(once * x, plus=self.table)["out"]

    for way in (Replay.by_rows, Replay.by_vmap):
        model = Twice()
        replay, got = caught(model, CallAxes((0, None), (0,)))
        way(replay)
        torch.testing.assert_close(got[0].full.grad, truth(model), **EXACT)


def test_tokens_before_rows() -> None:
    class Turned(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1), 3)["out"].transpose(0, 1)

    for way in (Replay.by_rows, Replay.by_vmap):
        model = Turned()
        replay, got = caught(model, CallAxes((1,), (1,)))
        way(replay)
        torch.testing.assert_close(got[0].full.grad, truth(model), **EXACT)


def test_inputs_are_kept_as_they_were() -> None:
    class Overwrites(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            out = self.inner(y, 2)["out"]
            y.zero_()
            return out.exp_()

    model = Overwrites()
    replay, got = caught(model, AXES)
    replay.by_rows()
    torch.testing.assert_close(got[0].full.grad, truth(model), **EXACT)


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        (CallAxes((0, 0), (0,)), "got other inputs than in the probe"),
        (CallAxes((0,), (None,)), "an output of .* has no row axis"),
        (CallAxes((1,), (1,)), "was not given the batch's rows"),
    ],
)
def test_what_the_probe_did_not_meet_changes_the_plan(axes, match) -> None:
    for way in (Replay.by_rows, Replay.by_vmap):
        replay, _ = caught(Model(), axes)
        with pytest.raises(Replan, match=match) as raised:
            way(replay)
        assert raised.value.names == {"inner.by"}


def test_a_module_that_cannot_be_run_so_changes_the_plan(monkeypatch) -> None:
    class Peeks(Scale):
        def forward(self, x: Tensor, power: int = 1, *, plus: Any = None) -> dict[str, Any]:
            if float(x.sum()) > 1e9:
                raise AssertionError
            return super().forward(x, power)

    model = Model()
    model.inner = Peeks()
    replay, got = caught(model, AXES)
    with pytest.raises(Replan, match="vmap over 'inner' failed"):
        replay.by_vmap()
    replay.by_rows()
    torch.testing.assert_close(got[0].full.grad, truth(model), **EXACT)

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(model.inner, "forward", exhausted)
    with pytest.raises(torch.OutOfMemoryError):  # for the caller, who takes fewer rows
        replay.by_rows()


# -- the whole model


def network(batch: Any) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(batch).square().sum((1, 2))


def test_the_whole_model_row_by_row_and_summed() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    idle = nn.Parameter(torch.ones(2))
    model[2].weight.requires_grad_(False)
    params = {**dict(model.named_parameters()), "idle": idle}
    rows = list(whole_model_rows(X, lambda b: network(b)(model), params))
    assert len(rows) == S
    for s, (loss, grads) in enumerate(rows):
        one = network(X[s : s + 1])(model)
        torch.testing.assert_close(loss, one, rtol=1e-14, atol=0)  # products of other alignment
        assert not loss.requires_grad
        model.requires_grad_(True)
        true = torch.autograd.grad(network(X[s : s + 1])(model).sum(), list(model.parameters()))
        model[2].weight.requires_grad_(False)
        for found, g in zip(grads, [*true, torch.zeros(2)], strict=True):
            torch.testing.assert_close(found, g, **EXACT)
    loss, summed = summed_gradient(X, lambda b: network(b)(model), params)
    assert loss.shape == (S,) and "idle" not in summed
    for i, name in enumerate(summed):
        torch.testing.assert_close(summed[name], sum(g[i] for _, g in rows), **EXACT)
    assert not model[2].weight.requires_grad and idle.requires_grad  # as they were


def test_a_sparse_table_and_a_loss_of_nothing() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    ids = torch.tensor([[1, 1, 4], [0, 2, 2]])
    rows = list(whole_model_rows(ids, lambda b: table(b).sum((1, 2)), {"w": table.weight}))
    counts = torch.stack([torch.bincount(row, minlength=6) for row in ids]).float()
    for (_, (g,)), count in zip(rows, counts, strict=True):
        assert not g.is_sparse and torch.equal(g, count[:, None].expand(-1, 2))
    loss, summed = summed_gradient(ids, lambda b: b.sum(1).float(), {"w": table.weight})
    assert loss.tolist() == [6.0, 4.0] and summed == {}


def test_a_model_with_its_own_torch_func_inside() -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss_of(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: (row @ weight).pow(3)))(x[:, 0]).sum(1)

    rows = list(whole_model_rows(X, loss_of, {"w": weight}))
    for s, (_, (g,)) in enumerate(rows):
        (true,) = torch.autograd.grad(loss_of(X[s : s + 1]).sum(), weight)
        torch.testing.assert_close(g, true, **EXACT)
