"""A head taken with its loss, whose logits never exist, against autograd on one row at a time."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.kernels.projection import project_matrix
from curate.kernels.rademacher import stream_key
from curate.kernels.sketch import sketch_matrix
from curate.scorers.engine import Engine
from curate.scorers.needs import Needs
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.readouts import Dots, TwoSidedSketch
from curate.scorers.signals import signals
from curate.scorers.split_head import split_head
from curate.scorers.watched_model import WatchedModel

VOCAB, WIDTH, TOKENS = 29, 8, 6
KINDS = "loss", "el2n", "entropy", "margin", "correct", "tokens", "el2n_seq", "weight_alignment"


class Language(nn.Module):
    """A recurrent-free language model: each token sees the one before it."""

    def __init__(self, tied: bool, bias: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        self.scale = scale
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        logits: Tensor = self.head(self.norm(self.mix(torch.cat([x, before], -1)).tanh()))
        return logits if self.scale == 1.0 else logits * self.scale


def fused(model: nn.Module, batch: Batch) -> Outputs:
    """Mean over a row's target tokens, the head taken with the loss where it can be."""
    out, head = split_head(model, lambda: model(batch.inputs["ids"]))
    if head is None:
        return _rows(token_cross_entropy(out, batch.targets), batch, logits=out)
    token = linear_cross_entropy(out, head.weight, batch.targets, head.bias)
    return replace(_rows(token, batch, logits=None), hidden=out, head=head)


def plain(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["ids"])
    return _rows(token_cross_entropy(logits, batch.targets), batch, logits)


def _rows(token: Tensor, batch: Batch, logits: Tensor | None) -> Outputs:
    total, count = token.sum(1), (batch.targets != IGNORE).sum(1)
    if batch.row_ids is not None:
        total = total.new_zeros(batch.rows).index_add_(0, batch.row_ids, total)
        count = count.new_zeros(batch.rows).index_add_(0, batch.row_ids, count)
    return Outputs(total / count, batch.targets, logits, row_ids=batch.row_ids)


def make_batch(windows: bool, rows: int = 5) -> Batch:
    """Documents with prompts and padding that are no targets; with windows, of several sequences
    each, not in order."""
    row_ids = torch.tensor([2, 0, 1, 0, 3, 4, 2, 0]) if windows else None
    sequences = len(row_ids) if windows else rows
    ids = torch.randint(VOCAB, (sequences, TOKENS))
    targets = torch.randint(VOCAB, (sequences, TOKENS))
    targets[0, :3] = IGNORE
    targets[1, -2:] = IGNORE
    return Batch({"ids": ids}, targets, rows, row_ids)


@pytest.fixture(params=[(True, False), (False, False), (False, True), (True, True)])
def model(request: pytest.FixtureRequest) -> Language:
    tied, bias = request.param
    return Language(tied, bias).double()


@pytest.mark.parametrize("windows", [False, True])
def test_every_signal_is_that_of_the_logits(model: Language, windows: bool) -> None:
    """`plain` takes another path throughout: logits at hand, no kernel of the fused head."""
    batch = make_batch(windows)
    wants = (*KINDS, "grad_sq_norm", "sketch", "grad_dot", "embedding")
    directions = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    given = dict(sketch_dim=(3, 4), seed=5, directions=directions)
    want = signals(model, batch, plain, wants, **given)
    got = signals(model, batch, fused, wants, **given)
    assert split_head(model, lambda: model(batch.inputs["ids"]))[1] is None, "weights are trainable"
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("windows", [False, True])
def test_each_parameter_alone_agrees_with_autograd(model: Language, windows: bool, kit) -> None:
    batch = make_batch(windows)
    truth = kit.brute_force(model, batch, plain)
    engine = Engine(model, fused, [Signal("grad_sq_norm", f"^{name}$") for name in truth])
    for signal, value in engine(batch).items():
        grad = truth[signal.params[1:-1]].flatten(1)
        torch.testing.assert_close(value, grad.square().sum(1), rtol=1e-9, atol=1e-13)
    assert any("linear_head" in path for path in engine.paths.values())


