"""select_weights against autograd: the direction between two sets of weights, row by row."""

import copy
from collections.abc import Callable, Collection, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.registry import make_scorers
from curate.scorers.split_head import split_head

ONE = torch.ones(1, dtype=torch.float64)
# float64 throughout: what is left is the order of sums.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
VOCAB = 11


class Language(nn.Module):
    """Every token is predicted from the one before it; the head may be the table itself."""

    def __init__(self, tied: bool, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCAB, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.table(ids)).tanh())
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def classes(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)


def tokens(model: nn.Module, batch: Batch) -> Outputs:
    """As causal_lm has it: with the head's loss at once where weights are frozen."""
    out, head = split_head(model, lambda: model(batch.inputs["x"]))
    if head is None:
        loss = token_cross_entropy(out, batch.targets).mean(1)
        return Outputs(loss, batch.targets, logits=out)
    loss = linear_cross_entropy(out, head.weight, batch.targets, head.bias).mean(1)
    return Outputs(loss, batch.targets, hidden=out, head=head)


def rows(seed: int, n: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    return Batch({"x": x}, torch.randint(3, (n,), generator=draw), n)


def weights_of(model: nn.Module) -> Callable[[Collection[str]], Mapping[str, Tensor]]:
    own = dict(model.named_parameters())
    return lambda names: {n: own[n] for n in names if n in own}


def scored(request: str, model: nn.Module, expert: nn.Module, batch: Batch, outputs=classes):
    (scorer,) = make_scorers(request).values()
    engine = Engine(model, outputs, scorer.needs)
    engine.expert.compare_with(weights_of(expert))
    found = engine(batch)
    return scorer.reduce({s: v.double()[None] for s, v in found.items()}, ONE)


def by_autograd(
    model: nn.Module, expert: nn.Module, batch: Batch, names: list[str], outputs=classes
) -> Tensor:
    """cos(g, θ - θ_expert) of each row alone."""
    own, other = dict(model.named_parameters()), dict(expert.named_parameters())
    delta = torch.cat([(own[n] - other[n]).detach().flatten() for n in names])
    found = []
    for row in range(batch.rows):
        loss = outputs(model, batch.select_rows([row])).loss.sum()
        g = torch.autograd.grad(loss, [own[n] for n in names])
        found.append(torch.cosine_similarity(torch.cat([x.flatten() for x in g]), delta, 0))
    return torch.stack(found).detach()


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ("select_weights", ["2.weight", "2.bias"]),
        ("select_weights(params='')", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("select_weights(params='^0')", ["0.weight", "0.bias"]),
    ],
)
def test_the_cosine_is_autograds(request_: str, names: list[str]) -> None:
    torch.manual_seed(0)
    model, expert, batch = mlp(), mlp(), rows(1)
    got = scored(request_, model, expert, batch)
    torch.testing.assert_close(got, by_autograd(model, expert, batch, names), **CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_language_model_the_head_counts_with_all_its_uses(tied: bool) -> None:
    torch.manual_seed(1)
    model, expert = (Language(tied, bias=not tied).double() for _ in range(2))
    ids = torch.randint(VOCAB, (5, 7))
    batch = Batch({"x": ids[:, :-1]}, ids[:, 1:], 5)
    got = scored("select_weights", model, expert, batch, tokens)
    names = ["table.weight"] if tied else ["head.weight", "head.bias"]
    torch.testing.assert_close(got, by_autograd(model, expert, batch, names, tokens), **CLOSE)


def test_beside_a_target_both_are_as_they_are_alone() -> None:
    """Both take inner products with directions at the head, in one pass."""
    torch.manual_seed(2)
    model, expert = (Language(tied=True, bias=False).double() for _ in range(2))
    ids = torch.randint(VOCAB, (5, 7))
    batch = Batch({"x": ids[:, :-1]}, ids[:, 1:], 5)
    params = {n: p for n, p in model.named_parameters()}
    directions = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in params.items()}
    (a,), (b,) = (make_scorers(r).values() for r in ("select_weights", "grad_similarity"))

    def engine(needs: frozenset[Signal]) -> dict[Signal, Tensor]:
        made = Engine(model, tokens, needs)
        made.directions = directions
        made.expert.compare_with(weights_of(expert))
        return made(batch)

    together = engine(a.needs | b.needs)
    for alone in (engine(a.needs), engine(b.needs)):
        for signal, value in alone.items():
            torch.testing.assert_close(together[signal], value, **CLOSE)


