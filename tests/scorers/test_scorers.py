"""Each scorer against worked examples, closed forms and bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.protocol import RECORD_KINDS, Batch, Outputs, Signal
from curate.scorers.registry import make_scorers

ONE = torch.ones(1, dtype=torch.float64)


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)


def score(requests: str, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return each scorer's scores at one checkpoint."""
    scorers = make_scorers(requests)
    engine = Engine(model, outputs, {s for scorer in scorers.values() for s in scorer.needs})
    found = engine(Batch({"x": x}, y, len(y)))
    stacked = {signal: value.double()[None] for signal, value in found.items()}
    return {alias: scorer.reduce(stacked, ONE) for alias, scorer in scorers.items()}


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


class TestTheWorkedExample:
    """W = [[1,0],[0,1],[0,0]], x = (2,1), y = 0: p = (0.665241, 0.244728, 0.090031)."""

    WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    X, Y = torch.tensor([[2.0, 1.0]], dtype=torch.float64), torch.tensor([0])
    P = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).softmax(0)

    @pytest.mark.parametrize(
        ("scorer", "has_bias", "value"),
        [
            ("el2n", False, 0.4243361),
            ("el2n_seq", False, 0.4243361),
            ("grand", False, 0.9488444),
            ("grand", True, 1.0394070),
            ("grand(params=head)", True, 1.0394070),
            ("grand(params='^weight')", True, 0.9488444),
            ("self_influence", True, 1.0803668),
            ("gwa", False, 0.3165657),
            ("gwa", True, 0.3165657),
            ("loss", True, -math.log(0.6652409557748219)),
            ("margin", True, 1.0),
        ],
    )
    def test_values(self, scorer: str, has_bias: bool, value: float) -> None:
        bias = torch.zeros(3, dtype=torch.float64) if has_bias else None
        (found,) = score(scorer, linear(self.WEIGHT, bias), self.X, self.Y).values()
        assert found.item() == pytest.approx(value, abs=1e-7)  # the digits that the source prints

    def test_entropy(self) -> None:
        found = score("entropy", linear(self.WEIGHT), self.X, self.Y)["entropy"]
        assert found.item() == pytest.approx(-(self.P * self.P.log()).sum().item(), rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_the_last_layer_obeys_its_closed_forms_and_bounds(
    seed: int, classes: int, has_bias: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 4, generator=draw, dtype=torch.float64)
    bias = torch.randn(classes, generator=draw, dtype=torch.float64) if has_bias else None
    x = 2 * torch.randn(7, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(classes, (7,), generator=draw)
    found = score("el2n,grand,gwa,self_influence,entropy", linear(weight, bias), x, y)

    p = (x @ weight.T + (0 if bias is None else bias)).softmax(1)
    hot = nn.functional.one_hot(y, classes).bool()
    others = p.masked_fill(hot, 0)  # p_y - 1 would cancel on confident rows
    error = torch.where(hot, -others.sum(1, keepdim=True), others)
    el2n, wrong = error.norm(dim=1), others.sum(1)
    close = {"rtol": 1e-9, "atol": 1e-12}  # float64 throughout
    torch.testing.assert_close(found["el2n"], el2n, **close)
    # Data Diet: the gradient at a linear layer is the outer product of error and input.
    grand = el2n * (x.square().sum(1) + has_bias).sqrt()
    torch.testing.assert_close(found["grand"], grand, **close)
    torch.testing.assert_close(found["self_influence"], grand.square(), **close)
    aligned = -(error * (x @ weight.T)).sum(1) / (x.norm(dim=1) * el2n * weight.norm() + 1e-12)
    torch.testing.assert_close(found["gwa"], aligned, **close)

    eps = 1e-12
    assert (found["el2n"] <= math.sqrt(2) * wrong + eps).all()
    assert (found["el2n"] >= math.sqrt(classes / (classes - 1)) * wrong - eps).all()
    assert (found["gwa"].abs() <= 1 + eps).all()
    assert ((found["entropy"] >= -eps) & (found["entropy"] <= math.log(classes) + eps)).all()


def test_uniform_predictions_have_the_known_error() -> None:
    flat = linear(torch.zeros(5, 3, dtype=torch.float64))
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.arange(4)
    torch.testing.assert_close(
        score("el2n", flat, x, y)["el2n"], torch.full((4,), math.sqrt(4 / 5), dtype=torch.float64)
    )


def test_a_scaled_loss_scales_grand_and_leaves_el2n() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = Batch({"x": torch.randn(6, 4, dtype=torch.float64)}, torch.arange(6) % 3, 6)

    def scaled(model: nn.Module, batch: Batch) -> Outputs:
        plain = outputs(model, batch)
        return Outputs(3 * plain.loss, plain.targets, plain.logits)

    wanted = {Signal("grad_sq_norm"), Signal("el2n")}
    one, three = Engine(model, outputs, wanted)(batch), Engine(model, scaled, wanted)(batch)
    torch.testing.assert_close(three[Signal("grad_sq_norm")], 9 * one[Signal("grad_sq_norm")])
    assert torch.equal(three[Signal("el2n")], one[Signal("el2n")])


def test_permuting_the_classes_changes_no_score() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    y, names = torch.randint(5, (9,)), "loss,el2n,grand,gwa,entropy,margin,self_influence"
    order = torch.tensor([3, 0, 4, 1, 2])
    before = score(names, linear(weight), x, y)
    after = score(names, linear(weight[order]), x, order.argsort()[y])
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_the_bounds_of_el2n_are_reached() -> None:
    """The lowest with the wrong mass spread evenly, the highest with all of it on one class."""
    even, one = [1.0, -0.5, -0.5, -0.5], [1.0, -800.0, 0.3, -800.0]  # e^-800 is 0
    logits = torch.tensor([even, one], dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.long)
    found = score("el2n", linear(torch.eye(4, dtype=torch.float64)), logits, y)["el2n"]
    wrong = 1 - logits.softmax(1)[:, 0]
    factor = torch.tensor([4 / 3, 2.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(found, factor * wrong, rtol=1e-14, atol=0)


def test_a_constant_added_to_all_logits_changes_no_score() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(5, (9,))
    names = "loss,el2n,el2n_seq,grand,gwa,entropy,margin,self_influence"
    before, after = (score(names, linear(weight, bias + c), x, y) for c in (0.0, 37.0))
    for name, value in before.items():
        # Logits near 37 hold 14 digits behind the point.
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-13, msg=name)


def test_alignment_knows_neither_the_scale_of_weights_nor_that_of_features() -> None:
    """As long as the probabilities stay, which scales that cancel leave as they are."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    y = torch.randint(5, (9,))
    plain, scaled = (score("gwa,grand", linear(c * weight), x / c, y) for c in (1.0, 8.0))
    torch.testing.assert_close(scaled["gwa"], plain["gwa"], rtol=1e-9, atol=1e-11)  # 1e-12 is added
    torch.testing.assert_close(scaled["grand"], plain["grand"] / 8)
    sharper = score("gwa", linear(8 * weight), x, y)["gwa"]
    assert (sharper - plain["gwa"]).abs().max() > 0.01


def test_self_influence_weighs_checkpoints_by_learning_rate_and_grand_averages_norms() -> None:
    scorers = make_scorers("self_influence,grand")
    squares = {Signal("grad_sq_norm"): torch.tensor([[4.0, 9.0], [16.0, 25.0]]).double()}
    rates = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert scorers["self_influence"].reduce(squares, rates).tolist() == [7.0, 13.0]
    assert scorers["grand"].reduce(squares, rates).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("name", ["aum", "forgetting"])
def test_records_are_handed_through(name: str) -> None:
    (scorer,) = make_scorers(name).values()
    (signal,) = scorer.needs
    assert signal.kind in RECORD_KINDS
    assert scorer.reduce({signal: torch.tensor([[1.5, -2.0]]).double()}, ONE).tolist() == [1.5, -2]
