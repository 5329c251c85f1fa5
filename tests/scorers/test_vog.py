"""Variance of gradients: the card's example, closed forms, and autograd on one row at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.logit_spread import COORDINATES, GRADIENT, LogitSpread, of_one_checkpoint
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.registry import make_scorers
from curate.scorers.split_head import split_head

VARIANTS = "std=vog,var=vog(variant=var),printed=vog(variant=printed)"
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64 throughout


def spread(gradients: Tensor, own: Tensor | None = None) -> dict[str, Tensor]:
    """Return the three variants of gradients [K, B, N], all of whose coordinates count."""
    scorers = make_scorers(VARIANTS)
    state = LogitSpread(sorted({s for scorer in scorers.values() for s in scorer.needs}))
    if own is None:
        own = torch.full(gradients.shape[1:2], gradients.shape[2], dtype=gradients.dtype)
    for k, x in enumerate(gradients, start=1):
        found = state.take({GRADIENT: x, COORDINATES: own}, k == len(gradients))
    weights = torch.full((len(gradients),), 1 / len(gradients), dtype=torch.float64)
    signals = {signal: value.double()[None] for signal, value in found.items()}
    return {alias: scorer.reduce(signals, weights) for alias, scorer in scorers.items()}


def vog(
    models: list[nn.Module], batch: Batch, outputs: Callable[[nn.Module, Batch], Outputs]
) -> dict[str, Tensor]:
    """Return the three variants over these models, through the engine."""
    found = [Engine(m, outputs, [GRADIENT, COORDINATES])(batch) for m in models]
    own = found[0][COORDINATES]
    return spread(torch.stack([f[GRADIENT] for f in found]), own)


def classify(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["x"])
    return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)


class TestTheWorkedExample:
    """Two coordinates at three checkpoints: (1, 0), (3, 0), (2, 3)."""

    GRADIENTS = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[2.0, 3.0]]], dtype=torch.float64)

    def test_variants(self) -> None:
        found = {name: value.item() for name, value in spread(self.GRADIENTS).items()}
        # the digits that the card prints
        want = {"std": 1.1153551, "var": 1.3333333, "printed": 2.3094011}
        assert found == pytest.approx(want, abs=1e-7)

    def test_padding_counts_for_nothing(self) -> None:
        padded = torch.cat([self.GRADIENTS, torch.zeros(3, 1, 5, dtype=torch.float64)], 2)
        own = torch.full((1,), 2.0, dtype=torch.float64)
        for name, value in spread(padded, own).items():
            torch.testing.assert_close(value, spread(self.GRADIENTS)[name], msg=name)

    def test_one_checkpoint_and_equal_checkpoints_have_none(self) -> None:
        for gradients in (self.GRADIENTS[:1], self.GRADIENTS[:1].expand(4, -1, -1)):
            assert all(value.item() == 0.0 for value in spread(gradients).values())


def test_a_state_starts_anew_with_the_next_run() -> None:
    gradients = torch.randn(3, 4, 5, dtype=torch.float64)
    state, own = LogitSpread([Signal("vog_var")]), torch.full((4,), 5.0, dtype=torch.float64)
    for _ in range(2):
        for k, x in enumerate(gradients, start=1):
            found = state.take({GRADIENT: x, COORDINATES: own}, k == 3)
        want = gradients.var(0, correction=0).mean(1)
        torch.testing.assert_close(found[Signal("vog_var")], want, **CLOSE)


@pytest.mark.parametrize("field", ["variant=sd", "normalise=rows"])
def test_what_it_does_not_know_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        make_scorers(f"vog({field})")


# -- gradients -----------------------------------------------------------------------------------


@contextmanager
def _first_lookup(model: nn.Module) -> Iterator[list[Tensor]]:
    """Catch what the model's first look-up of tokens gives."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(out if out.requires_grad else out.requires_grad_())  # frozen, in LoRA
        return seen[-1].clone()  # the model may add positions to it in place

    handles = [
        m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Embedding)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def truth(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Outputs]
) -> list[Tensor]:
    """Return each row's gradient at its own coordinates, from autograd on the row alone."""
    model.eval()
    found = []
    for i in range(batch.rows):
        one = batch.select_rows([i])
        first = next(iter(one.inputs))
        x = one.inputs[first]
        if x.is_floating_point():
            x = x.clone().requires_grad_()
            one = Batch({**one.inputs, first: x}, one.targets, 1)
        with _first_lookup(model) as seen:
            out = loss(model, one)
        assert out.logits is not None and out.targets is not None
        y = out.targets.clamp(min=0)[..., None]
        logit = (out.logits.gather(-1, y)[..., 0] * (out.targets != IGNORE)).sum()
        (g,) = torch.autograd.grad(logit, x if x.is_floating_point() else seen[0])
        if g.dim() == 4:
            g = g.mean(1)
        mask = one.inputs.get("attention_mask")
        found.append((g if mask is None else g[mask.bool()]).flatten())
    return found


