"""grad_similarity(mode=less): Adam's step of a row by brute force, torch's Adam, closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.kernels.rademacher import stream_key
from curate.scorers.adam_readout import AdamComparison, Moments
from curate.scorers.engine import Engine
from curate.scorers.grad_similarity import GradSimilarity
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.readouts import Projection, TwoSidedSketch

ONE = torch.ones(1, dtype=torch.float64)
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64 throughout
BETAS, EPS, STEPS = (0.9, 0.999), 1e-8, 7
LESS = GradSimilarity(mode="less")


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


def moments(model: nn.Module, seed: int = 5, scale: float = 0.3) -> Moments:
    """Return moments as some training might have left them: v at least m²."""
    draw = torch.Generator().manual_seed(seed)
    mean, square = {}, {}
    for name, p in model.named_parameters():
        mean[name] = scale * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        spread = torch.rand(p.shape, generator=draw, dtype=p.dtype)
        square[name] = mean[name].square() + scale**2 * spread
    return Moments(mean, square, dict.fromkeys(mean, STEPS), *BETAS, EPS)


def gradients(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Return each row's gradients from a backward pass of its own."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for row in range(batch.rows):
        loss = nn.functional.cross_entropy(
            model(batch.inputs["x"][row : row + 1]), batch.targets[row : row + 1]
        )
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(named.items(), grads, strict=True)
            }
        )
    return found


def flat(parts: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([parts[n].flatten() for n in names])


def stepped(grads: dict[str, Tensor], state: Moments, textbook: bool = False) -> dict[str, Tensor]:
    """Return Γ, as Xia et al. and as Kingma and Ba write it, one number after the other."""
    found = {}
    for name, g in grads.items():
        m = state.beta1 * state.mean[name] + (1 - state.beta1) * g
        v = state.beta2 * state.square[name] + (1 - state.beta2) * g**2
        if textbook:
            t = state.steps[name] + 1
            found[name] = (m / (1 - state.beta1**t)) / (
                (v / (1 - state.beta2**t)) ** 0.5 + state.eps
            )
        else:
            found[name] = m / (v + 1e-8) ** 0.5
    return found


def brute(
    model: nn.Module,
    batch: Batch,
    groups: list[Batch],
    state: Moments,
    *,
    textbook: bool = False,
    names: list[str] | None = None,
) -> Tensor:
    """Return [B, M]: cosines with every target row on its own, then their mean over the group."""
    names = names or [n for n, p in model.named_parameters() if p.requires_grad]
    steps = [flat(stepped(g, state, textbook), names) for g in gradients(model, batch)]
    targets = [[flat(g, names) for g in gradients(model, group)] for group in groups]
    cosine = nn.functional.cosine_similarity
    return torch.stack(
        [
            torch.stack(
                [torch.stack([cosine(s, g, 0, 1e-300) for g in of]).mean() for of in targets]
            )
            for s in steps
        ]
    )


def unit_means(engine: Engine, groups: list[Batch]) -> dict[str, Tensor]:
    """Return the mean unit gradients of the groups, by plain autograd."""
    names = list(engine.target_params(groups[0], ""))
    sums = []
    for group in groups:
        found = gradients(engine.model, group)
        lengths = [flat(g, names).norm() for g in found]
        pairs = list(zip(found, lengths, strict=True))
        sums.append({n: sum(g[n] / size for g, size in pairs) / group.rows for n in names})
    return {name: torch.stack([s[name] for s in sums]) for name in names}  # type: ignore[arg-type]


def scored(
    scorer: GradSimilarity,
    model: nn.Module,
    batch: Batch,
    groups: list[Batch],
    state: Moments,
    how: Callable[..., Outputs] = outputs,
) -> Tensor:
    engine = Engine(model, how, scorer.needs)
    (signal,) = {s for s in scorer.needs if s.kind == "adam_target_dot"}
    directions = unit_means(engine, groups)
    engine.comparisons = {signal: AdamComparison(state, scorer.adam, directions)}
    found = engine(batch)
    return scorer.reduce({s: v.double()[None] for s, v in found.items()}, ONE)


@pytest.mark.parametrize("adam", ["less", "textbook"])
@pytest.mark.parametrize("groups", ["max", "mean"])
def test_it_equals_the_cosines_of_every_pair_of_rows(adam: str, groups: str) -> None:
    model, batch, targets = network(), rows(9, 1), [rows(5, 2), rows(3, 3)]
    state = moments(model)
    expected = brute(model, batch, targets, state, textbook=adam == "textbook")
    expected = expected.amax(1) if groups == "max" else expected.mean(1)
    found = scored(
        GradSimilarity(mode="less", adam=adam, groups=groups), model, batch, targets, state
    )
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_row_worked_by_hand() -> None:
    """Two weights with gradient (3, 4), m = (1, 0), v = (0, 25), β1 = 1/2, β2 = 3/4, t = 1."""
    state = Moments(
        {"w": torch.tensor([[1.0, 0.0]]).double()}, {"w": torch.tensor([[0.0, 25.0]]).double()},
        {"w": 1}, 0.5, 0.75, 0.0,
    )  # fmt: skip
    grad = torch.tensor([[[3.0, 4.0]]]).double()
    # m' = (2, 2), v' = (9/4, 18.75 + 4) = (2.25, 22.75)
    expected = torch.tensor([[[2 / 1.5, 2 / math.sqrt(22.75)]]], dtype=torch.float64)
    # 1e-8 inside the root: relative 2.2e-9
    torch.testing.assert_close(state.step("w", grad.clone(), "less"), expected, rtol=3e-9, atol=0)
    # t = 2: divided by 1 − 1/4 and the root by √(1 − 9/16)
    corrected = expected / 0.75 * math.sqrt(7 / 16)
    torch.testing.assert_close(state.step("w", grad.clone(), "textbook"), corrected, **EXACT)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 10_000))
def test_with_one_scale_for_all_and_no_momentum_it_is_the_cosine_of_plain_gradients(
    seed: int,
) -> None:
    """v constant, β2 = 1 and β1 = 0: Γ is g times a number, and cosines know no numbers."""
    model, batch, target = network(), rows(5, seed), rows(1, seed + 1)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    same = {n: torch.full_like(p, 0.37) for n, p in model.named_parameters()}
    state = Moments(zeros, same, dict.fromkeys(zeros, 0), 0.0, 1.0, 1e-8)
    plain = GradSimilarity()
    engine = Engine(model, outputs, plain.needs)
    engine.directions = {n: g[None] for n, g in engine.summed_gradient(target)[1].items()}
    found = engine(batch)
    expected = plain.reduce({s: v[None] for s, v in found.items()}, ONE)
    torch.testing.assert_close(scored(LESS, model, batch, [target], state), expected, **EXACT)


def test_with_all_gradients_in_the_momentum_every_row_scores_alike() -> None:
    model, batch, target = network(), rows(4, 1), rows(3, 2)
    state = moments(model)
    still = Moments(state.mean, state.square, state.steps, 1.0, 1.0, EPS)
    found = scored(LESS, model, batch, [target], still)
    torch.testing.assert_close(found, found[:1].expand(4), **EXACT)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_textbook_step_is_what_torch_moves_the_weights_by(kind: type[Any]) -> None:
    """After some real steps, one on each row alone; what AdamW decays comes apart from it."""
    rate, decay = 1e-2, 0.1 if kind is torch.optim.AdamW else 0.0

    def trained() -> tuple[nn.Module, Any]:
        model = network()
        optimizer = kind(
            model.parameters(), lr=rate, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay
        )
        for step in range(3):
            optimizer.zero_grad()
            outputs(model, rows(6, step)).loss.mean().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    kept = {n: optimizer.state[p] for n, p in model.named_parameters()}
    state = Moments(
        {n: s["exp_avg"].clone() for n, s in kept.items()},
        {n: s["exp_avg_sq"].clone() for n, s in kept.items()},
        {n: int(s["step"]) for n, s in kept.items()}, 0.8, 0.95, 1e-3,
    )  # fmt: skip
    batch = rows(3, 9)
    for row in range(3):
        after, optimizer = trained()
        optimizer.zero_grad()
        outputs(after, batch.select_rows([row])).loss.sum().backward()
        optimizer.step()
        grads = gradients(model, batch)[row]
        for (name, new), old in zip(after.named_parameters(), model.parameters(), strict=True):
            matrix = grads[name].reshape(1, len(old) if old.dim() > 1 else 1, -1)
            step = state.step(name, matrix.clone(), "textbook").reshape(old.shape)
            moved = old * (1 - rate * decay) - rate * step
            torch.testing.assert_close(new.detach(), moved.detach(), **EXACT)


def test_batches_and_the_order_of_rows_change_nothing() -> None:
    model, batch, target = network(), rows(7, 1), rows(4, 2)
    state = moments(model)
    whole = scored(LESS, model, batch, [target], state)
    alone = [scored(LESS, model, batch.select_rows([i]), [target], state) for i in range(7)]
    torch.testing.assert_close(torch.cat(alone), whole, **EXACT)
    order = [5, 2, 2, 0]
    torch.testing.assert_close(
        scored(LESS, model, batch.select_rows(order), [target], state), whole[order], **EXACT
    )


class Experts(nn.Module):
    """Each row goes through one of two layers; the third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] > 0
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        if first.any():
            out = out + first * self.layers[0](x)
        if not first.all():
            out = out + ~first * self.layers[1](x)
        return out


