"""The engine's interface: worked examples, one pass for all signals, windows, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curate.kernels.cross_entropy import token_cross_entropy, token_statistics
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.signals import signals

EVERYTHING = [
    Signal(k)
    for k in ("loss", "el2n", "el2n_seq", "entropy", "margin", "correct", "tokens",
              "grad_sq_norm", "weight_alignment")
]  # fmt: skip


def _worked(bias: bool) -> tuple[nn.Module, Batch]:
    """W = [[1,0],[0,1],[0,0]], x = (2, 1), y = 0."""
    layer = nn.Linear(2, 3, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        if bias:
            layer.bias.zero_()
    x = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    return layer, Batch({"input": x}, torch.tensor([0]), 1)


@pytest.mark.parametrize(("bias", "grand"), [(False, 0.9488444), (True, 1.0394070)])
def test_worked_example_of_linear_softmax(kit, bias, grand) -> None:
    model, batch = _worked(bias)
    got = signals(
        model, batch, kit.classify, ["grad_norm", "el2n", "el2n_seq", "weight_alignment", "margin"]
    )
    assert got["grad_norm"].item() == pytest.approx(grand, abs=1e-7)
    assert got["el2n"].item() == pytest.approx(0.4243361, abs=1e-7)
    assert got["el2n_seq"].item() == pytest.approx(got["el2n"].item(), rel=1e-12)
    assert got["weight_alignment"].item() == pytest.approx(0.3165657, abs=1e-7)
    assert got["margin"].item() == 1.0


def test_last_layer_norm_is_error_times_feature(kit) -> None:
    case = kit.make("mlp")
    model, batch = case.model, case.batch
    feature = model.body[:-1](batch.inputs["x"])
    error = model.body[-1](feature).softmax(-1) - F.one_hot(batch.targets, 3)
    got = Engine(model, kit.classify, [Signal("grad_sq_norm", "head"), Signal("loss")])(batch)
    want = error.square().sum(1) * (feature.square().sum(1) + 1)
    torch.testing.assert_close(got[Signal("grad_sq_norm", "head")], want)
    assert set(Engine(model, kit.classify, [Signal("grad_sq_norm", r"^body\.4")])(batch))


def test_scaling_the_loss_scales_the_gradient_and_not_el2n(kit) -> None:
    case = kit.make("bert")

    def tripled(model: nn.Module, batch: Batch) -> Outputs:
        out = case.loss(model, batch)
        return Outputs(3 * out.loss, out.targets, out.logits)

    want = ["grad_norm", "el2n", "el2n_seq", "weight_alignment"]
    one, three = (signals(case.model, case.batch, f, want) for f in (case.loss, tripled))
    torch.testing.assert_close(three["grad_norm"], 3 * one["grad_norm"])
    torch.testing.assert_close(three["el2n_seq"], 3 * one["el2n_seq"])
    torch.testing.assert_close(three["el2n"], one["el2n"])
    torch.testing.assert_close(three["weight_alignment"], one["weight_alignment"])


def test_token_statistics_are_means_over_target_tokens(kit) -> None:
    case = kit.make("gpt2 tied")
    got = Engine(case.model, case.loss, EVERYTHING)(case.batch)
    out = case.loss(case.model.eval(), case.batch)
    each, mask = token_statistics(out.logits, out.targets), case.batch.targets != -100
    for kind in ("el2n", "entropy", "margin", "correct"):
        want = getattr(each, kind).sum(1) / mask.sum(1)
        torch.testing.assert_close(got[Signal(kind)], want)
    torch.testing.assert_close(got[Signal("tokens")], mask.sum(1).double())
    error = (out.logits.softmax(-1) - F.one_hot(case.batch.targets.clamp(min=0), 23)) * mask[
        ..., None
    ]
    want = error.flatten(1).norm(dim=1) / mask.sum(1)
    torch.testing.assert_close(got[Signal("el2n_seq")], want)
    torch.testing.assert_close(got[Signal("loss")], out.loss.detach())


@pytest.mark.parametrize("name", ["gpt2 tied", "llama", "bert"])
def test_weight_alignment_is_that_of_the_heads_own_use(kit, name) -> None:
    """From autograd at the logits and the head's input; the embedding's share is left out."""
    case = kit.make(name)
    head = case.model.classifier if name == "bert" else case.model.lm_head
    caught: list[Tensor] = []
    handle = head.register_forward_hook(lambda m, args, out: caught.append(args[0].detach()))
    got = Engine(case.model, case.loss, [Signal("weight_alignment")])(case.batch)
    caught.clear()
    out = case.loss(case.model.eval(), case.batch)
    handle.remove()
    (g,) = torch.autograd.grad(out.loss.sum(), out.logits)
    h, w = caught[0], head.weight.detach()
    g, h = (x if x.dim() == 3 else x[:, None] for x in (g, h))
    grad = g.mT @ h
    want = -(grad * w).sum((1, 2)) / (grad.flatten(1).norm(dim=1) * w.norm() + 1e-12)
    torch.testing.assert_close(got[Signal("weight_alignment")], want)


def test_one_forward_and_one_backward_serve_all_signals(kit) -> None:
    case = kit.make("gpt2 tied")
    calls = {"forward": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            calls["forward"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            calls["backward"] += 1
            return g

    def counted(model: nn.Module, batch: Batch) -> Outputs:
        out = case.loss(model, batch)
        return Outputs(Count.apply(out.loss), out.targets, out.logits)

    engine = Engine(case.model, counted, [*EVERYTHING, Signal("grad_sq_norm", "wte")])
    engine.verify(case.batch)
    calls.update(forward=0, backward=0)
    engine(case.batch)
    assert calls == {"forward": 1, "backward": 1}
    statistics = Engine(case.model, counted, [Signal("el2n"), Signal("entropy")])
    statistics(case.batch)
    calls.update(forward=0, backward=0)
    statistics(case.batch)
    assert calls == {"forward": 1, "backward": 0}


def test_head_signals_do_not_go_back_beyond_the_head(kit) -> None:
    case = kit.make("bert")
    reached: list[str] = []
    case.model.bert.embeddings.register_forward_hook(
        lambda m, a, out: reached.append("graph") if out.requires_grad else None
    )
    engine = Engine(case.model, case.loss, [Signal("grad_sq_norm", "head"), Signal("el2n_seq")])
    engine.verify(case.batch)
    reached.clear()
    engine(case.batch)
    assert not reached


class _Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_gradient_per_sample_is_made_on_the_analytic_path(kit) -> None:
    width, rows = 64, 32
    model = kit.Named(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3))
    batch = kit.vectors(rows=rows)
    engine = Engine(model.double(), kit.classify, [Signal("grad_sq_norm")])
    engine.verify(batch)
    with _Largest() as largest:
        engine(batch)
    assert largest.numel < rows * width * width // 8


def test_documents_of_several_windows_add_their_gradients_first(kit) -> None:
    """Six windows of three documents, in mixed order; the norm is taken of the row's sum."""
    case = kit.make("gpt2 tied")
    row_ids = torch.tensor([0, 1, 0, 2, 0, 1])
    batch = Batch(case.batch.inputs, case.batch.targets, 3, row_ids)
    truth = kit.brute_force(case.model, batch, case.loss)
    engine = Engine(case.model, case.loss, EVERYTHING)
    got = engine(batch)
    want = sum(g.flatten(1).square().sum(1) for g in truth.values())
    torch.testing.assert_close(got[Signal("grad_sq_norm")], want)
    assert all(p.startswith("analytic") for p in engine.paths.values())
    for i in range(3):
        alone = engine(batch.select_rows([i]))
        for signal, value in got.items():
            torch.testing.assert_close(alone[signal], value[i : i + 1])


