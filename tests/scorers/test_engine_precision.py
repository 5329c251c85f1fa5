"""Models in half precision, by weights or by automatic casting, against the same in float64.

Shapes: B rows.

The yardstick is autograd in the very same precision on each row alone: what it gets wrong is what
rounding costs, and the engine may be wrong by as much, and by the difference that the order of
sums makes (a few more roundings), but no more.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Outputs, Signal
from curate.scorers.signals import signals

ALL = Signal("grad_sq_norm")
HALVES = [torch.bfloat16, torch.float16]


def _norms(grads: dict[str, Tensor]) -> Tensor:
    """Return each row's norm over all parameters, summed in float64."""
    squares = [g.double().reshape(len(g), -1).square().sum(1) for g in grads.values()]
    return torch.stack(squares).sum(0).sqrt()


def _to(batch: Batch, dtype: torch.dtype) -> Batch:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    return Batch(inputs, batch.targets, batch.rows, batch.row_ids)


def _as_double(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are those of the coarse model, exactly."""
    return copy.deepcopy(model).double()


def _check(
    kit: SimpleNamespace,
    model: nn.Module,
    batch: Batch,
    loss: Callable[..., Any],
    dtype: torch.dtype,
    coarse: Batch | None = None,
) -> Engine:
    """Compare the errors of the engine and of autograd, both in this precision.

    The norm over all parameters sums many independent roundings, and so do both errors; a row whose
    error in autograd happens to be small is no yardstick. The largest over the rows is, and one
    rounding of the activations (eps) on top for the order of the sums.
    """
    coarse = coarse or _to(batch, dtype)
    truth = _norms(kit.brute_force(_as_double(model), _to(batch, torch.float64), loss))
    naive = _norms(kit.brute_force(model, coarse, loss))
    engine = Engine(model, loss, [ALL])
    got = engine(coarse)[ALL].sqrt()
    assert got.dtype == torch.float32
    allowed = (naive / truth - 1).abs().max() + 2 * torch.finfo(dtype).eps
    assert ((got.double() / truth - 1).abs() <= allowed).all()
    assert allowed < 0.1
    for recompute in (False, True):
        engine.recompute = recompute
        torch.testing.assert_close(engine(coarse)[ALL].sqrt(), got, rtol=0, atol=0)
    return engine


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "name",
    ["gpt2 tied", "mlp", "encoder"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "llama", "lora", "cnn")],
)
def test_half_precision_is_as_good_as_autograd_on_the_row_alone(kit, name, dtype) -> None:
    case = kit.make(name)
    model = case.model.to(dtype)
    engine = _check(kit, model, case.batch, case.loss, dtype)
    assert {p.split(":")[0] for p in engine.paths.values()} == {"analytic"} or name == "cnn"


def test_all_signals_of_a_half_precision_model_are_sums_in_float32(kit) -> None:
    """Every kind against float64 within what bfloat16 keeps of the activations."""
    case = kit.make("gpt2 tied")
    model = case.model.bfloat16()
    exact = _as_double(model)
    directions = [{n: torch.randn_like(p) for n, p in exact.named_parameters()}]
    wants = ["loss", "grad_norm", "el2n", "el2n_seq", "entropy", "weight_alignment", "embedding"]
    given = dict(directions=directions, sketch_dim=(4, 4))
    want = signals(exact, case.batch, case.loss, [*wants, "sketch", "grad_dot"], **given)
    got = signals(model, case.batch, case.loss, [*wants, "sketch", "grad_dot"], **given)
    eps = torch.finfo(torch.bfloat16).eps
    for kind in wants:
        assert got[kind].dtype == torch.float32
        torch.testing.assert_close(got[kind].double(), want[kind], rtol=8 * eps, atol=8 * eps)
    # Linear maps of the gradient err by its error, as a vector: relative to the gradient's norm
    # times the map's (a sketch keeps norms in expectation).
    scale = want["grad_norm"]
    error = torch.linalg.vector_norm(got["sketch"].double() - want["sketch"], dim=1)
    assert (error <= 8 * eps * scale).all()
    length = torch.cat([d.flatten() for d in directions[0].values()]).norm()
    assert (
        (got["grad_dot"].double() - want["grad_dot"])[:, 0].abs() <= 8 * eps * scale * length
    ).all()


def test_squares_beyond_the_range_of_float16(kit) -> None:
    """Activations of 2^10 square to 2^20: sums in float16 would be infinite, ours are float32's."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(x) * 1024) / 2048

    model, batch = Loud().half(), kit.vectors()
    largest = (model.up(_to(batch, torch.float16).inputs["x"]) * 1024).abs().max()
    assert largest.square().isinf() and largest.isfinite()
    _check(kit, model, batch, kit.classify, torch.float16)


def test_gradients_that_are_tiny_in_float16(kit) -> None:
    """Below 2^-14 float16 counts in steps of 2^-24: our sums of such products stay float32's."""
    layer = nn.Linear(5, 3).half()
    x = torch.randn(6, 5).half()

    def loss(model: nn.Module, batch: Batch) -> Outputs:
        out = kit.classify(lambda **inputs: model(inputs["x"]), batch)
        return Outputs(out.loss * 2.0**-12, out.targets, out.logits)

    batch = Batch({"x": x}, torch.randint(0, 3, (6,)), 6)
    got = Engine(layer, loss, [ALL])(batch)[ALL].sqrt().double()
    exact = _as_double(layer)
    truth = _norms(kit.brute_force(exact, _to(batch, torch.float64), loss))
    # dL/dlogits is rounded to a step of 2^-24 by the model itself; what follows is float32.
    step = 2.0**-25 * (x.double().square().sum(1) + 1).sqrt() * 3**0.5
    assert ((got - truth).abs() <= step + 1e-3 * truth).all()
    assert (got > 0).all()


class _Mixed(nn.Module):
    """Half-precision matrices around norms that stay in float32, as careful models have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(23, 8, dtype=dtype), nn.Linear(8, 16, dtype=dtype)
        self.norm, self.down = nn.LayerNorm(8), nn.Linear(16, 8, dtype=dtype)
        self.scale, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        wide = self.norm.weight.dtype
        h = h + self.down(F.gelu(self.up(self.norm(h.to(wide)).to(h.dtype))))
        return self.head((h.to(wide) * self.scale).mean(1))


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_models_of_several_precisions(kit, dtype) -> None:
    engine = _check(kit, _Mixed(dtype), kit.tokens(), kit.classify, dtype)
    assert {p.split(":")[0] for p in engine.paths.values()} == {"analytic"}


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["encoder", "gpt2 tied"])
def test_automatic_casting_inside_the_loss_function(kit, name, dtype) -> None:
    """The probe allows for the roundings that it sees; no parameter falls to a slower path."""
    case = kit.make(name)
    model = case.model.float()

    def cast(model: nn.Module, batch: Batch) -> Outputs:
        is_exact = next(model.parameters()).dtype == torch.float64
        with torch.autocast("cpu", dtype=dtype, enabled=not is_exact):
            return case.loss(model, batch)

    engine = _check(kit, model, case.batch, cast, dtype, _to(case.batch, torch.float32))
    assert {p.split(":")[0] for p in engine.paths.values()} == {"analytic"}


def test_slower_paths_run_under_the_same_casting(kit) -> None:
    """A module that is caught and run again alone is cast as it was in the pass."""
    model = kit.Named(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3))
    seen: set[torch.dtype] = set()
    model.body[1].register_forward_hook(lambda m, args, out: seen.add(args[0].dtype))
    lstm = kit.make("lstm").model.float()
    lstm.lstm.register_forward_hook(lambda m, args, out: seen.add(out[0].dtype))

    def cast(model: nn.Module, batch: Batch) -> Outputs:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kit.classify(model, batch)

    for each, batch, name in (
        (model, _to(kit.vectors(), torch.float32), "body.1.weight"),
        (lstm, kit.tokens(), "lstm.weight_ih_l0"),
    ):
        engine = Engine(each, cast, [ALL])
        got = engine(batch)[ALL].sqrt().double()
        assert engine.paths[name].startswith(("vmap", "row by row"))
        naive = _norms(kit.brute_force(each, batch, cast))
        torch.testing.assert_close(got, naive, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert seen == {torch.bfloat16}


class _Attention(nn.Module):
    """Scaled dot-product attention, causal, with a mask, or with grouped keys."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embed = how, nn.Embedding(23, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(h).chunk(3, -1))
        if self.how == "grouped":
            k, v = k[:, :1], v[:, :1]
        mask = None
        if self.how == "boolean":
            mask = (x != 3)[:, None, None] | torch.eye(x.shape[1], dtype=torch.bool)
        elif self.how == "added":
            mask = torch.zeros_like(x, dtype=h.dtype).masked_fill(x == 3, -1e4)[:, None, None]
        h = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.how == "causal", enable_gqa=self.how == "grouped"
        )
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("how", ["causal", "boolean", "added", "grouped"])
def test_scaled_dot_product_attention(kit, how) -> None:
    model = _Attention(how).double()
    truth = _norms(kit.brute_force(model, batch := kit.tokens(), kit.classify))
    engine = Engine(model, kit.classify, [ALL])
    torch.testing.assert_close(engine(batch)[ALL].sqrt(), truth, rtol=1e-9, atol=0)
    assert {p.split(":")[0] for p in engine.paths.values()} == {"analytic"}
    _check(kit, _Attention(how).bfloat16(), batch, kit.classify, torch.bfloat16)


def test_wrappers_of_data_parallel_training_are_taken_off(kit, tmp_path) -> None:
    """DDP would wait in the next training step for gradients that scoring never made."""
    from torch import distributed

    case = kit.make("mlp")
    want = Engine(case.model, case.loss, [ALL])(case.batch)[ALL]
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(case.model)
        never = torch.compile(parallel, backend=lambda *_: pytest.fail("compiled"))
        for wrapped in (parallel, nn.DataParallel(case.model), never):
            engine = Engine(wrapped, case.loss, [ALL])
            assert torch.equal(engine(case.batch)[ALL], want)
            assert set(engine.paths) == {n for n, _ in case.model.named_parameters()}
        for _ in range(2):  # training goes on
            token_cross_entropy(parallel(**case.batch.inputs), case.batch.targets).sum().backward()
    finally:
        distributed.destroy_process_group()
    assert all(p.grad is not None for p in case.model.parameters())
