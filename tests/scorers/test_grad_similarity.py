"""grad_similarity: its reduction by hand, and what the engine gives it against autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.grad_similarity import GradSimilarity
from curate.scorers.protocol import Batch, Outputs, Signal

DOT, SQUARE, NORM = Signal("target_dot"), Signal("grad_sq_norm"), Signal("target_norm")
ONE = torch.ones(1, dtype=torch.float64)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 throughout


def outputs(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def rows(n: int, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return Batch({"x": x}, torch.randint(3, (n,), generator=draw), n)


def mean_gradients(engine: Engine, groups: list[Batch]) -> dict[str, Tensor]:
    """Return the directions as a target's groups give them."""
    found = [engine.summed_gradient(batch)[1] for batch in groups]
    return {
        name: torch.stack([g[name] / b.rows for g, b in zip(found, groups, strict=True)])
        for name in engine.target_params(groups[0])
    }


def scored(
    scorer: GradSimilarity, batch: Batch, groups: list[Batch], model: nn.Module | None = None
) -> Tensor:
    engine = Engine(model or network(), outputs, scorer.needs)
    engine.directions = mean_gradients(engine, groups)
    found = engine(batch)
    return scorer.reduce({s: v.double()[None] for s, v in found.items()}, ONE)


def gradients(model: nn.Module, batch: Batch) -> Tensor:
    """Return each row's gradient, [B, P], from a backward pass of its own."""
    found = []
    for row in range(batch.rows):
        loss = nn.functional.cross_entropy(
            model(batch.inputs["x"][row : row + 1]), batch.targets[row : row + 1]
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


class TestTheReduction:
    SIGNALS = {  # noqa: RUF012
        DOT: torch.tensor([[[3.0, -4.0]], [[0.0, 8.0]]], dtype=torch.float64),
        SQUARE: torch.tensor([[25.0], [4.0]], dtype=torch.float64),
        NORM: torch.tensor([[[1.0, 2.0]], [[1.0, 4.0]]], dtype=torch.float64),
    }
    RATES = torch.tensor([0.75, 0.25], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("settings", "value"),
        [
            # cosines (0.6, -0.4) and (0, 1); weighted (0.45, -0.05), equally (0.3, 0.3)
            ({}, 0.45),
            ({"groups": "mean"}, 0.2),
            ({"mode": "dvgs"}, 0.3),
            # dot products weighted: (2.25, -1), equally (1.5, 2)
            ({"similarity": "dot"}, 2.25),
            ({"similarity": "dot", "mode": "dvgs"}, 2.0),
            ({"similarity": "dot", "mode": "dvgs", "groups": "mean"}, 1.75),
        ],
    )
    def test_a_case_by_hand(self, settings: dict[str, str], value: float) -> None:
        scorer = GradSimilarity(**settings)  # type: ignore[arg-type]
        signals = {s: self.SIGNALS[s] for s in scorer.needs}
        assert scorer.reduce(signals, self.RATES).item() == pytest.approx(value, rel=1e-12)

    def test_no_gradient_has_similarity_zero_and_what_is_not_finite_none(self) -> None:
        nan, inf = float("nan"), float("inf")
        row = torch.tensor([[0.0, 1e-40, 4.0, 4.0, nan, inf]], dtype=torch.float64)
        norms = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[None, :, None]
        dots = torch.tensor([0.0, 1e-30, 0.0, -2.0, 1.0, 1.0], dtype=torch.float64)[None, :, None]
        found = GradSimilarity().reduce({DOT: dots, SQUARE: row, NORM: norms}, ONE)
        assert found[:4].tolist() == [0, 0, 0, -1] and found[4:].isnan().all()

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"mode": "lss"}, "mode is one of tracin, dvgs, less, not 'lss'"),
            ({"similarity": "cos"}, "similarity is one of cosine, dot, not 'cos'"),
            ({"groups": "sum"}, "groups is one of max, mean, not 'sum'"),
        ],
    )
    def test_other_settings_are_refused(self, settings: dict[str, str], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            GradSimilarity(**settings)  # type: ignore[arg-type]

    def test_the_norms_are_asked_for_only_where_they_are_needed(self) -> None:
        assert GradSimilarity(similarity="dot").needs == {DOT}
        assert GradSimilarity().needs == {DOT, SQUARE, NORM}
        assert {s.params for s in GradSimilarity(params="head").needs} == {"head"}


def test_cosine_and_dot_equal_autograd_row_by_row() -> None:
    model, batch, groups = network(), rows(9, 1), [rows(5, 2), rows(3, 3)]
    rows_np = gradients(model, batch)
    targets_mp = torch.stack([gradients(model, group).mean(0) for group in groups])
    dots = rows_np @ targets_mp.T
    torch.testing.assert_close(
        scored(GradSimilarity(similarity="dot"), batch, groups), dots.amax(1), **EXACT
    )
    cosines = dots / (rows_np.norm(dim=1)[:, None] * targets_mp.norm(dim=1))
    torch.testing.assert_close(scored(GradSimilarity(), batch, groups), cosines.amax(1), **EXACT)
    mean = scored(GradSimilarity(groups="mean"), batch, groups)
    torch.testing.assert_close(mean, cosines.mean(1), **EXACT)


@pytest.mark.parametrize("params", ["head", "^0", "bias"])
def test_parameters_limit_both_sides(params: str) -> None:
    model, batch, group = network(), rows(6, 1), rows(5, 2)
    keep = torch.cat(
        [
            torch.full((p.numel(),), n.startswith("2") if params == "head" else params[-1] in n)
            if params != "bias"
            else torch.full((p.numel(),), n.endswith("bias"))
            for n, p in model.named_parameters()
        ]
    )
    mine, theirs = gradients(model, batch)[:, keep], gradients(model, group).mean(0)[keep]
    expected = mine @ theirs / (mine.norm(dim=1) * theirs.norm())
    found = scored(GradSimilarity(params=params), batch, [group])
    torch.testing.assert_close(found, expected, **EXACT)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000))