@pytest.mark.parametrize("name", ["lstm", "routed experts", "bare parameters", "cnn"])
def test_windows_on_the_slower_paths(kit, name) -> None:
    case = kit.make(name)
    row_ids = torch.tensor([2, 1, 0, 2, 0, 1])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        each = token_cross_entropy(model(**batch.inputs), batch.targets)
        return each.new_zeros(batch.rows).index_add_(0, batch.row_ids, each)

    batch = Batch(case.batch.inputs, case.batch.targets, 3, row_ids)
    truth = kit.brute_force(case.model, batch, lambda m, b: SimpleNamespace(loss=loss(m, b)))
    want = sum(g.reshape(3, -1).square().sum(1) for g in truth.values())
    torch.testing.assert_close(signals(case.model, batch, loss)["grad_norm"], want.sqrt())


def test_padding_contributes_nothing(kit) -> None:
    case = kit.make("gpt2 tied")
    inputs = {k: F.pad(v, (0, 3)) for k, v in case.batch.inputs.items()}
    longer = Batch(inputs, F.pad(case.batch.targets, (0, 3), value=-100), case.batch.rows)
    engine = Engine(case.model, case.loss, EVERYTHING)
    short, long = engine(case.batch), engine(longer)
    for signal, value in short.items():
        torch.testing.assert_close(long[signal], value)