def test_momentum_moves_what_a_row_does_not_use_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    model, batch, target = Experts().double(), rows(8, 1), rows(5, 2)
    state = moments(model)
    expected = brute(model, batch, [target], state)[:, 0]
    torch.testing.assert_close(scored(LESS, model, batch, [target], state), expected, **EXACT)
    x = batch.inputs["x"][:, 0]
    for side in (x > 0, x <= 0):  # one expert is not in the pass at all
        some = side.nonzero().flatten().tolist()
        assert some
        found = scored(LESS, model, batch.select_rows(some), [target], state)
        torch.testing.assert_close(found, expected[some], **EXACT)


def test_frozen_parameters_count_on_neither_side() -> None:
    model, batch, target = network(), rows(6, 1), rows(4, 2)
    state = moments(model)
    model[0].weight.requires_grad_(False)
    names = ["0.bias", "2.weight", "2.bias"]
    found = scored(LESS, model, batch, [target], state)
    model[0].weight.requires_grad_(True)
    expected = brute(model, batch, [target], state, names=names)
    torch.testing.assert_close(found, expected[:, 0], **EXACT)


def test_more_rows_than_fit_in_scratch_are_taken_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch, target = network(), rows(9, 1), rows(4, 2)
    state = moments(model)
    whole = scored(LESS, model, batch, [target], state)
    monkeypatch.setattr("curate.kernels.summation.SCRATCH", 50)  # two rows of 24 numbers
    torch.testing.assert_close(scored(LESS, model, batch, [target], state), whole, **EXACT)


