"""Models whose last linear layer is not what their logits come from, or only nearly so."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.cross_entropy import IGNORE, token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.signals import signals
from curate.scorers.split_head import split_head

VOCAB, WIDTH, TOKENS = 13, 6, 5


class Language(nn.Module):
    """`after` is what becomes of the logits."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.after = after
        if tied:
            self.head.weight = self.table.weight

    def hidden(self, ids: Tensor) -> Tensor:
        return self.mix(self.table(ids).cumsum(1)).tanh()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids))
        return logits if self.after is None else self.after(logits)


class HeadFirst(nn.Module):
    """The layer registered last is one of the middle, and no square one."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(WIDTH, VOCAB), nn.Embedding(VOCAB, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.down(self.up(x).relu()))


class Adapted(nn.Module):
    """Beside a layer, a product of two small ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def fused(model: nn.Module, batch: Batch) -> Outputs:
    out, head = split_head(model, lambda: model(batch.inputs["ids"]))
    if head is None:
        return Outputs(_rows(token_cross_entropy(out, batch.targets), batch), batch.targets, out)
    token = linear_cross_entropy(out, head.weight, batch.targets, head.bias)
    return Outputs(_rows(token, batch), batch.targets, hidden=out, head=head)


def plain(model: nn.Module, batch: Batch) -> Outputs:
    logits = model(batch.inputs["ids"])
    return Outputs(_rows(token_cross_entropy(logits, batch.targets), batch), batch.targets, logits)


def _rows(token: Tensor, batch: Batch) -> Tensor:
    return token.sum(1) / (batch.targets != IGNORE).sum(1)


def make_batch(rows: int = 4) -> Batch:
    targets = torch.randint(VOCAB, (rows, TOKENS))
    targets[0, :2] = IGNORE
    return Batch({"ids": torch.randint(VOCAB, (rows, TOKENS))}, targets, rows)


def is_split(model: nn.Module, batch: Batch) -> bool:
    with torch.no_grad():
        return split_head(model, lambda: model(batch.inputs["ids"]))[1] is not None


def agrees_with_autograd(model: nn.Module, batch: Batch, kit, loss=fused) -> None:
    """The norms, taken together with what shares their pass, and the losses."""
    model.eval()
    truth = kit.brute_force(model, batch, plain)
    want = sum(g.flatten(1).square().sum(1) for g in truth.values())
    got = signals(model, batch, loss, ["loss", "grad_sq_norm", "el2n_seq"])
    torch.testing.assert_close(got["loss"], plain(model, batch).loss.detach(), equal_nan=True)
    torch.testing.assert_close(got["grad_sq_norm"], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["el2n_seq"], _logit_norm(model, batch), rtol=1e-9, atol=1e-12)


def _logit_norm(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.inputs["ids"])
    (g,) = torch.autograd.grad(
        _rows(token_cross_entropy(logits, batch.targets), batch).sum(), logits
    )
    return g.flatten(1).norm(dim=1)


def _halved_in_place(logits: Tensor) -> Tensor:
    return logits.div_(2)


def _masked_in_place(logits: Tensor) -> Tensor:
    logits[..., 4:] = -30.0
    return logits


def _checked(logits: Tensor) -> Tensor:
    assert logits.shape[-1] == VOCAB
    return logits


def _viewed(logits: Tensor) -> Tensor:
    return logits.view(-1, TOKENS, VOCAB)


def _shifted(logits: Tensor) -> Tensor:
    return logits + torch.linspace(0, 1, VOCAB, dtype=logits.dtype)


@pytest.mark.parametrize("after", [_halved_in_place, _masked_in_place, _checked, _viewed, _shifted])
def test_logits_that_something_becomes_of_are_not_split(after, kit) -> None:
    """Some of these would take the hidden states without complaint, others raise on them."""
    model, batch = Language(after).double(), make_batch()
    agrees_with_autograd(model, batch, kit)
    assert not is_split(model, batch)


