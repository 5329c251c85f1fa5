"""What a discovery pass records, what a plan makes of it, and where it finds the head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers.discover import make_plan
from curate.scorers.find_head import find_head
from curate.scorers.parts import Layout
from curate.scorers.plan import WHOLE, CallAxes, HeadPlan, Path, Plan
from curate.scorers.prepared import named_parameters
from curate.scorers.protocol import Outputs
from curate.scorers.recording import Recording, marks, record

X = torch.randn(3, 4, 5)
Run = Callable[[nn.Module, Tensor], Tensor | Outputs]


def recorded(model: nn.Module, run: Run, rows: list[int]) -> Recording:
    model.requires_grad_(False)
    x = X[rows]

    def outputs() -> Outputs:
        out = run(model, x)
        return out if isinstance(out, Outputs) else Outputs(out.flatten(1).sum(1), logits=out)

    return record(model, named_parameters(model), outputs, len(rows), torch.device("cpu"))


def planned(model: nn.Module, run: Run) -> Plan:
    """Return the plan for all parameters from rows (0, 1), (0, 1, 2) and (2, 1, 0)."""
    runs = [recorded(model, run, rows) for rows in ([0, 1], [0, 1, 2], [2, 1, 0])]
    return make_plan(list(named_parameters(model)), model, *runs)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


class Layered(nn.Module):
    """One layer of 5 to 5, used by `how(self, x)`; a head."""

    def __init__(self, how: Callable[["Layered", Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.how = nn.Linear(5, 5), nn.Linear(5, 2), how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.how(self, x).sum(1))
        return out


class TestRecording:
    def test_uses_with_the_modules_they_happen_in(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.ReLU(), nn.Linear(5, 2))
        found = recorded(model, lambda m, x: m[2](m(x)[..., :1].expand(-1, -1, 5)), [0, 1])
        names = ["0.0.weight", "0.0.bias"], ["2.weight", "2.bias"]
        first, second = (("linear", tuple(n)) for n in names)
        assert list(found.uses) == [(*first, 0), (*second, 0), (*second, 1)]
        stacks = [[found.calls[i].module for i in seen.calls] for seen in found.uses.values()]
        assert stacks == [["", "0", "0.0"], ["", "2"], ["2"]]
        assert [seen.shape for seen in found.uses.values()] == [(2, 4, 5), (2, 4, 2), (2, 4, 2)]
        assert [(c.inputs, c.outputs) for c in found.calls if c.module == "0"] == [
            ([(2, 4, 5)], [(2, 4, 5)])
        ]

    def test_what_no_reader_knows_and_what_no_gradient_sees(self) -> None:
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))

        def run(model: Any, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = x * model[1].bias.square()
            return model[0](x) @ model[1].weight.exp()

        found = recorded(model, run, [0, 1])
        assert found.unknown_in == {"1.weight": [()]}
        assert found.hidden_names == {"1.bias"}

    def test_fingerprints_tell_rows_apart_and_are_the_same_twice(self) -> None:
        model = nn.Linear(5, 300)
        (seen,) = recorded(model, forward, [0, 1, 0]).uses.values()
        a, b, c = seen.print
        assert seen.print.shape == (3, 4, 1) and torch.equal(a, c) and not torch.allclose(a, b)
        (again,) = recorded(model, forward, [0, 1, 0]).uses.values()
        assert torch.equal(seen.print, again.print)

    def test_a_sort_of_rows_marks_what_comes_after_it_in_the_module(self) -> None:
        def how(model: Layered, x: Tensor) -> Tensor:
            return model.layer(x[x[:, 0, 0].argsort()])

        found = recorded(Layered(how), forward, [0, 1, 2])
        calls = {c.module: (c.routes, c.reordered, c.after_reorder) for c in found.calls}
        assert calls == {"": (True, True, False), "layer": (False, False, True),
                         "head": (False, False, True)}  # fmt: skip
        assert all(seen.after_reorder for seen in found.uses.values())

    def test_the_graph_knows_which_use_made_a_value(self) -> None:
        found = recorded(nn.Linear(5, 2), forward, [0, 1])
        assert found.outputs is not None and found.outputs.logits is not None
        (key,) = found.uses
        logits = found.outputs.logits
        assert marks(logits.grad_fn) == [(key, logits.data_ptr())]
        assert marks((logits * 2).grad_fn) == []


class TestPlan:
    @pytest.mark.parametrize(
        ("how", "layout"),
        [
            (lambda m, x: m.layer(x), Layout("dense", 0)),
            (lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), Layout("dense", 1)),
            (lambda m, x: m.layer(x.flatten(0, 1)).view_as(x), Layout("flat")),
            (
                lambda m, x: (
                    m.layer(x.mT.permute(2, 0, 1).flatten(0, 1)).view(4, -1, 5).transpose(0, 1)
                ),
                Layout("interleaved"),
            ),
        ],
    )
    def test_where_the_rows_are(self, how, layout) -> None:
        plan = planned(Layered(how), forward)
        assert plan.layouts["linear", ("layer.weight", "layer.bias"), 0] == layout
        assert plan.path("layer.weight") == Path("analytic", detail="linear")
        assert plan.counts == dict.fromkeys(plan.choices, 1)

    def test_a_flat_axis_is_not_believed_where_entries_are_routed(self) -> None:
        def how(model: Layered, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return model.layer(flat[torch.arange(len(flat))]).view_as(x)

        plan = planned(Layered(how), forward)
        assert plan.path("layer.weight").kind == "vmap"
        assert [p.kind for p in plan.choices["layer.weight"]] == ["vmap", "rows", "rows"]
        assert plan.choices["layer.weight"][-1] == WHOLE

    def test_rows_in_an_order_of_their_values_are_not_read_by_position(self) -> None:
        def how(model: Layered, x: Tensor) -> Tensor:
            order = x[:, 0, 0].argsort()
            return model.layer(x[order])[order.argsort()]

        plan = planned(Layered(how), forward)
        assert not any("layer.weight" in key[1] for key in plan.layouts)
        assert plan.path("layer.weight") == Path("vmap", "")

    def test_a_table_that_all_rows_share(self) -> None:
        class Places(nn.Module):
            def __init__(self, leading: bool) -> None:
                super().__init__()
                self.table, self.leading = nn.Embedding(4, 5), leading

            def forward(self, x: Tensor) -> Tensor:
                at = torch.arange(4)
                return x + self.table(at[None] if self.leading else at)

        for leading, kind in ((True, "shared"), (False, "shared_new")):
            plan = planned(Places(leading), forward)
            assert plan.layouts["embedding", ("table.weight",), 0] == Layout(kind)
            assert plan.doubtful("table.weight")

    def test_parameters_that_are_not_used_or_by_a_function_unknown(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.idle, self.scale = nn.Linear(5, 2), nn.Parameter(torch.ones(5))

            def forward(self, x: Tensor) -> Tensor:
                return x / self.scale

        plan = planned(Odd(), forward)
        assert plan.path("idle.weight").kind == "unused" and plan.counts["idle.weight"] == 0
        ways = [Path("vmap", ""), Path("rows", ""), WHOLE]  # should it be used after all
        assert plan.choices["idle.weight"][1:] == plan.choices["scale"] == ways
        assert plan.path("scale") == Path("vmap", "")
        assert plan.leaf_axes[""] == CallAxes((0,), (0,))

    def test_a_parameter_used_twice_goes_by_the_smallest_module_around_both(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
                self.inner[1].weight = self.inner[0].weight

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

        plan = planned(Twice(), forward)
        assert plan.counts["inner.0.weight"] == 2
        modules = [p.module for p in plan.choices["inner.0.weight"] if p.kind == "vmap"]
        assert modules == ["inner", ""]


class TestHead:
    def found(self, model: nn.Module, run: Run = forward) -> HeadPlan | None:
        recording = recorded(model, run, [0, 1, 2])
        return find_head(recording, {id(p): n for n, p in named_parameters(model).items()})

    def test_the_last_layer_whatever_its_name(self) -> None:
        model = nn.ModuleDict({"z": nn.Linear(5, 5), "a": nn.Linear(5, 2)})
        key = "linear", ("a.weight", "a.bias"), 0
        names = ("a.weight", "a.bias")
        assert self.found(model, lambda m, x: m["a"](m["z"](x))) == HeadPlan(key, names, True)
        cut = self.found(model, lambda m, x: m["a"](m["z"](x))[:, 1:])
        assert cut == HeadPlan(key, names, False)  # begins where no logits do

    def test_what_is_added_to_the_logits_belongs_to_the_head(self) -> None:
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.matrix, self.shift = nn.Linear(5, 2, bias=False), nn.Parameter(torch.ones(2))

            def forward(self, x: Tensor) -> Tensor:
                return self.matrix(x) + self.shift

        found = self.found(Shifted())
        assert found is not None and found.names == ("matrix.weight", "shift")
        assert found.key == ("linear", ("matrix.weight",), 0) and not found.starts_at_token_0

    def test_no_one_layer(self) -> None:
        two = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])
        assert self.found(two, lambda m, x: m[0](x) + m[1](x)) is None
        other = nn.Linear(5, 6)
        assert self.found(other, lambda m, x: m(x).view(-1, 4, 3, 2)) is None  # other classes
        assert self.found(nn.Linear(5, 2), lambda m, x: x) is None
        assert self.found(nn.Linear(5, 2), lambda m, x: Outputs(m(x).sum((1, 2)))) is None

    def test_a_head_that_is_named_beside_its_input(self) -> None:
        model, targets = nn.Linear(5, 2), torch.zeros(3, 4, dtype=torch.long)

        def with_loss(model: Any, x: Tensor) -> Outputs:
            model(x)  # the same matrix elsewhere
            token = linear_cross_entropy(x, model.weight, targets, model.bias)
            return Outputs(token.sum(1), targets, hidden=x, head=model)

        names = ("weight", "bias")
        assert self.found(model, with_loss) == HeadPlan(("linear_head", names, 0), names, True)

        def in_chunks(model: Any, x: Tensor) -> Outputs:
            logits = torch.cat([model(x[:, :2]), model(x[:, 2:])], 1)
            loss = F.cross_entropy(logits.mT, targets, reduction="none").sum(1)
            return Outputs(loss, targets, hidden=x, head=model)

        assert self.found(model, in_chunks) == HeadPlan(None, names, False)
