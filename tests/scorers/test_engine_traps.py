"""Models built to lead taps astray, each against autograd on one row at a time."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.scorers.engine import Engine, EngineError
from curate.scorers.protocol import Batch, Outputs, Signal

ALL = Signal("grad_sq_norm")


def _check(kit: SimpleNamespace, model: nn.Module, batch: Batch, loss=None, engine=None) -> Engine:
    """Compare the norm over all parameters with the brute force; return the engine."""
    loss = loss or kit.classify
    truth = kit.brute_force(model, batch, loss)
    squares = sum(g.reshape(len(g), -1).square().sum(1) for g in truth.values())
    engine = engine or Engine(model, loss, [ALL])
    torch.testing.assert_close(engine(batch)[ALL], squares, rtol=1e-9, atol=1e-15)
    return engine


class _Positions(nn.Module):
    """Look-ups of positions [1, T] or [T], which all rows share."""

    def __init__(self, leading: bool) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(23, 6), nn.Embedding(16, 6)
        self.head, self.leading = nn.Linear(6, 3), leading

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        return self.head(
            (self.word(x) + self.place(at[None] if self.leading else at)).relu().sum(1)
        )


@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])  # also as long as the batch and the probe are
def test_position_tables_shared_by_all_rows(kit, leading, length) -> None:
    engine = _check(kit, _Positions(leading).double(), kit.tokens(length=length))
    assert engine.paths["place.weight"] == "analytic: embedding"


def test_a_shared_table_that_is_not_simply_added_falls_back(kit) -> None:
    class Mixed(_Positions):
        def forward(self, x: Tensor) -> Tensor:
            table = self.place(torch.arange(x.shape[1]))
            return self.head(self.word(x).mean(1) + (table.T @ table).mean(0))

    engine = _check(kit, Mixed(False).double(), kit.tokens())
    assert not engine.paths["place.weight"].startswith("analytic")


class _Attention(nn.Module):
    def __init__(self, batch_first: bool, cross: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=cross)
        self.head, self.batch_first, self.cross = nn.Linear(8, 3), batch_first, cross

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) if self.batch_first else self.embed(x).transpose(0, 1)
        keys = h.tanh() if self.cross else h
        out = self.attention(h, keys, keys, need_weights=False)[0]
        return self.head(out.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_out_proj_of_multihead_attention(kit, batch_first) -> None:
    """Its hook would never be called, and tokens run before rows inside."""
    engine = _check(kit, _Attention(batch_first, cross=False).double(), kit.tokens())
    assert engine.paths["attention.out_proj.weight"] == "analytic: linear"
    assert engine.paths["attention.in_proj_weight"] == "analytic: linear"


@pytest.mark.parametrize("batch_first", [True, False])
def test_split_projection_of_cross_attention(kit, batch_first) -> None:
    engine = _check(kit, _Attention(batch_first, cross=True).double(), kit.tokens())
    assert "attention" in engine.paths["attention.in_proj_weight"]


def test_compiled_models_are_unwrapped(kit) -> None:
    """At the root, at a child and in place; nothing may be compiled by scoring."""
    model = kit.make("mlp").model

    def never(*_: object) -> None:
        raise AssertionError("compiled")

    model.body[0] = torch.compile(model.body[0], backend=never)
    model.body[4].compile(backend=never)
    batch = kit.vectors()
    engine = Engine(torch.compile(model, backend=never), kit.classify, [ALL])
    got = engine(batch)[ALL]
    assert set(engine.paths) == {n.replace("_orig_mod.", "") for n, _ in model.named_parameters()}
    plain = kit.make("mlp").model
    plain.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()})
    torch.testing.assert_close(got, Engine(plain, kit.classify, [ALL])(batch)[ALL])
    assert hasattr(model.body[0], "_orig_mod") and model.body[4]._compiled_call_impl is not None


def test_an_activation_in_place_right_after_the_first_layer(kit) -> None:
    for activation in (nn.ReLU(True), nn.LeakyReLU(inplace=True), nn.Hardswish(inplace=True)):
        _check(kit, kit.Named(nn.Linear(5, 4), activation, nn.Linear(4, 3)).double(), kit.vectors())


class _ChangedInPlace(nn.Module):
    """Biased layers over tokens, which torch multiplies flat and gives as views, then changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.relu, self.shift = nn.ReLU(inplace=True), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.first(x)))
        x = self.second(x)
        x[..., 2:] = 0.5
        x += self.shift
        logits = self.head(x)
        logits[:, 1:] /= 2
        return logits.mean(1)


@pytest.mark.parametrize("params", ["", "^shift$", "second"])
def test_views_changed_in_place_keep_their_taps(kit, params) -> None:
    """Hooking such a view would end the process in torch 2.13 (its history is made anew)."""
    x, targets = torch.randn(5, 4, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    batch, model = Batch({"x": x}, targets, 5), _ChangedInPlace().double()
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(params, name) is not None)
    engine = _check(kit, model, batch)
    assert all(path.startswith("analytic") for path in engine.paths.values())