# -- projections and sketches


def projected(values: dict[str, Tensor], k: int, seed: int) -> Tensor:
    """Return the dense projection of one row's numbers, sign by sign from the map's own columns."""
    from curate.kernels.projection import project_matrix

    total = torch.zeros(k, dtype=torch.float64)
    for name, g in values.items():
        matrix = g.reshape(len(g) if g.dim() > 1 else 1, -1)
        for r in range(matrix.shape[0]):
            for c in range(matrix.shape[1]):
                unit = torch.zeros(1, *matrix.shape, dtype=torch.float64)
                unit[0, r, c] = 1
                column = project_matrix(unit, stream_key(seed, name, "whole"), k)[0]
                total += matrix[r, c] * column
    return total


def test_a_projection_is_compared_by_its_own_length() -> None:
    model, batch, target, k = network(), rows(3, 1), rows(2, 2), 12
    state, scorer = moments(model), GradSimilarity(mode="less", projection=k)
    theirs = [projected(g, k, 0) for g in gradients(model, target)]
    direction = sum(t / t.norm() for t in theirs) / 2
    mine = [projected(stepped(g, state), k, 0) for g in gradients(model, batch)]
    expected = torch.stack([m @ direction / m.norm() for m in mine])
    engine = Engine(model, outputs, scorer.needs)
    signal = Signal("adam_target_dot", adam="less", projection=k)
    assert isinstance(direction, Tensor)
    comparison = AdamComparison(state, "less", {"": direction[None]}, Projection(0, k))
    engine.comparisons = {signal: comparison}
    found = scorer.reduce({s: v[None] for s, v in engine(batch).items()}, ONE)
    torch.testing.assert_close(found, expected, **EXACT)