def test_a_readout_without_a_sum_of_its_own_makes_the_errors_again(model: Language, kit) -> None:
    batch = make_batch(windows=True)
    truth = kit.brute_force(model, batch, plain)
    got = signals(model, batch, fused, ["sketch"], sketch_dim=(7,), seed=3)
    want = sum(
        project_matrix(g if g.dim() == 3 else g[:, None], stream_key(3, name, "whole"), 7)
        for name, g in truth.items()
    )
    torch.testing.assert_close(got["sketch"], want, rtol=1e-9, atol=1e-12)


def test_rows_longer_than_the_hidden_size_take_the_other_form(kit) -> None:
    model = Language(tied=True, bias=False).double()
    ids = torch.randint(VOCAB, (3, 40))
    batch = Batch({"ids": ids}, torch.randint(VOCAB, (3, 40)), 3)
    truth = kit.brute_force(model, batch, plain)
    want = sum(g.flatten(1).square().sum(1) for g in truth.values())
    engine = Engine(model, fused, [Signal("grad_sq_norm")])
    torch.testing.assert_close(engine(batch)[Signal("grad_sq_norm")], want, rtol=1e-9, atol=0)


def test_the_logits_of_a_scored_model_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Language(tied=True, bias=False)
    engine = Engine(model, fused, [Signal("el2n"), Signal("grad_sq_norm")])
    batch = make_batch(windows=False)
    engine(batch)
    called = []
    original = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, w, b=None: called.append(w.shape) or original(x, w, b)
    )
    engine(batch)
    assert (VOCAB, WIDTH) not in called
    assert "forward" not in vars(model.head), "the layer is itself again"


def test_logits_that_are_changed_after_the_head_are_not_split() -> None:
    model = Language(tied=False, bias=False, scale=0.5).double()
    batch = make_batch(windows=False)
    want = signals(model, batch, plain, (*KINDS[:7], "grad_sq_norm"))
    got = signals(model, batch, fused, (*KINDS[:7], "grad_sq_norm"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_training_goes_through_the_layer_itself() -> None:
    model = Language(tied=False, bias=True)
    batch = make_batch(windows=False)
    fused(model, batch).loss.sum().backward()
    assert model.head.weight.grad is not None and model.head.bias.grad is not None


def test_sketches_of_a_head_use_the_signs_of_its_parameter(kit) -> None:
    model = Language(tied=False, bias=False).double()
    batch = make_batch(windows=False)
    grad = kit.brute_force(model, batch, plain)["head.weight"]
    got = signals(model, batch, fused, ["sketch"], params="head", sketch_dim=(5, 2), seed=1)
    keys = stream_key(1, "head.weight", "rows"), stream_key(1, "head.weight", "columns")
    torch.testing.assert_close(got["sketch"], sketch_matrix(grad, keys, (5, 2)))


@pytest.mark.parametrize("windows", [False, True])
def test_several_sets_of_directions_and_sketches_do_not_meet(
    model: Language, windows: bool
) -> None:
    """Each readout by itself is checked above; all together must give the same of each."""
    batch, own = make_batch(windows), dict(model.named_parameters())
    names = frozenset(own)
    reads: dict[str, Dots | TwoSidedSketch] = {
        f"{m} directions": Dots({n: torch.randn(m, *p.shape).double() for n, p in own.items()})
        for m in (2, 1, 3)
    }
    reads |= {f"seed {seed}": TwoSidedSketch(seed, k) for seed, k in ((1, (3, 4)), (2, (5, 2)))}
    passes = WatchedModel(model, fused, probe=True)
    passes.want([""], head=False)
    passes.verify(batch)
    head = passes.passes.plan.head
    assert head is not None and head.key is not None and head.key[0] == "linear_head"
    together = passes.passes.run(batch, Needs({key: (names, read) for key, read in reads.items()}))
    for key, read in reads.items():
        alone = passes.passes.run(batch, Needs({key: (names, read)})).readouts[key]
        for name, value in alone.items():
            found = together.readouts[key][name]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, msg=f"{key} {name}")