def test_the_last_linear_layer_need_not_be_the_head(kit) -> None:
    model, batch = HeadFirst().double(), make_batch()
    agrees_with_autograd(model, batch, kit)
    assert not is_split(model, batch)


@pytest.mark.parametrize("is_late", [False, True])
def test_an_adapter_on_the_head_counts_even_if_put_there_late(is_late: bool, kit) -> None:
    model, batch = Language().double(), make_batch()
    if is_late:
        assert is_split(model, batch)
    model.head = Adapted(model.head).double()  # type: ignore[assignment]
    agrees_with_autograd(model, batch, kit)


def test_a_users_hook_on_the_head_sees_logits_even_if_put_there_late(kit) -> None:
    model, batch, sizes = Language().double(), make_batch(), set[int]()
    assert is_split(model, batch)

    def doubled(module: nn.Module, args: object, out: Tensor) -> Tensor:
        sizes.add(out.shape[-1])
        return 2 * out

    handle = model.head.register_forward_hook(doubled)
    agrees_with_autograd(model, batch, kit)
    assert sizes == {VOCAB}
    handle.remove()
    assert is_split(model, batch), "nothing else was in the way"


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_heads_whose_weight_is_computed(wrap, kit) -> None:
    model, batch = Language(), make_batch()
    assert is_split(model, batch)
    wrap(model.head)
    agrees_with_autograd(model.double(), batch, kit)


def test_a_new_head_is_tried_again(kit) -> None:
    model, batch = Language().double(), make_batch()
    assert is_split(model, batch)
    model.head = nn.Linear(WIDTH, VOCAB).double()
    agrees_with_autograd(model, batch, kit)
    assert is_split(model, batch)


def test_what_a_model_cannot_do_is_said_by_the_model() -> None:
    def refuse() -> Tensor:
        raise KeyError("no such token")

    model = Language()
    with torch.no_grad(), pytest.raises(KeyError, match="no such token"):
        split_head(model, refuse)
    assert is_split(model, make_batch()), "nothing was learnt from it"


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_without_targets_has_no_gradient_whatever_its_loss(tied: bool, kit) -> None:
    """Its mean is 0 / 0, and its seed 1 / 0."""
    model, batch = Language(tied=tied).double(), make_batch()
    batch.targets[2] = IGNORE
    agrees_with_autograd(model, batch, kit)
    got = signals(model, batch, fused, ["loss", "grad_norm", "el2n_seq"])
    assert got["loss"][2].isnan()
    assert got["grad_norm"][2] == 0 and got["el2n_seq"][2] == 0


def test_a_head_that_is_used_twice_keeps_the_other_signals_of_its_pass(kit) -> None:
    """With no one use to start from, the logits' gradient needs a pass without taps."""

    class Twice(Language):
        def forward(self, ids: Tensor) -> Tensor:
            h = self.hidden(ids)
            return self.head(h) + self.head(h.flip(2)) / 2

    model, batch = Twice().double(), make_batch()
    agrees_with_autograd(model, batch, kit)
    agrees_with_autograd(model, batch, kit, loss=plain)


def test_a_tied_head_whose_matrix_is_used_in_the_middle_too(kit) -> None:
    class Thrice(Language):
        def hidden(self, ids: Tensor) -> Tensor:
            x = super().hidden(ids)
            return x + torch.tanh(x @ self.table.weight.T) @ self.table.weight

    model, batch = Thrice(tied=True).double(), make_batch()
    agrees_with_autograd(model, batch, kit)
    assert is_split(model, batch)
    got = signals(model, batch, fused, ["weight_alignment"])["weight_alignment"]
    logits = model(batch.inputs["ids"])
    (g,) = torch.autograd.grad(
        _rows(token_cross_entropy(logits, batch.targets), batch).sum(), logits
    )
    of_head = torch.einsum("btv,btd->bvd", g, model.hidden(batch.inputs["ids"]))
    w = model.head.weight
    want = -(of_head * w).sum((1, 2)) / (of_head.flatten(1).norm(dim=1) * w.norm())
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