def test_sketches_estimate_the_products_and_leave_the_length_exact() -> None:
    model, batch, target = network(), rows(40, 1), rows(6, 2)
    state = moments(model)
    engine = Engine(model, outputs, LESS.needs)
    dot, square = Signal("adam_target_dot", adam="less"), Signal("adam_sq_norm", adam="less")
    directions = unit_means(engine, [target])
    engine.comparisons = {dot: AdamComparison(state, "less", directions)}
    exact = engine(batch)
    errors = []
    for seed in range(30):
        read = TwoSidedSketch(seed, (8, 8))
        found = {
            n: sketch_of(read, n, v)[None]
            for n, v in {n: d[0] for n, d in directions.items()}.items()
        }
        engine.comparisons = {dot: AdamComparison(state, "less", found, read)}
        estimate = engine(batch)
        torch.testing.assert_close(estimate[square], exact[square], **EXACT)
        errors.append(estimate[dot] - exact[dot])
    off = torch.stack(errors)  # independent seeds: the mean of 30 lies within 4 standard errors
    spread = off.std(0) / math.sqrt(30)
    assert (off.mean(0).abs() < 4 * spread).all()


def sketch_of(read: TwoSidedSketch, name: str, value: Tensor) -> Tensor:
    from curate.scorers.parts import Full, Gradient

    return read(Gradient(name, value.shape, full=Full(value[None])))[0]


# -- settings


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"mode": "less", "similarity": "dot"}, "compares by similarity cosine alone"),
        ({"mode": "less", "adam": "adamw"}, "adam is one of less, textbook, not 'adamw'"),
        ({"mode": "less", "projection": -1}, "projection is a number of dimensions, not -1"),
        ({"projection": 8}, "belong to mode less, not to tracin"),
        ({"adam": "textbook", "mode": "dvgs"}, "belong to mode less, not to dvgs"),
    ],
)
def test_other_settings_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GradSimilarity(**given)


def test_the_reduction_by_hand() -> None:
    dot = Signal("adam_target_dot", adam="less")
    square = Signal("adam_sq_norm", adam="less")
    signals = {
        dot: torch.tensor([[[1.0, -2.0]], [[0.5, 1.0]]]).double(),
        square: torch.tensor([[4.0], [1.0]]).double(),
    }
    # cosines (0.5, -1) and (0.5, 1); by rates 3 to 1: (0.5, -0.5), at most 0.5, on average 0
    rates = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert LESS.reduce(signals, rates).tolist() == [0.5]
    mean = GradSimilarity(mode="less", groups="mean")
    assert mean.reduce(signals, rates).tolist() == [0.0]


def test_several_scorers_share_one_forward_and_one_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch, target = network(), rows(6, 1), rows(4, 2)
    state, plain = moments(model), GradSimilarity()
    others = [
        GradSimilarity(mode="less", adam="textbook"),
        GradSimilarity(mode="less", params="^2"),
    ]
    wanted = frozenset().union(*(s.needs for s in (LESS, plain, *others)))
    passes = {"forward": 0, "backward": 0}

    def counted(model: nn.Module, batch: Batch) -> Outputs:
        passes["forward"] += 1
        return outputs(model, batch)

    engine = Engine(model, counted, wanted)
    engine.directions = {n: g[None] for n, g in engine.summed_gradient(target)[1].items()}
    unit = unit_means(engine, [target])
    dots = [s for s in wanted if s.kind == "adam_target_dot"]
    engine.comparisons = {s: AdamComparison(state, s.adam, unit) for s in dots}
    once = torch.autograd.grad

    def grad(*given: Any, **named: Any) -> Any:
        passes["backward"] += 1
        return once(*given, **named)

    engine(batch)
    passes.update(forward=0, backward=0)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    found = engine(batch)
    assert passes == {"forward": 1, "backward": 1}
    expected = brute(model, batch, [target], state)[:, 0]
    value = LESS.reduce({s: found[s][None] for s in LESS.needs}, ONE)
    torch.testing.assert_close(value, expected, **EXACT)
