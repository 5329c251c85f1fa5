"""Curvatures against per-row autograd in float64, dense matrices and retraining.

The brute force takes each layer's inputs and output gradients by module hooks and its gradient by
autograd, on one row at a time; it shares no code with the engine.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.scorers.curvature import Curvature, CurvatureRefused, CurvatureSettings
from curate.scorers.curvature_estimate import CurvatureEstimate, made_curvature
from curate.scorers.engine import Engine
from curate.scorers.parts import Gradient
from curate.scorers.protocol import IGNORE, Batch, Outputs, Signal
from curate.scorers.registry import make_scorers

Loss = Callable[[nn.Module, Batch], Outputs]
# float64 on both sides; what is left is the order of sums, and eigenvectors of near-equal values.
EXACT = {"rtol": 1e-7, "atol": 0.0}


def settings(kind: str, damping: float | None = None, labels: str = "data") -> CurvatureSettings:
    return CurvatureSettings(kind, damping, labels=labels)


def estimated(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], asked: CurvatureSettings,
    params: str = "",
) -> SimpleNamespace:  # fmt: skip
    """Return an engine with a curvature made of these batches, and what was made."""
    signals = {
        kind: Signal(kind, params, curvature=asked.text) for kind in ("grad_sq_norm", "target_dot")
    }
    engine = Engine(model, loss, signals.values())
    engine.verify(batches[0])
    estimate = CurvatureEstimate(engine, asked, params)
    for _ in range(estimate.stages):
        start = 0
        for batch in batches:
            assert estimate.add(batch, range(start, start + batch.rows))
            start += batch.rows
        estimate.end_stage()
    tensors, said = estimate.found()
    curvature = made_curvature(asked, tensors, said)
    engine.curved.curvatures = {(params, asked.text): curvature}
    return SimpleNamespace(
        engine=engine, curvature=curvature, said=said, tensors=tensors, signals=signals
    )


def values(made: SimpleNamespace, batch: Batch, target: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's self-influence, and its influence on the target's mean loss."""
    _, summed = made.engine.summed_gradient(target)
    own = made.engine.target_params(target)
    made.engine.directions = {
        n: (summed[n] if n in summed else torch.zeros_like(p))[None] / target.rows
        for n, p in own.items()
    }
    found = made.engine(batch)
    return found[made.signals["grad_sq_norm"]], found[made.signals["target_dot"]][:, 0]