def test_a_table_looked_up_after_the_head_was_called(kit) -> None:
    """The cross term's columns were kept for the look-ups made before."""

    def with_penalty(loss):
        def made(model: nn.Module, batch: Batch) -> Outputs:
            outputs = loss(model, batch)
            extra = model.table(batch.inputs["ids"][:, :3]).pow(2).sum((1, 2))
            return Outputs(outputs.loss + extra)

        return made

    model, batch = Language(tied=True).double(), make_batch()
    truth = kit.brute_force(model, batch, with_penalty(plain))
    want = sum(g.flatten(1).square().sum(1) for g in truth.values())
    engine = Engine(model, with_penalty(fused), [Signal("grad_sq_norm")])
    got = engine(batch)[Signal("grad_sq_norm")]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert engine.paths["table.weight"] == "analytic: embedding + linear_head"


def test_rows_in_no_known_place_of_the_head_are_taken_one_by_one(kit) -> None:
    """Hidden states in one flat axis, outside any module: nothing says whose each is."""

    def flat(model: nn.Module, batch: Batch) -> Outputs:
        out, head = split_head(model, lambda: model(batch.inputs["ids"]))
        if head is None:
            return plain(model, batch)
        token = linear_cross_entropy(
            out.flatten(0, 1), head.weight, batch.targets.flatten(), head.bias
        )
        loss = _rows(token.view(batch.targets.shape), batch)
        return Outputs(loss, batch.targets, hidden=out, head=head)

    model, batch = Language(tied=True).double(), make_batch()
    agrees_with_autograd(model, batch, kit, loss=flat)
    engine = Engine(model, flat, [Signal("grad_sq_norm"), Signal("el2n_seq")])
    engine(batch)
    assert engine.paths["table.weight"] == "row by row"


@pytest.mark.parametrize("only", ["", "scale"])
def test_a_parameter_that_goes_through_the_whole_model_leaves_the_head_split(
    only: str, kit
) -> None:
    """There the model's output is caught by a hook, which puts another tensor in its place."""

    class Divided(Language):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(WIDTH) + 1)

        def hidden(self, ids: Tensor) -> Tensor:
            return super().hidden(ids) / self.scale

    model, batch = Divided().double(), make_batch()
    for name, p in model.named_parameters():
        p.requires_grad_(only in name)
    agrees_with_autograd(model, batch, kit)
    engine = Engine(model, fused, [Signal("grad_sq_norm"), Signal("el2n_seq")])
    engine(batch)
    assert engine.paths["scale"] == "vmap: model"
    assert only or engine.paths["head.weight"] == "analytic: linear_head"
    for p in model.parameters():
        p.requires_grad_(False)
    assert is_split(model, batch)


def test_nothing_of_a_pass_outlives_it() -> None:
    model, batch = Language(), make_batch()
    model.requires_grad_(False)
    gc.collect()
    gc.disable()
    try:
        out, head = split_head(model, lambda: model(batch.inputs["ids"]))
        gone = weakref.ref(out)
        assert head is model.head
        del out
        assert gone() is None, "without the collector of circles"
    finally:
        gc.enable()


def test_a_loss_of_two_calls_of_the_model_shows_the_statistics_of_its_own_one() -> None:
    """A preference: the second call is of the rejected text, the outputs are of the chosen."""

    def preference(model: nn.Module, batch: Batch) -> Outputs:
        chosen = fused(model, batch)
        rejected = fused(model, replace(batch, inputs={"ids": batch.inputs["ids"].flip(1)}))
        return replace(chosen, loss=-nn.functional.logsigmoid(rejected.loss - chosen.loss))

    model, batch = Language(tied=True).double(), make_batch()
    want = signals(model, batch, plain, ["el2n", "entropy"])
    got = signals(model, batch, preference, ["el2n", "entropy", "grad_norm"])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