def test_dot_products_are_symmetric_bilinear_and_positive(seed: int) -> None:
    """TracIn: rows against rows make a positive semi-definite matrix, its trace self-influence."""
    batch, scorer = rows(5, seed), GradSimilarity(similarity="dot")
    one = [batch.select_rows([i]) for i in range(5)]
    matrix = torch.stack([scored(scorer, batch, [row]) for row in one], 1)
    torch.testing.assert_close(matrix, matrix.T, **EXACT)
    assert torch.linalg.eigvalsh(matrix).min() >= -1e-10
    square = Engine(network(), outputs, {SQUARE})(batch)[SQUARE]
    torch.testing.assert_close(matrix.diagonal(), square, **EXACT)
    mean = scored(scorer, batch, [batch.select_rows([0, 1, 4])])
    torch.testing.assert_close(mean, matrix[:, [0, 1, 4]].mean(1), **EXACT)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000))
def test_a_target_of_the_row_itself_gives_cosine_one_and_all_lie_within(seed: int) -> None:
    batch = rows(6, seed)
    found = scored(GradSimilarity(mode="dvgs"), batch, [batch.select_rows([2])])
    assert found[2].item() == pytest.approx(1, abs=1e-12)
    assert (found.abs() <= 1).all()


def test_a_regression_target_flipped_about_the_prediction_gives_minus_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()

    def squared(model: nn.Module, batch: Batch) -> Outputs:
        return Outputs((model(batch.inputs["x"])[:, 0] - batch.targets).square())

    x = torch.randn(3, 4, dtype=torch.float64)
    said = model(x)[:, 0].detach()
    target, flipped = Batch({"x": x}, said + 0.7, 3), Batch({"x": x}, said - 0.7, 3)
    scorer = GradSimilarity()
    engine = Engine(model, squared, scorer.needs)
    for row in range(3):
        engine.directions = mean_gradients(engine, [target.select_rows([row])])
        found = engine(flipped.select_rows([row]))
        value = scorer.reduce({s: v[None] for s, v in found.items()}, ONE)
        assert value.item() == pytest.approx(-1, abs=1e-12)


def test_scaled_losses_leave_the_cosine_and_permuted_or_doubled_rows_keep_their_scores() -> None:
    batch, group, scorer = rows(7, 1), rows(4, 2), GradSimilarity()
    plain = scored(scorer, batch, [group])
    order = [*torch.randperm(7).tolist(), 3, 3]
    again = scored(scorer, batch.select_rows(order), [group])
    torch.testing.assert_close(again, plain[order], **EXACT)
    doubled = scored(scorer, batch, [group.select_rows([0, 1, 2, 3, 3, 2, 1, 0])])
    torch.testing.assert_close(doubled, plain, **EXACT)

    def scaled(model: nn.Module, batch: Batch) -> Outputs:
        given = outputs(model, batch)
        by_row = 1 + batch.inputs["x"][:, 0].square()  # a positive factor of the row's own
        return Outputs(by_row * given.loss, given.targets, given.logits)

    model = network()
    engine = Engine(model, scaled, scorer.needs)
    engine.directions = mean_gradients(Engine(model, outputs, scorer.needs), [group])
    found = engine(batch)
    value = scorer.reduce({s: v[None] for s, v in found.items()}, ONE)
    torch.testing.assert_close(value, plain, **EXACT)