def test_hidden_states_with_a_head_instead_of_logits(kit) -> None:
    case = kit.make("gpt2 tied")

    def fused(model: nn.Module, batch: Batch) -> Outputs:
        hidden = model.transformer(**batch.inputs).last_hidden_state
        token = token_cross_entropy(model.lm_head(hidden), batch.targets)
        loss = token.sum(1) / (batch.targets != -100).sum(1)
        return Outputs(loss, batch.targets, hidden=hidden, head=model.lm_head)

    wanted = [s for s in EVERYTHING if s.kind != "el2n_seq"] + [Signal("grad_sq_norm", "head")]
    want = Engine(case.model, case.loss, wanted)(case.batch)
    got = Engine(case.model, fused, wanted)(case.batch)
    for signal in wanted:
        torch.testing.assert_close(got[signal], want[signal])


def test_input_gradients_and_embeddings(kit) -> None:
    case = kit.make("cnn")
    x = case.batch.inputs["x"].clone().requires_grad_()
    loss = kit.classify(case.model.eval(), Batch({"x": x}, case.batch.targets, 6)).loss
    (want,) = torch.autograd.grad(loss.sum(), x)
    got = signals(case.model, case.batch, case.loss, ["input_grad", "embedding", "loss"])
    torch.testing.assert_close(got["input_grad"], want)
    feature = case.model.body[:-1](case.batch.inputs["x"]).detach()
    torch.testing.assert_close(got["embedding"], feature)
    case = kit.make("gpt2 tied")
    word = case.model.transformer.wte(case.batch.inputs["input_ids"]).detach().requires_grad_()
    mask = case.batch.inputs["attention_mask"]
    logits = case.model.eval()(inputs_embeds=word, attention_mask=mask).logits
    token = token_cross_entropy(logits, case.batch.targets)
    loss = token.sum(1) / (case.batch.targets != -100).sum(1)
    (want,) = torch.autograd.grad(loss.sum(), word)
    got = signals(case.model, case.batch, case.loss, ["input_grad", "embedding"])
    torch.testing.assert_close(got["input_grad"], want)
    hidden = case.model.transformer(**case.batch.inputs).last_hidden_state.detach()
    real = (case.batch.targets != -100).double()
    want = torch.einsum("std,st->sd", hidden, real) / real.sum(1, keepdim=True)
    torch.testing.assert_close(got["embedding"], want)