def gradient(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(classes(model, batch).loss.sum(), list(model.parameters()))


def stepped(model: nn.Module, batch: Batch, rate: float) -> nn.Module:
    """A copy after one descent step on the sum of the rows' losses."""
    made, step = copy.deepcopy(model), gradient(model, batch)
    with torch.no_grad():
        for p, g in zip(made.parameters(), step, strict=True):
            p -= rate * g
    return made


def test_members_of_the_step_that_made_the_expert_have_the_cosines_with_their_sum() -> None:
    """Δ = -η Σ_{S*} g of one descent step on S*: θ_base - θ_expert = η Σ_{S*} g."""
    torch.manual_seed(3)
    model, batch, members = mlp(), rows(4, n=8), [1, 4, 6]
    expert = stepped(model, batch.select_rows(members), 0.1)
    grads = torch.stack(
        [
            torch.cat([g.flatten() for g in gradient(model, batch.select_rows([r]))])
            for r in range(8)
        ]
    )
    want = torch.cosine_similarity(grads, grads[members].sum(0)[None], 1)
    # θ - (θ - ηg) loses digits of g: 1e-16 of θ against 0.1 of the gradient.
    got = scored("select_weights(params='')", model, expert, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    of_one = stepped(model, batch.select_rows([4]), 0.1)
    assert scored("select_weights(params='')", model, of_one, batch)[4].item() == pytest.approx(1)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 100), st.floats(0.01, 100))
def test_how_far_the_expert_has_gone_does_not_matter(seed: int, far: float) -> None:
    torch.manual_seed(seed)
    model, expert = mlp(), mlp()
    further = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(further.parameters(), expert.parameters(), strict=True):
            p += far * (q - p)
    once = scored("select_weights", model, expert, rows(seed))
    again = scored("select_weights", model, further, rows(seed))
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-10)
    assert (once.abs() <= 1).all()
    dot = scored("dot=select_weights(similarity=dot)", model, expert, rows(seed))
    torch.testing.assert_close(
        scored("dot=select_weights(similarity=dot)", model, further, rows(seed)), far * dot,
        rtol=1e-9, atol=1e-10,
    )  # fmt: skip


def test_the_order_of_rows_changes_nothing() -> None:
    torch.manual_seed(5)
    model, expert, batch = mlp(), mlp(), rows(5, n=7)
    order = [3, 0, 6, 2, 5, 1, 4]
    whole = scored("select_weights", model, expert, batch)
    torch.testing.assert_close(
        scored("select_weights", model, expert, batch.select_rows(order)), whole[order], **CLOSE
    )


def test_a_descent_step_on_a_high_row_leads_toward_the_expert() -> None:
    torch.manual_seed(6)
    model, expert, batch = mlp(), mlp(), rows(6, n=20)
    value = scored("select_weights(params='')", model, expert, batch)
    before = sum(
        ((p - q) ** 2).sum() for p, q in zip(model.parameters(), expert.parameters(), strict=True)
    )
    for row in (int(value.argmax()), int(value.argmin())):
        moved = stepped(model, batch.select_rows([row]), 1e-4)
        after = sum(
            ((p - q) ** 2).sum()
            for p, q in zip(moved.parameters(), expert.parameters(), strict=True)
        )
        assert (after < before) == (value[row] > 0)


def test_the_same_weights_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="nothing leads from one to the other"):
        scored("select_weights", model, copy.deepcopy(model), rows(0))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight += 1  # of a layer that is not compared
    with pytest.raises(ValueError, match="the weights of the checkpoint itself in 'head'"):
        scored("select_weights", model, changed, rows(0))


def test_another_architecture_is_refused() -> None:
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"2.weight of \[3, 6\], the reference one of \[3, 5\]"):
        scored("select_weights", mlp(), other, rows(0))
    with pytest.raises(ValueError, match="the reference none"):
        scored("select_weights", mlp(), nn.Linear(4, 3).double(), rows(0))


def test_a_row_without_a_gradient_has_none_of_it() -> None:
    torch.manual_seed(7)
    model, expert = mlp(), mlp()
    with torch.no_grad():  # row 0's class is certain to the last bit: p - y underflows
        model[2].bias.copy_(torch.tensor([2000.0, 0.0, 0.0]))
    batch = Batch({"x": torch.randn(2, 4).double()}, torch.tensor([0, 1]), 2)
    value = scored("select_weights", model, expert, batch)
    assert value[0] == 0 and value[1] != 0


def test_an_unknown_similarity_is_refused() -> None:
    with pytest.raises(ValueError, match="similarity is one of cosine, dot, not 'l2'"):
        make_scorers("select_weights(similarity=l2)")