def test_a_module_whose_output_is_changed_in_place_goes_through_torch_func(kit) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / 2, self.bias)

    model = kit.Named(nn.Linear(4, 6), Scaled(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    batch = Batch({"x": x}, torch.randint(0, 3, (5, 4)), 5)
    engine = _check(kit, model.double(), batch, kit.language)
    assert engine.paths["body.1.weight"] == "vmap: body.1"


def test_an_input_overwritten_before_the_backward_pass(kit) -> None:
    """Autograd itself would refuse to give this model's weight gradients, but for saved copies."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            out = self.b(h)
            h.mul_(0.5).add_(1.0)
            return self.c(out + h)

    model, batch = Overwrites().double(), kit.vectors()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        truth = kit.brute_force(model, batch, kit.classify)
    squares = sum(g.flatten(1).square().sum(1) for g in truth.values())
    for probe in (True, False):
        engine = Engine(model, kit.classify, [ALL], probe=probe)
        torch.testing.assert_close(engine(batch)[ALL], squares)
        assert engine.paths["b.weight"] == "analytic: linear"


def test_gradient_checkpointing_of_hugging_face_counts_nothing_twice(kit) -> None:
    case = kit.make("gpt2 tied")
    truth = _check(kit, case.model, case.batch, case.loss)(case.batch)[ALL]
    case.model.gradient_checkpointing_enable()
    case.model.train()
    torch.testing.assert_close(Engine(case.model, case.loss, [ALL])(case.batch)[ALL], truth)
    assert all(m.training for m in case.model.modules())


@pytest.mark.parametrize("first", [False, True])
def test_checkpointing_that_is_always_on(kit, first) -> None:
    """Also around the first layer, where nothing needs a gradient yet."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return self.b((self.a(x) if first else x).tanh()).tanh()

            return self.c(checkpoint(inner, x if first else self.a(x), use_reentrant=False))

    _check(kit, Checkpointed().double(), kit.vectors())


def test_flat_tokens_are_accepted_inside_a_module_that_shows_the_rows(kit) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, h: Tensor) -> Tensor:
            return self.inner(h.view(-1, h.shape[-1])).view_as(h)

    model = nn.Sequential(nn.Embedding(23, 6), Flat(), nn.Flatten(), nn.Linear(42, 3)).double()
    engine = _check(kit, model, kit.tokens(), _positional(kit))
    assert engine.paths["1.inner.weight"] == "analytic: linear"


def _positional(kit):
    def loss(model: nn.Module, batch: Batch) -> Outputs:
        return kit.classify(lambda x: model(x), batch)

    return loss


def test_routing_of_flat_tokens_is_not_mistaken_for_order(kit) -> None:
    """Each expert gets all tokens in the probe (one row's worth each), but not in other batches."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 6)
            self.low, self.high, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            ids, flat = x.flatten(), self.embed(x).flatten(0, 1)
            low = (ids < 12).nonzero().flatten()
            high = (ids >= 12).nonzero().flatten()
            out = torch.zeros_like(flat)
            out[low], out[high] = self.low(flat[low]), self.high(flat[high])
            return self.head(out.view(*x.shape, -1).tanh().mean(1))

    model = Routed().double()
    first = kit.tokens()
    first.inputs["x"].remainder_(11)  # all low: `high` is not met before the second batch
    engine = _check(kit, model, first)
    _check(kit, model, kit.tokens(), engine=engine)
    mixed = kit.tokens(rows=4)
    mixed.inputs["x"][:, :3] %= 11  # half of every row: sizes divisible by the rows
    mixed.inputs["x"][:, 3:] = mixed.inputs["x"][:, 3:] % 11 + 12
    _check(kit, model, mixed, engine=engine)
    assert engine.paths["low.weight"].startswith("row by row")


def test_rows_sorted_inside_the_model(kit) -> None:
    """The probe's rows may happen to be in order, or equal; later ones are not."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort(stable=True)
            return self.b(self.a(x[order]).tanh()[order.argsort()])

    model, batch = Sorted().double(), kit.vectors()
    same = kit.vectors()
    same.inputs["x"][:, 0] = 1.0
    engine = _check(kit, model, same)
    _check(kit, model, batch, engine=engine)


def test_one_weight_used_in_several_ways(kit) -> None:
    """As a layer twice, transposed, cast, as a table, and for a penalty: one gradient."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight
            h = F.embedding(x % 6, w).mean(1)
            h = self.layer(self.layer(h).tanh()) + h @ w + F.linear(h, w.t())
            return self.head(h @ w.transpose(0, 1).to(torch.float64) * w[0])

    class Plain(Reused):
        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight
            h = F.embedding(x % 6, w).mean(1)
            h = self.layer(self.layer(h).tanh()) + h @ w + F.linear(h, w.t())
            return self.head(h @ w.transpose(0, 1).to(torch.float64))

    assert not _check(kit, Reused().double(), kit.tokens()).paths["layer.weight"].startswith("ana")
    engine = _check(kit, Plain().double(), kit.tokens())
    assert engine.paths["layer.weight"] == "analytic: embedding + linear"


class _ScaledByOnePlus(nn.Module):
    """A norm as Gemma has it: its scale is 1 + weight, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.scale = nn.Embedding(23, 6), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.word(x)
        h = F.rms_norm(h, (6,)) * (1.0 + self.scale.to(h.dtype))
        return self.head(h.sum(1))


def test_a_norm_that_scales_by_one_plus_its_weight_is_analytic(kit) -> None:
    engine = _check(kit, _ScaledByOnePlus().double(), kit.tokens())
    assert engine.paths["scale"] == "analytic: scale"


def test_a_matrix_that_is_also_added_as_it_is(kit) -> None:
    """Factors and a plain gradient of one parameter meet: the norm is taken of their sum."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(7, 7)), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            one_hot = F.one_hot(x % 7, 7).double()
            return self.head((one_hot @ self.w + self.w).tanh().sum(1))

    engine = _check(kit, Both().double(), kit.tokens(length=7))
    assert engine.paths["w"] == "analytic: linear + shift"


class _Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() @ w.detach().numpy())

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class _Custom(nn.Module):
    def __init__(self, also_seen: bool) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)
        self.also_seen = also_seen

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.w if self.also_seen else x
        return self.head(_Hidden.apply(h.tanh(), self.w))


@pytest.mark.parametrize("also_seen", [True, False])
def test_custom_autograd_functions_hide_a_use(kit, also_seen) -> None:
    engine = _check(kit, _Custom(also_seen).double(), kit.vectors())
    assert engine.paths["w"].startswith("row by row")


def test_a_hidden_use_that_the_probe_did_not_meet_is_noticed(kit) -> None:
    class Late(_Custom):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(_Hidden.apply(x, self.w) if bool((x[:, 0] > 5).any()) else x)

    model, batch = Late(False).double(), kit.vectors(rows=6)
    engine = _check(kit, model, batch)
    assert engine.paths["w"] == "unused"
    batch.inputs["x"][:, 0] = 6
    _check(kit, model, batch, engine=engine)
    assert engine.paths["w"].startswith("row by row")


def test_a_branch_first_taken_after_the_probe(kit) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.head(self.b(h) if bool((x[:, 0] > 5).all()) else h)

    model, batch = Branch().double(), kit.vectors()
    engine = _check(kit, model, batch)
    batch.inputs["x"][:, 0] = 6
    _check(kit, model, batch, engine=engine)


def test_a_module_that_splits_an_image_into_patches(kit) -> None:
    """Several small images a row: the layout is S * f along the first axis."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = len(x)
            x = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 2, 3, 3)
            return self.norm(self.conv(x)).relu().view(rows, -1)

    model = kit.Named(Patches(), nn.Linear(9 * 16, 3)).double()
    engine = _check(kit, model, kit.images())
    assert engine.paths["body.0.conv.weight"] == "analytic: conv2d"


