"""What a curvature covers, by a plan's record of uses; and which signals it is read for.

Shapes: B rows, M groups of a target.
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from curate.scorers import curvature_layers
from curate.scorers.curvature_layers import Cover, Layer, full_cover, matrix_cover
from curate.scorers.curvature_signals import CurvedSignals
from curate.scorers.needs import Harvest
from curate.scorers.parts import Full, Gradient, Layout
from curate.scorers.plan import Path, Plan
from curate.scorers.protocol import Signal
from curate.scorers.readouts import Dots
from curate.scorers.taps import UseKey

FIRST = Layout("dense", 0, 3)


def plan(*uses: tuple[str, str], **paths: str) -> Plan:
    """Return the plan of a model with these uses: (kind, parameters), one after another."""
    keys: list[UseKey] = [(kind, tuple(names.split()), i) for i, (kind, names) in enumerate(uses)]
    named = dict.fromkeys(name for _, names, _ in keys for name in names)
    return Plan(
        layouts=dict.fromkeys(keys, FIRST),
        choices={n: [Path("analytic")] for n in named} | {n: [Path(k)] for n, k in paths.items()},
    )


def shapes(**sizes: tuple[int, ...]) -> dict[str, torch.Size]:
    return {name: torch.Size(size) for name, size in sizes.items()}


TWO = shapes(w=(4, 5), b=(4,), v=(3, 4), c=(3,))


class TestMatrices:
    def test_weights_with_their_biases_in_the_models_order(self) -> None:
        cover = matrix_cover(plan(("conv2d", "v c"), ("linear", "w b")), TWO)
        assert cover == Cover((Layer("w", "b"), Layer("v", "c")), {})
        assert [layer.names for layer in cover.layers] == [("w", "b"), ("v", "c")]

    @pytest.mark.parametrize(
        "uses",
        [
            [("linear", "w b"), ("linear", "v b")],  # a bias of two layers
            [("linear", "w b"), ("shift", "b"), ("linear", "v")],  # added elsewhere, too
            [("linear", "w"), ("linear", "v")],
        ],
    )
    def test_a_bias_that_is_not_the_layers_alone_is_left_out(self, uses) -> None:
        cover = matrix_cover(plan(*uses, b="analytic"), {k: TWO[k] for k in "wbv"})
        assert cover.layers == (Layer("w"), Layer("v"))
        assert cover.left_out == {"b": "no matrix, nor a layer's bias"}

    def test_a_bias_that_is_not_asked_for_or_has_a_path_of_its_own(self) -> None:
        assert matrix_cover(plan(("linear", "w b")), shapes(w=(4, 5))).layers == (Layer("w"),)
        by_rows = plan(("linear", "w b"), b="rows")
        assert matrix_cover(by_rows, shapes(w=(4, 5), b=(4,))).layers == (Layer("w"),)

    @pytest.mark.parametrize(
        ("uses", "path", "reason"),
        [
            ([], "unused", "unused"),
            ([("linear", "w")], "vmap", "no factors: its gradient is taken by autograd"),
            ([("linear", "w"), ("embedding", "w")], "analytic", "used as embedding"),
            ([("linear", "b w")], "analytic", "no layer's weight"),
            ([("linear", "w b"), ("linear", "w")], "analytic", "used with different biases"),
        ],
    )
    def test_why_a_matrix_has_no_layer(self, uses, path, reason) -> None:
        cover = matrix_cover(plan(*uses, w=path), shapes(w=(4, 5)))
        assert cover == Cover((), {"w": reason})

    @pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 3, 3)])
    def test_a_matrix_too_large_to_decompose(self, shape, monkeypatch) -> None:
        monkeypatch.setattr(curvature_layers, "MOST_SIDE", 8)
        (reason,) = matrix_cover(plan(("linear", "w")), shapes(w=shape)).left_out.values()
        assert reason == "a side of more than 8"

    def test_the_reasons_are_said_with_a_few_names_each(self) -> None:
        left_out = dict.fromkeys("abcdef", "unused") | {"g": "used as embedding"}
        said = Cover((), left_out).left_out_aloud()
        assert said == "a, b, c, d and 2 more (unused); g (used as embedding)"


def test_everything_used_has_a_layer_of_a_full_cover() -> None:
    made = plan(("linear", "w b"), ("embedding", "v"), c="unused")
    cover = full_cover(made, TWO)
    assert cover == Cover((Layer("w", "b"), Layer("v")), {"c": "unused"})


class Doubled:
    """Stands for a curvature whose inverse doubles; counts what it is asked for."""

    def __init__(self) -> None:
        self.names, self.solved = frozenset({"w"}), 0

    def __call__(self, gradient: Gradient) -> Tensor:
        assert gradient.full is not None
        return 2 * gradient.full.grad.square().sum(1)

    def solve(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.solved += 1
        return {"w": 2 * directions["w"]}


class TestSignals:
    OWN, DOT = (Signal(k, "p", curvature="half") for k in ("grad_sq_norm", "target_dot"))

    def read(self, curved: CurvedSignals, directions: Mapping[str, Tensor], g: Tensor) -> Harvest:
        gradient = Gradient("w", g.shape[1:], full=Full(g))
        found = {
            key: {"w": read(gradient)}
            for key, (names, read) in curved.readouts(directions).items()
            if "w" in names
        }
        return Harvest(torch.zeros(len(g), dtype=torch.float64), found)

    def test_a_norm_and_an_inner_product(self) -> None:
        curved = CurvedSignals([self.OWN, self.DOT, Signal("grad_sq_norm", "p")])
        assert curved.params == ["p", "p"]  # the signal without a curvature is not its own
        curved.curvatures = {("p", "half"): Doubled()}
        g, v = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        harvest = self.read(curved, {"w": v}, g)
        torch.testing.assert_close(curved.value(self.OWN, harvest), 2 * g.square().sum(1))
        torch.testing.assert_close(curved.value(self.DOT, harvest), 2 * g @ v.T)

    def test_directions_are_solved_once_until_they_change(self) -> None:
        curved, double = CurvedSignals([self.DOT]), Doubled()
        curved.curvatures = {("p", "half"): double}
        directions = {"w": torch.ones(1, 4)}
        first, again = curved.readouts(directions), curved.readouts(directions)
        assert double.solved == 1
        reads = [read for readouts in (first, again) for _, read in readouts.values()]
        assert all(isinstance(r, Dots) for r in reads)
        assert len({id(r.directions["w"]) for r in reads}) == 1
        curved.readouts(dict(directions))
        assert double.solved == 2

    def test_rows_without_a_gradient_have_no_influence(self) -> None:
        curved = CurvedSignals([self.DOT])
        curved.curvatures = {("p", "half"): Doubled()}
        (key,) = curved.readouts({"w": torch.ones(2, 4)})
        found = curved.value(self.DOT, Harvest(torch.zeros(3), {key: {}}))
        assert found.tolist() == [[0.0, 0.0]] * 3