# -- the brute force


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that are a matrix with a bias, but for a head that is a table as well."""
    uses: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    kinds = ("Linear", "Conv1D", "Conv1d", "Conv2d")
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds
        and uses[id(module.weight)] == 1
        and module.weight.requires_grad
    }


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return what each output position multiplies by the weights, [groups, tokens, inputs]."""
    if isinstance(module, nn.Conv1d):
        x, kernel = x[:, :, None], (1, *module.kernel_size)
        stride, pad, dilation = ((1, *module.stride), (0, *module.padding), (1, *module.dilation))
    elif isinstance(module, nn.Conv2d):
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        pad = module.padding
    else:
        return x.reshape(1, -1, x.shape[-1])
    if module.padding_mode != "zeros":
        x, pad = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), (0, 0)
    if pad == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [p for s in reversed(spans) for p in (s // 2, s - s // 2)]
        x, pad = F.pad(x, sides), (0, 0)
    found = F.unfold(x, kernel, dilation, pad, stride)[0]
    return found.view(module.groups, -1, found.shape[-1]).mT


def facts(model: nn.Module, batch: Batch, loss: Loss) -> dict[str, SimpleNamespace]:
    """Return of each layer G [N, g, o, i] of the rows, and inputs and deltas of all tokens."""
    model.eval()
    layers = matrices(model)
    found = {n: SimpleNamespace(G=[], a=[], d=[]) for n in layers}
    for i in range(batch.rows):
        row = batch.select_rows([i])
        seen: dict[str, list[Any]] = {n: [] for n in layers}
        hooks = [m.register_forward_hook(partial(_see, seen[n])) for n, m in layers.items()]
        params = [p for m in layers.values() for p in (m.weight, m.bias) if p is not None]
        grads = torch.autograd.grad(loss(model, row).loss.sum(), params, allow_unused=True)
        of = {
            id(p): torch.zeros_like(p) if g is None else g
            for p, g in zip(params, grads, strict=True)
        }
        for hook in hooks:
            hook.remove()
        mask = row.inputs.get("attention_mask")
        for n, m in layers.items():
            x, g = seen[n]
            is_conv = isinstance(m, (nn.Conv1d, nn.Conv2d))
            groups = getattr(m, "groups", 1)
            a = patches(m, x)
            d = g.flatten(2)[0].reshape(groups, -1, a.shape[1]).mT if is_conv else None
            d = g.reshape(1, -1, g.shape[-1]) if d is None else d
            weight = of[id(m.weight)]
            weight = weight.T if type(m).__name__ == "Conv1D" else weight.flatten(1)
            G = weight.reshape(groups, -1, a.shape[2])
            if m.bias is not None:
                a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
                G = torch.cat([G, of[id(m.bias)].reshape(groups, -1, 1)], 2)
            if mask is not None and a.shape[1] == mask.numel():
                a = a[:, mask.flatten().bool()]
            found[n].G.append(G)
            found[n].a.append(a)
            found[n].d.append(d)
    for f in found.values():
        f.G = torch.stack(f.G)
        f.a, f.d = (torch.cat(x, 1) for x in (f.a, f.d))
    return found


def _see(into: list[Any], _: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
    into.append(x[0].detach().clone())
    y.register_hook(into.append)


def truth(
    kind: str, damping: float | None, on: dict[str, SimpleNamespace],
    rows: dict[str, SimpleNamespace], target: dict[str, SimpleNamespace],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return self-influences and influences, the curvature estimated from the rows of `on`."""
    total: list[Tensor] = []
    both: list[Tensor] = []
    for name, f in on.items():
        A = f.a.mT @ f.a / f.a.shape[1]
        S = f.d.mT @ f.d / len(f.G)
        (on_s, left), (on_a, right) = torch.linalg.eigh(S), torch.linalg.eigh(A)
        if kind == "diagonal":
            left, right = (torch.eye(m.shape[-1], dtype=m.dtype) for m in (S, A))
        turned = [left.mT @ x[name].G @ right for x in (on, rows, target)]
        eigenvalues = on_s[:, :, None] * on_a[:, None] if kind == "kfac" else None
        eigenvalues = turned[0].square().mean(0) if eigenvalues is None else eigenvalues
        scale = eigenvalues + (0.1 * eigenvalues.mean() if damping is None else damping)
        total.append((turned[1] ** 2 / scale).flatten(1).sum(1))
        both.append((turned[1] * turned[2].mean(0) / scale).flatten(1).sum(1))
    return torch.stack(total).sum(0), torch.stack(both).sum(0)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "lora")]
MODELS = ["mlp", "cnn", "gpt2 tied", *SLOW]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "damping"),
    [("ekfac", None), ("kfac", 0.01), pytest.param("ekfac", 0.01, marks=pytest.mark.slow)],
)
def test_scores_equal_brute_force(kit: Any, name: str, kind: str, damping: float | None) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    case = kit.make(name)
    made = estimated(case.model, case.loss, [case.batch], settings(kind, damping))
    rows = facts(case.model, case.batch, case.loss)
    target = case.batch.select_rows([4, 1])
    own, influence = values(made, case.batch, target)
    true_own, true_influence = truth(
        kind, damping, rows, rows, {n: SimpleNamespace(G=f.G[[4, 1]]) for n, f in rows.items()}
    )
    torch.testing.assert_close(own, true_own, **EXACT)
    scale = true_influence.abs().max().item()
    torch.testing.assert_close(influence, true_influence, rtol=1e-7, atol=1e-9 * scale)
    layers = {weight for weight, _ in made.said["layers"]}
    assert layers == {f"{n}.weight" for n in matrices(case.model)}


@pytest.mark.parametrize("name", ["mlp", "gpt2 tied", "lstm", "bare parameters", "llama"])
def test_the_diagonal_of_every_parameter_equals_brute_force(kit: Any, name: str) -> None:
    case = kit.make(name)
    made = estimated(case.model, case.loss, [case.batch], settings("diagonal", 1e-3))
    own, influence = values(made, case.batch, case.batch)
    grads = kit.brute_force(case.model, case.batch, case.loss)
    scaled = {n: g / (g.square().mean(0) + 1e-3) for n, g in grads.items()}
    true_own = sum((g * scaled[n]).reshape(len(g), -1).sum(1) for n, g in grads.items())
    true = sum((g.mean(0) * scaled[n]).reshape(len(g), -1).sum(1) for n, g in grads.items())
    torch.testing.assert_close(own, true_own, **EXACT)
    torch.testing.assert_close(influence, true, rtol=1e-7, atol=1e-9 * true.abs().max().item())


def test_the_diagonal_is_damped_by_the_mean_over_weight_and_bias(kit: Any) -> None:
    case = kit.make("mlp")
    made = estimated(case.model, case.loss, [case.batch], settings("diagonal"), params="body.0")
    own, _ = values(made, case.batch, case.batch)
    rows = {"body.0": facts(case.model, case.batch, case.loss)["body.0"]}
    torch.testing.assert_close(own, truth("diagonal", None, rows, rows, rows)[0], **EXACT)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_windows_of_a_document_are_one_row_and_their_padding_counts_nowhere(
    kit: Any, kind: str
) -> None:
    """Two rows of two windows each, against the same with the padding cut off by hand."""
    case = kit.make("gpt2 tied")
    ids = torch.randint(1, 23, (3, 5))
    targets = torch.randint(1, 23, (3, 5))
    targets[1, 3:] = targets[2, 4:] = IGNORE
    batch = Batch({"input_ids": ids}, targets, 2, torch.tensor([0, 0, 1]))
    made = estimated(case.model, kit.language, [batch], settings(kind, 1e-4), params="mlp")
    own, _ = values(made, batch, batch)
    case.model.eval()

    def row(i: int) -> Tensor:
        return kit.language(case.model, batch.select_rows([i])).loss.sum()

    layers = {n: m for n, m in matrices(case.model).items() if ".mlp." in n}
    total = torch.zeros(2, dtype=torch.float64)
    for module in layers.values():
        tokens, deltas, G = [], [], []
        for i in range(2):
            seen: list[Any] = []
            hook = module.register_forward_hook(
                lambda m, x, y, seen=seen: seen.extend([x[0].detach(), y])
            )
            loss = row(i)
            hook.remove()
            weight, bias, delta = torch.autograd.grad(loss, [module.weight, module.bias, seen[1]])
            real = (batch.select_rows([i]).targets != IGNORE).flatten()
            tokens.append(seen[0].flatten(0, 1)[real])
            deltas.append(delta.flatten(0, 1))
            G.append(torch.cat([weight.T, bias[:, None]], 1))
        a = F.pad(torch.cat(tokens), (0, 1), value=1.0)
        d = torch.cat(deltas)
        on_a, right = torch.linalg.eigh(a.T @ a / len(a))
        on_s, left = torch.linalg.eigh(d.T @ d / 2)
        turned = left.T @ torch.stack(G) @ right
        eigenvalues = on_s[:, None] * on_a if kind == "kfac" else turned.square().mean(0)
        total += (turned**2 / (eigenvalues + 1e-4)).sum((1, 2))
    torch.testing.assert_close(own, total, **EXACT)


# -- closed forms


def product_rows() -> tuple[nn.Module, Batch, Loss]:
    """A layer of zeros on every pair of an input and a label: delta says nothing of the input."""
    layer = nn.Linear(3, 4).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(5, 3, dtype=torch.float64).repeat_interleave(4, 0)
    y = torch.arange(4).repeat(5)

    def loss(model: nn.Module, batch: Batch) -> Outputs:
        logits = model(batch.inputs["x"])
        return Outputs(token_cross_entropy(logits, batch.targets), batch.targets, logits)

    return layer, Batch({"x": x}, y, 20), loss


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_where_inputs_and_deltas_are_independent_it_is_the_dense_fisher(kind: str) -> None:
    layer, batch, loss = product_rows()
    made = estimated(layer, loss, [batch], settings(kind, 0.05))
    own, influence = values(made, batch, batch.select_rows([3, 7]))
    p = torch.full((20, 4), 0.25, dtype=torch.float64) - F.one_hot(batch.targets, 4)
    g = (p[:, :, None] * F.pad(batch.inputs["x"], (0, 1), value=1.0)[:, None]).flatten(1)
    fisher = g.T @ g / 20 + 0.05 * torch.eye(16, dtype=torch.float64)
    solved = torch.linalg.solve(fisher, g.T).T
    torch.testing.assert_close(own, (g * solved).sum(1), **EXACT)
    torch.testing.assert_close(influence, solved @ g[[3, 7]].mean(0), rtol=1e-7, atol=1e-12)


def test_the_labels_of_the_model_estimate_the_gauss_newton_matrix() -> None:
    """Of 20 000 rows: entries of order 0.1, each a mean of 20 000 terms of order 0.3."""
    layer = nn.Linear(2, 3).double()
    x = torch.randn(20_000, 2, dtype=torch.float64)
    batch = Batch({"x": x}, torch.zeros(20_000, dtype=torch.long), 20_000)
    _, _, loss = product_rows()
    made = estimated(layer, loss, [batch], settings("kfac", labels="model"))
    factors = made.curvature.factors["weight"]
    p = layer(x).softmax(1).detach()
    gauss_newton = torch.diag_embed(p).mean(0) - p.T @ p / len(p)
    a = F.pad(x, (0, 1), value=1.0)
    true = torch.kron(gauss_newton, a.T @ a / len(a))
    basis = torch.kron(factors.left[0], factors.right[0])
    found = basis @ torch.diag(factors.eigenvalues.flatten()) @ basis.T
    assert (found - true).abs().max() < 5 * 0.3 / math.sqrt(20_000)
    assert made.said["labels"] == "model"


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_bases_are_orthogonal_and_eigenvalues_not_negative(kit: Any, kind: str) -> None:
    case = kit.make("cnn")
    made = estimated(case.model, case.loss, [case.batch], settings(kind))
    for factors in made.curvature.factors.values():
        for basis in (factors.left, factors.right):
            eye = torch.eye(basis.shape[1], dtype=basis.dtype).expand_as(basis)
            torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
        assert (factors.eigenvalues >= 0).all()


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "ekfac"])
def test_under_heavy_damping_it_is_tracin(kit: Any, kind: str) -> None:
    """λ times the score, λ = 1e8: what is left of G is a share of 1e-8 of its largest entry."""
    case = kit.make("mlp")
    params = r"body\.(0|4)"
    made = estimated(case.model, case.loss, [case.batch], settings(kind, 1e8), params)
    own, influence = values(made, case.batch, case.batch)
    plain = Engine(
        case.model, case.loss, [Signal("grad_sq_norm", params), Signal("target_dot", params)]
    )
    plain.directions = made.engine.directions
    found = plain(case.batch)
    norm, dot = (found[Signal(k, params)] for k in ("grad_sq_norm", "target_dot"))
    torch.testing.assert_close(own * 1e8, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(influence * 1e8, dot[:, 0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("name", ["gpt2 tied", "mlp"])
def test_batches_and_their_order_change_nothing(kit: Any, name: str, labels: str) -> None:
    """Other batches are padded otherwise and summed in another order."""
    case = kit.make(name)
    batch = case.batch
    if name == "gpt2 tied":
        batch = kit.text(rows=6)
    params = "attn|mlp" if name == "gpt2 tied" else ""
    whole = estimated(case.model, case.loss, [batch], settings("ekfac", 1e-3, labels), params)
    pieces = [batch.select_rows([0, 1, 2, 3]), batch.select_rows([4]), batch.select_rows([5])]
    split = estimated(case.model, case.loss, pieces, settings("ekfac", 1e-3, labels), params)
    torch.testing.assert_close(values(split, batch, batch), values(whole, batch, batch), **EXACT)


def test_rows_that_are_alike_score_alike(kit: Any) -> None:
    case = kit.make("mlp")
    batch = case.batch.select_rows([0, 1, 2, 0, 3, 0])
    made = estimated(case.model, case.loss, [batch], settings("ekfac"))
    for found in values(made, batch, batch):
        torch.testing.assert_close(found[[3, 5]], found[[0, 0]], **EXACT)


class Dense:
    """(H + λI)^-1 of one linear layer, whole."""

    def __init__(self, matrix: Tensor) -> None:
        self.inverse, self.names = torch.linalg.inv(matrix), frozenset({"weight"})

    def __call__(self, gradient: Gradient) -> Tensor:
        raise NotImplementedError("only influences are asked of it")

    def solve(self, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        joined = torch.cat([directions["weight"], directions["bias"][:, :, None]], 2)
        solved = (joined.flatten(1) @ self.inverse).view(joined.shape)
        return {"weight": solved[:, :, :-1], "bias": solved[:, :, -1]}


class TestLeavingARowOut:
    """Logistic regression, whose Gauss-Newton matrix is its Hessian, retrained to the optimum."""

    OUT, RIDGE = 40, 0.02

    def fitted(self, x: Tensor, y: Tensor, weights: Tensor, start: Tensor) -> Tensor:
        """Return [W b] that minimises sum_i w_i loss_i + ridge/2 |W b|^2, by Newton's method."""
        a, theta, eye = F.pad(x, (0, 1), value=1.0), start.flatten(), torch.eye(12).double()
        for _ in range(12):
            p = (a @ theta.view(3, 4).T).softmax(1)
            gradient = ((p - F.one_hot(y, 3)) * weights[:, None]).T @ a
            gradient = gradient.flatten() + self.RIDGE * theta
            if gradient.abs().max() < 1e-13:
                break
            S = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * weights[:, None, None]
            hessian = torch.einsum("nab,ni,nj->aibj", S, a, a).reshape(12, 12)
            theta = theta - torch.linalg.solve(hessian + self.RIDGE * eye, gradient)
        assert gradient.abs().max() < 1e-12
        return theta.view(3, 4)

    def data(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centres = torch.randn(3, 3, dtype=torch.float64)
        y, target_y = torch.randint(0, 3, (n,)), torch.randint(0, 3, (20,))
        noise = torch.randn(n + 20, 3, dtype=torch.float64)
        x, target_x = centres[y] + noise[:n], centres[target_y] + noise[n:]
        return x, y, target_x, target_y

    def changes(self, n: int, x: Tensor, y: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return n times the rise of the target's loss when a row's weight 1/n is taken away."""

        def loss(theta: Tensor) -> Tensor:
            return F.cross_entropy(F.pad(target[0], (0, 1), value=1.0) @ theta.T, target[1])

        equal = torch.full((n,), 1 / n, dtype=torch.float64)
        fitted = self.fitted(x, y, equal, torch.zeros(3, 4, dtype=torch.float64))
        after = []
        for i in range(self.OUT):
            weights = equal.clone()
            weights[i] = 0
            after.append(loss(self.fitted(x, y, weights, fitted)))
        return n * (torch.stack(after) - loss(fitted))

    def scored(self, kind: str, n: int) -> tuple[Tensor, Tensor]:
        x, y, target_x, target_y = self.data(n)
        start, equal = torch.zeros(3, 4).double(), torch.full((n,), 1 / n).double()
        theta = self.fitted(x, y, equal, start)
        layer = nn.Linear(3, 3).double()
        layer.weight.data, layer.bias.data = theta[:, :3].clone(), theta[:, 3].clone()
        _, _, loss = product_rows()
        batch, target = Batch({"x": x}, y, n), Batch({"x": target_x}, target_y, 20)
        asked = settings("ekfac", self.RIDGE, "model")
        made = estimated(layer, loss, [batch], asked)
        if kind == "exact":
            p, a = layer(x).softmax(1).detach(), F.pad(x, (0, 1), value=1.0)
            S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            H = torch.einsum("nab,ni,nj->aibj", S, a, a).reshape(12, 12) / n
            dense = Dense(H + self.RIDGE * torch.eye(12, dtype=torch.float64))
            made.engine = Engine(layer, loss, [made.signals["target_dot"]])
            made.engine.curved.curvatures = {("", asked.text): dense}
            _, summed = made.engine.summed_gradient(target)
            made.engine.directions = {n: v[None] / 20 for n, v in summed.items()}
            scores = made.engine(batch)[made.signals["target_dot"]][:, 0]
        else:
            _, scores = values(made, batch, target)
        return scores[: self.OUT], self.changes(n, x, y, (target_x, target_y))

    def test_the_exact_hessian_predicts_the_change_to_first_order(self) -> None:
        """What is left is of the order of 1/n: with four times the rows, a quarter."""
        off = []
        for n in (300, 1200):
            torch.manual_seed(1)
            scores, changes = self.scored("exact", n)
            off.append(float((scores - changes).norm() / changes.norm()))
        assert off[0] < 0.1
        assert off[1] < off[0] / 3

    def test_ekfac_ranks_rows_as_leaving_them_out_does(self) -> None:
        scores, changes = self.scored("ekfac", 400)
        ranks = [x.argsort().argsort().double() for x in (scores, changes)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


# -- labels


@pytest.mark.parametrize("way", ["no logits", "loss elsewhere"])
def test_without_a_prediction_the_labels_of_the_data_are_taken_and_said(
    kit: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = kit.make("mlp")
    own = case.batch.targets

    def loss(model: nn.Module, batch: Batch) -> Outputs:
        found = kit.classify(model, batch)
        if way == "no logits":
            return Outputs(found.loss)
        index = batch.inputs["label"]
        return Outputs(token_cross_entropy(found.logits, index), batch.targets, found.logits)

    batch = case.batch
    if way == "loss elsewhere":
        batch = Batch({**batch.inputs, "label": own}, own, batch.rows)
        inner = kit.classify
        kit.classify = lambda m, b: inner(m, Batch({"x": b.inputs["x"]}, b.targets, b.rows))
    made = estimated(case.model, loss, [batch], settings("ekfac", 1e-3, "model"))
    assert made.said["labels"] == "data"
    assert "takes the labels of the data" in caplog.text
    true = estimated(case.model, case.loss, [case.batch], settings("ekfac", 1e-3, "data"))
    own_values, _ = values(true, case.batch, case.batch)
    found, _ = values(made, batch, batch)
    torch.testing.assert_close(found, own_values, **EXACT)


# -- what is covered, and what is refused


def test_what_has_no_factors_is_left_out_by_name(kit: Any) -> None:
    case = kit.make("gpt2 tied")
    made = estimated(case.model, case.loss, [case.batch], settings("ekfac"))
    text = made.said["left_out"]
    assert "transformer.wte.weight" in text
    assert "used as embedding" in text
    assert "transformer.h.0.ln_1.weight" in text


def test_a_model_without_matrices_refuses_kronecker_factors(kit: Any) -> None:
    case = kit.make("lstm")
    with pytest.raises(CurvatureRefused, match="choose curvature=diagonal"):
        estimated(case.model, case.loss, [case.batch], settings("kfac"), "embed|lstm")


def test_an_untied_head_taken_with_its_loss_is_a_layer(kit: Any) -> None:
    from curate.kernels.linear_head import linear_cross_entropy

    torch.manual_seed(0)
    body, head = nn.Linear(5, 6), nn.Linear(6, 11)
    model = nn.ModuleDict({"body": body, "head": head}).double()

    def fused(model: nn.Module, batch: Batch) -> Outputs:
        hidden = model["body"](batch.inputs["x"]).tanh()
        loss = linear_cross_entropy(hidden, model["head"].weight, batch.targets, model["head"].bias)
        return Outputs(loss.sum(1), batch.targets, hidden=hidden, head=model["head"])

    def plain(model: nn.Module, batch: Batch) -> Outputs:
        logits = model["head"](model["body"](batch.inputs["x"]).tanh())
        return Outputs(token_cross_entropy(logits, batch.targets).sum(1), batch.targets, logits)

    targets = torch.randint(0, 11, (6, 4))
    targets[2, 2:] = IGNORE
    batch = Batch({"x": torch.randn(6, 4, 5, dtype=torch.float64)}, targets, 6)
    for labels in ("data", "model"):
        found = [
            values(estimated(model, loss, [batch], settings("ekfac", 1e-3, labels)), batch, batch)
            for loss in (fused, plain)
        ]
        torch.testing.assert_close(*found, **EXACT)


def test_rows_that_are_not_finite_are_refused_and_leave_no_trace(kit: Any) -> None:
    case = kit.make("mlp")
    engine = Engine(
        case.model, case.loss, [Signal("grad_sq_norm", curvature=settings("kfac").text)]
    )
    engine.verify(case.batch)
    bad = Batch(
        {"x": torch.full((2, 5), torch.nan, dtype=torch.float64)}, case.batch.targets[:2], 2
    )
    found = []
    for batches in ([case.batch], [bad, case.batch]):
        estimate = CurvatureEstimate(engine, settings("kfac"))
        assert [estimate.add(b, range(b.rows)) for b in batches] == [b is not bad for b in batches]
        estimate.end_stage()
        found.append(estimate.found()[0])
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (
            "self_influence(curvature=newton)",
            "curvature is one of none, diagonal, adam, adam_root, k",
        ),
        (
            "self_influence(curvature=adam,rows=9)",
            "rows and labels have no meaning for curvature=ad",
        ),
        ("influence(curvature=adam_root,labels=data)", "rows and labels have no meaning"),
        ("self_influence(damping=0.1)", "belong to a curvature"),
        ("self_influence(curvature=ekfac,damping=0)", "damping is a positive number"),
        ("self_influence(curvature=ekfac,damping=True)", "damping is a positive number"),
        ("influence(rows=0)", "rows is a whole number"),
        ("influence(labels=guess)", "labels is one of model, data"),
        ("influence(groups=median)", "groups is one of max, mean"),
        ("influence(curvature=none,damping=1)", "belong to a curvature"),
    ],
)
def test_a_wrong_setting_is_refused(request_: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_scorers(request_)


def test_the_first_repeated_block_has_a_name(kit: Any) -> None:
    case = kit.make("gpt2 tied")
    engine = Engine(case.model, case.loss, [Signal("grad_sq_norm", "first_encoder_layer")])
    found = engine(case.batch)[Signal("grad_sq_norm", "first_encoder_layer")]
    pattern = Signal("grad_sq_norm", r"^transformer\.h\.0\.")
    assert torch.equal(found, Engine(case.model, case.loss, [pattern])(case.batch)[pattern])
    with pytest.raises(ValueError, match="no repeated blocks"):
        plain = kit.make("mlp")
        Engine(plain.model, plain.loss, [Signal("grad_sq_norm", "first-encoder-layer")])


def test_scorers_reduce_over_checkpoints_and_groups() -> None:
    scorer = make_scorers("influence(damping=1,groups=max)")["influence"]
    (signal,) = scorer.needs
    dots = torch.tensor([[[1.0, 4.0]], [[3.0, -2.0]]], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert scorer.reduce({signal: dots}, weights).tolist() == [2.5]  # of 2.5 and -0.5
    mean = make_scorers("influence(damping=1)")["influence"]
    assert mean.reduce({signal: dots}, weights).tolist() == [1.0]
    own = make_scorers("self_influence(curvature=kfac)")["self_influence"]
    (signal,) = own.needs
    assert own.reduce({signal: dots[:, :, 0]}, weights).tolist() == [2.5]


def test_it_is_a_curvature() -> None:
    dense: Curvature = estimated(*_loss_first(product_rows()), settings("ekfac")).curvature
    assert dense.names == {"weight"}


def _loss_first(made: tuple[nn.Module, Batch, Loss]) -> tuple[nn.Module, Loss, list[Batch]]:
    model, batch, loss = made
    return model, loss, [batch]