def test_batch_norm_left_in_training_mode_is_scored_in_evaluation_mode(kit) -> None:
    case = kit.make("cnn")
    case.model.train()
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    _check(kit, case.model, case.batch)
    assert case.model.training
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_rows_that_depend_on_one_another_are_refused_by_name(kit) -> None:
    model = kit.Named(
        nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    )
    with pytest.raises(EngineError, match=r"body\.1 takes its statistics from the batch"):
        Engine(model.double(), kit.classify, [ALL])(kit.vectors())


@pytest.mark.parametrize("want", [ALL, Signal("weight_alignment")])
@pytest.mark.parametrize("rows", [1, 2])
def test_randomness_in_evaluation_mode_is_refused(kit, want: Signal, rows: int) -> None:
    """Also where a row alone escapes it, and where the head is looked for."""

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(F.dropout(h) if len(x) >= rows else h)

    with pytest.raises(EngineError, match="another loss each time"):
        Engine(Random().double(), kit.classify, [want])(kit.vectors())


def test_the_path_of_each_parameter_is_logged(kit, caplog) -> None:
    case = kit.make("lstm")
    with caplog.at_level(logging.DEBUG, "curate.engine"):
        engine = _check(kit, case.model, case.batch)
    assert engine.paths["embed.weight"] == "analytic: embedding"
    assert engine.paths["lstm.weight_hh_l0"] == "row by row: lstm"
    assert any("lstm.weight_hh_l0: row by row: lstm" in r.getMessage() for r in caplog.records)


def test_torch_func_serves_what_it_can(kit) -> None:
    engine = _check(
        kit, kit.Named(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)).double(), kit.vectors()
    )
    assert engine.paths["body.1.weight"] == "vmap: body.1"


def test_half_precision_models_are_scored_in_half_with_float32_sums(kit) -> None:
    case = kit.make("gpt2 tied")
    truth = _check(kit, case.model, case.batch, case.loss)(case.batch)[ALL].sqrt()
    got = Engine(case.model.bfloat16(), case.loss, [ALL])(case.batch)[ALL].sqrt()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=5e-2, atol=0)