def test_a_plain_loss_on_plain_tensors(kit) -> None:
    """Any batch structure: a tuple, a dict; regression too."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    got = signals(model, (x, y), lambda m, b: (m(b[0])[:, 0] - b[1]).square())
    named = signals(model, {"x": x, "y": y}, lambda m, b: (m(b["x"])[:, 0] - b["y"]).square())
    for i in range(5):
        loss = (model(x[i : i + 1])[:, 0] - y[i]).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(got["grad_norm"][i], norm)
    torch.testing.assert_close(named["grad_norm"], got["grad_norm"])


def test_sketches_are_deterministic_and_depend_on_the_seed(kit) -> None:
    case = kit.make("mlp")
    runs = [signals(case.model, case.batch, case.loss, ["sketch"], seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0]["sketch"], runs[1]["sketch"])
    assert not torch.equal(runs[0]["sketch"], runs[2]["sketch"])
    assert runs[0]["sketch"].shape == (6, 7 * 32 * 32)


def test_weights_may_be_swapped_between_batches(kit) -> None:
    case, other = kit.make("mlp"), kit.make("mlp").model
    for p in other.parameters():
        p.data.mul_(1.5)
    engine = Engine(case.model, kit.classify, EVERYTHING)
    engine(case.batch)
    case.model.load_state_dict(other.state_dict())
    fresh = Engine(other, kit.classify, EVERYTHING)(case.batch)
    for signal, value in engine(case.batch).items():
        assert torch.equal(value, fresh[signal])


def test_the_model_is_left_as_it_was_found(kit) -> None:
    case = kit.make("lora")
    case.model.train()
    case.model.base_model.model.transformer.h[0].eval()
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in case.model.modules()]
    Engine(case.model, case.loss, EVERYTHING)(case.batch)

    def failing(model: nn.Module, batch: Batch) -> Outputs:
        raise KeyError("no such column")

    with pytest.raises(KeyError):
        Engine(case.model, failing, [Signal("grad_sq_norm")])(case.batch)
    after = [(m.training, [p.requires_grad for p in m.parameters()]) for m in case.model.modules()]
    assert after == flags
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_only_trainable_parameters_count(kit) -> None:
    case = kit.make("mlp")
    whole = kit.brute_force(case.model, case.batch, case.loss)
    case.model.body[0].requires_grad_(False)
    got = signals(case.model, case.batch, case.loss, ["grad_sq_norm"])["grad_sq_norm"]
    rest = [g.flatten(1).square().sum(1) for n, g in whole.items() if not n.startswith("body.0")]
    torch.testing.assert_close(got, sum(rest))


def test_a_row_without_targets_has_no_means(kit) -> None:
    case = kit.make("gpt2 tied")
    case.batch.targets[2] = -100
    got = Engine(case.model, case.loss, [Signal("el2n"), Signal("tokens")])(case.batch)
    assert got[Signal("tokens")][2] == 0 and math.isnan(got[Signal("el2n")][2])
    assert got[Signal("el2n")][[0, 1, 3, 4, 5]].isfinite().all()


def test_a_row_of_nans_spoils_only_itself(kit) -> None:
    case = kit.make("cnn")
    clean = Engine(case.model, case.loss, EVERYTHING)
    want = clean(case.batch)
    case.batch.inputs["x"][1] = torch.nan
    for signal, value in clean(case.batch).items():
        keep = [0, 2, 3, 4, 5]
        torch.testing.assert_close(value[keep], want[signal][keep])


def test_a_batch_of_one_row(kit) -> None:
    for name in ("gpt2 tied", "encoder, tokens first", "routed experts"):
        case = kit.make(name)
        one = case.batch.select_rows([3])
        engine = Engine(case.model, case.loss, [Signal("grad_sq_norm")])
        got = engine(one)[Signal("grad_sq_norm")]
        truth = kit.brute_force(case.model, one, case.loss)
        torch.testing.assert_close(got, sum(g.flatten(1).square().sum(1) for g in truth.values()))
        again = engine(case.batch)[Signal("grad_sq_norm")]
        torch.testing.assert_close(again[3:4], got)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(want=["gradnorm"]), "unknown signal 'gradnorm'; choose from"),
        (dict(params="layer9"), "'layer9' matches no trainable parameter"),
        (dict(params="(("), "is no regular expression"),
        (dict(want=["grad_dot"]), "needs directions="),
        (dict(want=["grad_dot"], directions=[{"nope": torch.ones(1)}]), "'nope', which is no par"),
        (dict(want=["sketch"], sketch_dim=(0,)), "sketch_dim must be"),
        (dict(want=["sketch"], sketch_dim=(2, 2, 2)), "sketch_dim must be"),
        (dict(want=["sketch"], sketch_dim=(6,), jl="sparse"), "power of two"),
        (dict(want=["sketch"], sketch_dim=(8,), jl="thin"), "jl must be"),
    ],
)
def test_wrong_arguments_are_one_sentence(kit, call, message) -> None:
    case = kit.make("mlp")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        signals(case.model, case.batch, case.loss, **{"want": ["grad_norm"], **call})


def test_what_a_plain_loss_cannot_give_is_said(kit) -> None:
    case = kit.make("mlp")

    def plain(model: nn.Module, batch: Batch) -> Tensor:
        return case.loss(model, batch).loss

    for want, message in [
        ("el2n", "need Outputs"),
        ("el2n_seq", "needs Outputs with the logits"),
        ("weight_alignment", "cannot tell which parameters are the head"),
        ("embedding", "cannot tell which parameters are the head"),
    ]:
        with pytest.raises(ValueError, match=message):
            signals(case.model, case.batch, plain, [want])
    with pytest.raises(ValueError, match="one number per row"):
        signals(case.model, case.batch, lambda m, b: plain(m, b).mean())
    with pytest.raises(ValueError, match="training records"):
        Engine(case.model, case.loss, [Signal("aum")])
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        Engine(case.model.requires_grad_(False), case.loss, [Signal("grad_sq_norm")])