def test_gradients_are_those_of_autograd_on_the_row_alone(case: SimpleNamespace) -> None:
    engine = Engine(case.model, case.loss, [GRADIENT, COORDINATES])
    found = engine(case.batch)
    want = truth(case.model, case.batch, case.loss)
    assert found[COORDINATES].tolist() == [len(g) for g in want]
    for values, g in zip(found[GRADIENT], want, strict=True):  # padding is on the right
        torch.testing.assert_close(values[: len(g)], g, **CLOSE)
        assert not values[len(g) :].any()


def test_the_loss_s_signals_are_the_same_bits_beside_it(sampled: SimpleNamespace) -> None:
    """The taps sleep while the logits are differentiated, and so do the caught modules."""
    wanted = [Signal("loss"), Signal("grad_sq_norm"), Signal("el2n"), Signal("el2n_seq")]
    alone = Engine(sampled.model, sampled.loss, wanted)(sampled.batch)
    both = Engine(sampled.model, sampled.loss, [*wanted, GRADIENT])(sampled.batch)
    for signal, value in alone.items():
        assert torch.equal(both[signal], value), signal


@pytest.mark.parametrize("name", ["gpt2 tied", "encoder"])
def test_activations_made_twice_give_the_same(kit: SimpleNamespace, name: str) -> None:
    case = kit.make(name)
    wanted = [GRADIENT, COORDINATES, Signal("grad_sq_norm"), Signal("loss")]
    engine = Engine(case.model, case.loss, wanted)
    once = engine(case.batch)
    engine.recompute = True
    for signal, value in engine(case.batch).items():
        torch.testing.assert_close(value, once[signal], **CLOSE)


def test_embeddings_that_are_changed_in_place_are_taken_as_they_came() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x)
            h *= 3.0
            logits: Tensor = self.head(h.tanh().mean(1))
            return logits

    model, y = Scaled().double(), torch.tensor([0, 2, 1])
    batch = Batch({"x": torch.randint(9, (3, 5))}, y, 3)
    got = Engine(model, classify, [GRADIENT])(batch)[GRADIENT]
    e = model.table(batch.inputs["x"]).detach().requires_grad_()
    logits = model.head((3 * e).tanh().mean(1))
    (want,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), e)
    torch.testing.assert_close(got, want.flatten(1), **CLOSE)