def test_a_step_along_a_row_lowers_the_targets_loss_by_its_dot_product() -> None:
    batch, group, rate = rows(5, 1), rows(6, 2), 1e-5
    dots = scored(GradSimilarity(similarity="dot"), batch, [group])
    for row in range(5):
        model = network()
        step = gradients(model, batch.select_rows([row]))[0]
        before = outputs(model, group).loss.mean().item()
        with torch.no_grad():
            flat = nn.utils.parameters_to_vector(model.parameters()) - rate * step
            nn.utils.vector_to_parameters(flat, model.parameters())
        fall = (before - outputs(model, group).loss.mean().item()) / rate
        # What is left is of second order in the rate, times a curvature of order 1.
        assert fall == pytest.approx(dots[row].item(), abs=1e-3)


def test_a_full_batch_step_lowers_a_rows_loss_by_its_mean_dot_product() -> None:
    """TracIn: a step of gradient descent on all n rows takes rate / n sum_z g_z g from a row."""
    batch, held, rate = rows(9, 1), rows(5, 2), 1e-5
    each = [held.select_rows([i]) for i in range(5)]
    dots = torch.stack([scored(GradSimilarity(similarity="dot"), batch, [row]) for row in each])
    model = network()
    step = gradients(model, batch).mean(0)
    before = outputs(model, held).loss.detach()
    with torch.no_grad():
        flat = nn.utils.parameters_to_vector(model.parameters()) - rate * step
        nn.utils.vector_to_parameters(flat, model.parameters())
        fall = (before - outputs(model, held).loss) / rate
    # What is left is of second order in the rate, times a curvature of order 1.
    torch.testing.assert_close(fall, dots.mean(1), rtol=0, atol=1e-3)


def test_traks_scores_of_inner_products_are_one_newton_step_of_linear_regression() -> None:
    """TRAK (Park et al. 2023) on loss (f - y)^2 / 2: what rows move f by adds up to the solution.

    Gradients of the loss are (f - y) times those of f, so inner products give K = <grad f, grad f>
    and (f - y) K^+ K_x is each row's share.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(15, 4, dtype=torch.float64), torch.randn(15, dtype=torch.float64)

    def squared(model: nn.Module, batch: Batch) -> Outputs:
        return Outputs((model(batch.inputs["x"])[:, 0] - batch.targets).square() / 2)

    train, both = Batch({"x": x[:12]}, y[:12], 12), Batch({"x": x}, y, 15)
    engine = Engine(model, squared, [DOT])
    engine.directions = mean_gradients(engine, [both.select_rows([i]) for i in range(15)])
    f = model(x)[:, 0].detach()
    off = f - y
    K = engine(train)[DOT] / off[:12, None] / off  # [12, 15]
    inverse = torch.linalg.pinv(K[:, :12], rtol=1e-10, hermitian=True)
    shares = off[:12, None] * (inverse @ K[:, 12:])
    design = nn.functional.pad(x, (0, 1), value=1.0)
    solved = torch.linalg.lstsq(design[:12], y[:12]).solution
    torch.testing.assert_close(f[12:] - shares.sum(0), design[12:] @ solved, rtol=1e-9, atol=1e-9)


def test_the_same_pass_gives_several_sets_of_parameters_and_all_other_signals() -> None:
    model, batch, group = network(), rows(6, 1), rows(4, 2)
    both = GradSimilarity().needs | GradSimilarity(params="head").needs
    together = Engine(model, outputs, {*both, Signal("loss"), Signal("el2n")})
    together.directions = mean_gradients(together, [group])
    found = together(batch)
    for scorer in (GradSimilarity(), GradSimilarity(params="head")):
        value = scorer.reduce({s: found[s][None] for s in scorer.needs}, ONE)
        torch.testing.assert_close(value, scored(scorer, batch, [group]), **EXACT)


def test_a_model_is_left_as_it_was_by_a_targets_gradient() -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)
    engine = Engine(model, outputs, GradSimilarity().needs)
    loss, grads = engine.summed_gradient(rows(4, 2))
    assert loss.shape == (4,) and set(grads) == {"0.bias", "2.weight", "2.bias"}
    assert model.training and not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