class Language(nn.Module):
    """Each token sees those before it; logits of one linear layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(29, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 29, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(self.table(ids).cumsum(1)).tanh())
        return logits


def plain(model: nn.Module, batch: Batch) -> Outputs:
    out = model(batch.inputs["ids"])
    return _summed(token_cross_entropy(out, batch.targets), batch, logits=out)


def fused(model: nn.Module, batch: Batch) -> Outputs:
    out, head = split_head(model, lambda: model(batch.inputs["ids"]))
    if head is None:  # as the probe runs it, with trainable weights
        return plain(model, batch)
    token = linear_cross_entropy(out, head.weight, batch.targets, head.bias)
    return _summed(token, batch, hidden=out, head=head)


def _summed(token: Tensor, batch: Batch, **found: Any) -> Outputs:
    loss = token.sum(1)
    if batch.row_ids is not None:
        loss = loss.new_zeros(batch.rows).index_add(0, batch.row_ids, loss)
    return Outputs(loss, batch.targets, row_ids=batch.row_ids, **found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [plain, fused])
def test_a_document_in_windows_is_averaged_over_all_its_tokens(
    bias: bool, outputs: Callable[[nn.Module, Batch], Outputs]
) -> None:
    """Windows of 6, 6 and 2 tokens, of two documents, not in order; a prompt that is no target."""
    models = [Language(bias).double() for _ in range(3)]
    ids, row_ids = torch.randint(29, (4, 6)), torch.tensor([1, 0, 0, 1])
    targets = torch.randint(29, (4, 6))
    targets[2, 2:] = IGNORE
    targets[0, :3] = IGNORE
    lengths = [6, 6, 2, 6]
    batch = Batch({"ids": ids}, targets, 2, row_ids)
    got = vog(models, batch, outputs)

    gradients: list[list[Tensor]] = [[], []]
    for s, row in enumerate(row_ids.tolist()):
        at = []
        for model in models:
            e = model.table(ids[s]).detach().requires_grad_()
            logits = model.head(model.mix(e.cumsum(0)).tanh())
            z = sum(logits[t, y] for t, y in enumerate(targets[s].tolist()) if y != IGNORE)
            at.append(torch.autograd.grad(z, e)[0][: lengths[s]].flatten())
        gradients[row].append(torch.stack(at))
    rows = [torch.cat(of, 1) for of in gradients]
    variance = torch.stack([g.var(0, correction=0).mean() for g in rows])
    deviation = torch.stack([g.std(0, correction=0).mean() for g in rows])
    torch.testing.assert_close(got["var"], variance, **CLOSE)
    torch.testing.assert_close(got["std"], deviation, **CLOSE)
    torch.testing.assert_close(got["printed"], variance * 3**0.5, **CLOSE)


def test_a_head_with_its_loss_makes_no_logits_for_it() -> None:
    model = Language(True).double()
    batch = Batch({"ids": torch.randint(29, (3, 6))}, torch.randint(29, (3, 6)), 3)
    engine = Engine(model, fused, [GRADIENT, Signal("grad_sq_norm")])
    engine(batch)
    with torch.profiler.profile(record_shapes=True) as profile:
        engine(batch)
    shapes = [tuple(s) for event in profile.events() for s in event.input_shapes]
    assert (18, 8) in shapes or (3, 6, 8) in shapes  # it ran
    scattered = [e for e in profile.events() if e.name.startswith("aten::scatter")]
    assert not any((3, 6, 29) == tuple(s) for e in scattered for s in e.input_shapes)


# -- what must hold ------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _vectors(rows: int = 6) -> Batch:
    return Batch({"x": torch.randn(rows, 4, dtype=torch.float64)}, torch.arange(rows) % 3, rows)


def test_doubled_logits_double_the_deviation_and_quadruple_the_variance() -> None:
    def doubled(model: nn.Module, batch: Batch) -> Outputs:
        logits = 2 * model(batch.inputs["x"])
        return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)

    models, batch = [_mlp() for _ in range(4)], _vectors()
    one, two = vog(models, batch, classify), vog(models, batch, doubled)
    torch.testing.assert_close(two["std"], 2 * one["std"], **CLOSE)
    torch.testing.assert_close(two["var"], 4 * one["var"], **CLOSE)


def test_of_a_linear_model_it_knows_the_label_alone() -> None:
    models, batch = [nn.Linear(4, 3).double() for _ in range(4)], _vectors(12)
    rows = torch.stack([m.weight.detach() for m in models])  # S_k = w_y at checkpoint k
    want = rows.std(0, correction=0).mean(1)[batch.targets]
    torch.testing.assert_close(vog(models, batch, classify)["std"], want, **CLOSE)


def test_neither_the_batch_nor_the_order_of_checkpoints_matters() -> None:
    models, batch = [_mlp() for _ in range(4)], _vectors(7)
    whole = vog(models, batch, classify)
    rows = [3, 0, 6]
    for name, value in vog(models[::-1], batch.select_rows(rows), classify).items():
        torch.testing.assert_close(value, whole[name][rows], **CLOSE)


@pytest.mark.parametrize("with_loss", [False, True])
def test_one_forward_pass_and_one_backward_pass_each(with_loss: bool) -> None:
    """Counted where autograd is asked, and by how often the model runs."""
    model, batch, runs = _mlp(), _vectors(), []
    wanted = of_one_checkpoint([Signal("vog_std"), Signal("vog_var"), Signal("el2n")])
    wanted |= {Signal("grad_sq_norm")} if with_loss else set()
    engine = Engine(model, classify, wanted)
    engine(batch)
    model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.MonkeyPatch.context() as patch:
        backward, calls = torch.autograd.grad, []
        patch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or backward(*a, **k))
        engine(batch)
    assert (len(runs), len(calls)) == (1, 1 + with_loss)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda m, b: classify(m, b).loss, "targets beside the loss"),
        (lambda m, b: Outputs(classify(m, b).loss, b.targets), "with logits"),
    ],
)
def test_outputs_that_say_too_little_are_refused(outputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(_mlp(), outputs, [GRADIENT])(_vectors())


def test_token_ids_that_no_embedding_looks_up_are_refused() -> None:
    class Hot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(nn.functional.one_hot(x, 9).to(self.head.weight).mean(1))
            return logits

    batch = Batch({"x": torch.randint(9, (4, 5))}, torch.arange(4) % 3, 4)
    with pytest.raises(ValueError, match="looks up as they are"):
        Engine(Hot().double(), classify, [GRADIENT])(batch)


def test_an_engine_at_one_checkpoint_has_no_spread() -> None:
    with pytest.raises(ValueError, match="several checkpoints"):
        Engine(_mlp(), classify, [Signal("vog_std")])
