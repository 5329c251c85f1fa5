"""The linear head from hidden states against float64 autograd on logits that are stored."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curate.kernels import linear_head
from curate.kernels.cross_entropy import gathering, token_statistics
from curate.kernels.head_forward import head_partial_sums, head_partial_sums_reference
from curate.kernels.linear_head import (
    HeadSums,
    HeadWants,
    head_error,
    head_gram_sq_norm,
    head_pass,
    head_sq_norm,
    head_sums,
    linear_cross_entropy,
)
from curate.kernels.rademacher import signs, stream_key
from curate.kernels.softmax_tiles import totals

KEY = stream_key(3, "head.weight", "rows")


def _case(b: int, t: int, v: int, d: int, seed: int, *, has_bias: bool, dtype: Any) -> Any:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, t, d, generator=gen).to(dtype)
    weight = (torch.randn(v, d, generator=gen) * 2 / d**0.5).to(dtype)
    bias = torch.randn(v, generator=gen).to(dtype) if has_bias else None
    targets = torch.randint(0, v, (b, t), generator=gen)
    # Rows with different numbers of targets, some with none.
    keep = torch.rand(b, t, generator=gen) < torch.rand(b, 1, generator=gen) * 1.5
    targets = targets.masked_fill(~keep, -100)
    hidden[targets == -100] = torch.nan
    return hidden, weight, bias, targets


def _truth(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wants: HeadWants
) -> dict[str, Tensor]:
    """Everything from the stored logits and the stored error, in float64."""
    ignored = targets == -100
    h = hidden.double().masked_fill(ignored[..., None], 0.0)
    w, y = weight.double(), targets.clamp(min=0)
    z = h @ w.T + (0 if bias is None else bias.double())
    p = z.softmax(-1)
    e = (p - F.one_hot(y, len(w))).masked_fill(ignored[..., None], 0.0)
    rest = z.scatter(-1, y[..., None], -torch.inf)
    z_y = z.gather(-1, y[..., None])[..., 0]
    out = {
        "loss": z.logsumexp(-1) - z_y,
        "error_target": p.gather(-1, y[..., None])[..., 0] - 1,
        "lse": z.logsumexp(-1),
        "error_sq": e.square().sum(-1),
        "el2n": e.norm(dim=-1),
        "entropy": torch.special.entr(p).sum(-1),
        "margin": z_y - rest.amax(-1),
        "correct": (z.argmax(-1) == y).double(),
        "hidden_grad": e @ w,
        "gram": e @ e.mT,
        "aligned": (e * (h @ w.T)).sum(-1),
    }
    if wants.columns is not None:
        out["columns"] = e.gather(2, wants.columns[:, None].expand(-1, e.shape[1], -1))
    if wants.sketch is not None:
        out["sketch"] = e @ signs(KEY, torch.arange(len(w)), wants.sketch[1], dtype=w.dtype)
    if wants.directions is not None:
        products = torch.einsum("mvd,btd->btmv", wants.directions.double(), h)
        out["dots"] = torch.einsum("btv,btmv->btm", e, products)
    return {
        k: x.masked_fill(ignored.view(*ignored.shape, *(1,) * (x.dim() - 2)), 0.0)
        for k, x in out.items()
    }


def _named(sums: HeadSums) -> dict[str, Tensor]:
    flat = sums._asdict()
    statistics = flat.pop("statistics")
    if statistics is not None:
        flat |= statistics._asdict()
    return {name: x for name, x in flat.items() if x is not None}


def _all_wants(b: int, t: int, v: int, d: int, seed: int) -> HeadWants:
    gen = torch.Generator().manual_seed(seed + 1)
    return HeadWants(
        statistics=True,
        gram=True,
        columns=torch.randint(0, v, (b, t + 2), generator=gen),
        sketch=(KEY, 5),
        directions=torch.randn(2, v, d, generator=gen),
        aligned=True,
        hidden_grad=True,
    )


def _check(case: Any, wants: HeadWants) -> HeadSums:
    """What is wanted is there, nothing else, and within rounding of the truth."""
    hidden, weight, bias, targets = case
    sums = head_sums(hidden, weight, bias, targets, wants)
    truth, got = _truth(hidden, weight, bias, targets, wants), _named(sums)
    flags = {"hidden_grad": wants.hidden_grad, "gram": wants.gram, "aligned": wants.aligned}
    names = {n for n in truth if flags.get(n, True)}
    if not wants.statistics:
        names -= {"el2n", "entropy", "margin", "correct"}
    assert set(got) == names
    for name, value in got.items():
        is_rounded = name == "hidden_grad"  # to the model's dtype, as autograd's is
        assert is_rounded or value.dtype == torch.promote_types(hidden.dtype, torch.float32)
        # float32 sums of up to 257 terms of either sign, relative to the largest result; logits
        # reach 30, so that exponentials are known to 30 * 2^-23.
        tol = 1e-5 + (torch.finfo(hidden.dtype).eps if is_rounded else 0)
        atol = tol * max(1, float(truth[name].abs().max()) if truth[name].numel() else 0)
        torch.testing.assert_close(
            value.double(), truth[name], rtol=tol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return sums


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(1, 1, 2, 1), (3, 7, 13, 5), (4, 5, 257, 8), (2, 33, 64, 16)]),
    has_bias=st.booleans(),
    has_grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scratch=st.sampled_from([64, 1000, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_everything_agrees_with_float64(shape, has_bias, has_grad, dtype, scratch, seed) -> None:
    """One tile and many, one block and many, e W h from e W and from the logits."""
    case = _case(*shape, seed, has_bias=has_bias, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURATE_KERNELS", "torch")
        patch.setattr(linear_head, "SCRATCH_CPU", scratch)
        patch.setattr(linear_head, "TOKENS_CPU", 11)
        _check(case, replace(_all_wants(*shape, seed), hidden_grad=has_grad))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch", [300, 1 << 20])
def test_triton_agrees_with_float64(dtype, scratch, backend, device, monkeypatch) -> None:
    monkeypatch.setattr(linear_head, "SCRATCH_CPU", scratch)
    shape = 2, 5, 70, 9
    case = [x.to(device) for x in _case(*shape, 1, has_bias=True, dtype=dtype)]
    _check(case, _all_wants(*shape, 1))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch", [300, 1 << 20])
def test_errors_of_16_bits_are_as_good_as_their_rounding(
    dtype, scratch, backend, device, monkeypatch
) -> None:
    """As on a GPU, whose tensor cores multiply 16-bit factors into float32."""
    monkeypatch.setattr(linear_head, "multiplies_16_bits", lambda device: True)
    monkeypatch.setattr(linear_head, "SCRATCH_CPU", scratch)
    shape = 2, 5, 70, 9
    b, t, v, _ = shape
    hidden, weight, bias, targets = (
        x.to(device) for x in _case(*shape, 1, has_bias=True, dtype=dtype)
    )
    wants = _all_wants(*shape, 1)
    assert wants.directions is not None
    wants = replace(wants, directions=wants.directions.to(dtype))
    sums = head_sums(hidden, weight, bias, targets, wants)
    truth, got = _truth(hidden, weight, bias, targets, wants), _named(sums)
    real = targets != -100
    one_hot = F.one_hot(targets.clamp(min=0), v)
    z = hidden.double().nan_to_num() @ weight.double().T + bias.double()
    e = ((z.softmax(-1) - one_hot) * real[..., None]).abs()
    # Each E is rounded once: what is summed over classes is off by at most eps / 2 of the sum of
    # the sizes of its terms. The target's own error stays float32.
    eps = torch.finfo(dtype).eps
    products = torch.einsum(
        "mvd,btd->btmv", wants.directions.double(), hidden.double().nan_to_num()
    )
    bounds = {
        "hidden_grad": 1.5 * eps * (e @ weight.double().abs()),  # and the result itself
        "gram": eps * (e @ e.mT),
        "sketch": eps / 2 * e.sum(-1, keepdim=True),
        "dots": eps / 2 * torch.einsum("btv,btmv->btm", e, products.abs()),
        "columns": eps / 2,
        "aligned": eps
        / 2
        * (e @ weight.double().abs() * hidden.double().nan_to_num().abs()).sum(-1),
    }
    for name, value in got.items():
        excess = (value.double() - truth[name]).abs() - bounds.get(name, 0.0)
        assert excess.max() <= 2e-5 * max(1, float(truth[name].abs().max())), name
    seeds = torch.randn(b, t, device=device) * 1e-6  # lost in half precision if taken as they are
    norm = head_sq_norm(hidden, weight, bias, targets, sums.lse, sums.error_target, seeds)
    exact = [
        (x * s[:, None]).mT @ h
        for x, s, h in zip(
            (z.softmax(-1) - one_hot) * real[..., None],
            seeds.double(),
            hidden.double().nan_to_num(),
            strict=True,
        )
    ]
    want = torch.stack([g.square().sum() for g in exact])
    torch.testing.assert_close(norm.double(), want, rtol=4 * eps, atol=0)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Ragged rows and aligned ones; classes below one block and in several parts; more than one step
# along the width.
@pytest.mark.parametrize(("v", "d", "has_bias"), [(50, 9, True), (200, 96, False)])
def test_tiles_in_registers_agree_with_float64(
    v, d, has_bias, dtype, backend, device, poisoned, monkeypatch
) -> None:
    launched = []
    monkeypatch.setattr(
        linear_head,
        "head_partial_sums",
        lambda *args: launched.append(head_partial_sums(*args)) or launched[-1],
    )
    case = _case(2, 4, v, d, 1, has_bias=has_bias, dtype=dtype)
    case = [None if x is None else x.to(device) for x in case]
    _check(case, HeadWants(statistics=True, aligned=not has_bias))
    assert len(launched) == 1 and (v == 50 or launched[0].shape[0] > 1)
    if not has_bias:
        hidden, weight, _, targets = case
        real = targets != -100
        whole = head_partial_sums_reference(hidden[real], weight, None, targets[real])
        merged, index = totals(whole, targets[real])
        got, got_index = totals(launched[0], targets[real])
        torch.testing.assert_close(got, merged, rtol=1e-5, atol=1e-5)
        assert torch.equal(index, got_index)


def test_confident_rows_keep_their_relative_accuracy(backend, device) -> None:
    """At ||e|| from 1e-1 to 1e-12: all that is linear in e is as exact as e."""
    gap = torch.linspace(4, 28, 13, dtype=torch.float64)
    logits = torch.zeros(13, 5, dtype=torch.float64)
    logits[:, 2], logits[:, 0] = gap, 0.5
    weight = torch.eye(5)  # the hidden states are the logits
    hidden, targets = logits.float()[None].to(device), torch.full((1, 13), 2, device=device)
    p = logits.float().double().softmax(-1)
    e = p.clone()
    e[:, 2] = -(p[:, [0, 1, 3, 4]].sum(-1))
    wants = HeadWants(statistics=True, gram=True, hidden_grad=True, aligned=True)
    sums = head_sums(hidden, weight.to(device), None, targets, wants)
    assert sums.statistics is not None and sums.gram is not None and sums.hidden_grad is not None
    assert sums.statistics.el2n.min() < 1e-11 and sums.statistics.el2n.max() > 1e-2
    for got, want in [
        (sums.statistics.el2n, e.norm(dim=-1)),
        (sums.hidden_grad, e),
        (sums.gram, e @ e.T),
        (sums.aligned, (e * logits).sum(-1)),
    ]:
        # One float32 step of a sum near 28 is 2e-6; the Gram matrix has it twice.
        torch.testing.assert_close(got[0].cpu().double(), want, rtol=8e-6, atol=0)
    nothing = head_sums(hidden, weight.to(device), None, targets, HeadWants(statistics=True))
    torch.testing.assert_close(nothing.loss, sums.loss, rtol=4e-6, atol=0)


def test_the_first_of_equal_logits_is_the_prediction(backend, device, monkeypatch) -> None:
    monkeypatch.setattr(linear_head, "SCRATCH_CPU", 6)
    weight = torch.zeros(9, 4, device=device)
    weight[[3, 7]] = 1.0
    targets = torch.tensor([[3, 7, 0]], device=device)
    for wants in (HeadWants(statistics=True), HeadWants(statistics=True, gram=True)):
        sums = head_sums(torch.ones(1, 3, 4, device=device), weight, None, targets, wants)
        assert sums.statistics is not None
        assert sums.statistics.correct.tolist() == [[1.0, 0.0, 0.0]]
        assert sums.statistics.margin.tolist() == [[0.0, 0.0, -4.0]]


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 4)])
def test_without_target_tokens_all_is_zero(shape, backend, device) -> None:
    b, t, v, d = shape
    hidden = torch.full((b, t, d), torch.nan, device=device)
    targets = torch.full((b, t), -100, device=device)
    wants = replace(
        _all_wants(*shape, 0), columns=torch.zeros(b, 2, dtype=torch.long, device=device)
    )
    weight = torch.randn(v, d, device=device)
    for some in (wants, HeadWants(statistics=True), HeadWants(hidden_grad=True)):
        for value in _named(head_sums(hidden, weight, None, targets, some)).values():
            assert value.shape[:2] == (b, t) and not value.any()


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_of_the_gradient_agree_with_autograd(dtype, backend, device, monkeypatch) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 takes the torch form")
    monkeypatch.setattr(linear_head, "SCRATCH_CPU", 150)
    monkeypatch.setattr(linear_head, "TOKENS_CPU", 9)
    hidden, weight, bias, targets = (
        x.to(device) for x in _case(5, 6, 23, 7, 4, has_bias=True, dtype=dtype)
    )
    seeds = torch.randn(5, 6, dtype=dtype, device=device)
    want = []
    for h, y, seed in zip(hidden, targets, seeds, strict=True):
        w = weight.double().requires_grad_()
        real = y != -100
        z = h[real].double() @ w.T + bias.double()
        loss = F.cross_entropy(z, y[real], reduction="none") @ seed[real].double()
        want.append(torch.autograd.grad(loss, w)[0].square().sum() if real.any() else loss)
    sums = head_sums(hidden, weight, bias, targets, HeadWants(gram=True))
    assert sums.gram is not None
    recomputed = head_sq_norm(hidden, weight, bias, targets, sums.lse, sums.error_target, seeds)
    for got in (recomputed, head_gram_sq_norm(sums.gram, hidden, seeds)):
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=2e-5, atol=1e-6)
    rows = slice(1, 3)
    error = head_error(hidden, weight, bias, targets, sums.lse, sums.error_target, rows)
    torch.testing.assert_close(error @ error.mT, sums.gram[rows], rtol=1e-5, atol=1e-6)
    assert not error[targets[rows] == -100].any()


def test_loss_is_differentiable_in_the_hidden_states() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    targets = torch.tensor([[0, 5, -100], [-100, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda h: head_pass(h, weight, bias, targets, HeadWants())[0], (hidden,)
    )
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, targets, bias), (hidden,)
    )
    _, sums = head_pass(hidden, weight, bias, targets, HeadWants())
    assert sums.hidden_grad is not None and not sums.hidden_grad.requires_grad
    with torch.no_grad():
        loss, sums = head_pass(hidden, weight, bias, targets, HeadWants())
    assert sums.hidden_grad is None and not loss.requires_grad


def test_weight_gradients_come_from_stored_logits_or_not_at_all() -> None:
    hidden, targets = torch.randn(2, 3, 4), torch.tensor([[0, 5, -100], [1, 2, 2]])
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6)
    with pytest.raises(ValueError, match="freeze them"):
        head_pass(hidden, weight, bias, targets, HeadWants())
    loss = linear_cross_entropy(hidden, weight, targets, bias)
    plain = F.cross_entropy(
        F.linear(hidden, weight, bias).flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(loss.flatten(), plain)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(plain.sum(), weight)[0])
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, bias), loss)


def test_a_mode_sees_one_call() -> None:
    calls = []

    class _Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    hidden, weight, targets = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 5, -100])
    with _Watch():
        inside = linear_cross_entropy(hidden, weight, targets)
    # A shape checker reads the tensors' attributes first; no product is seen, for it is inside.
    assert calls.count(linear_cross_entropy) == 1
    assert not {F.linear, torch.mm, torch.addmm, torch.matmul} & set(calls)
    assert torch.equal(inside, linear_cross_entropy(hidden, weight, targets))


def test_statistics_are_left_where_they_are_gathered() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(6, 4)
    targets = torch.tensor([[0, 5, -100], [1, 2, 2]])
    with gathering() as gathered:
        linear_cross_entropy(hidden, weight, targets)
    assert gathered.head is not None
    want = token_statistics(F.linear(hidden, weight), targets)
    for a, b in zip(gathered.head, want, strict=True):
        torch.testing.assert_close(a, b)


class _Largest(TorchDispatchMode):
    """Notes the largest storage that an operation makes, other than those known before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {x.untyped_storage().data_ptr() for x in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_scratch_is_bounded_whatever_the_rows_length(monkeypatch) -> None:
    b, t, v, d = 2, 16, 700, 4
    hidden, weight, bias, _ = _case(b, t, v, d, 0, has_bias=True, dtype=torch.float32)
    hidden, targets = torch.randn(b, t, d), torch.randint(0, v, (b, t))
    wants = replace(_all_wants(b, t, v, d, 0), sketch=(KEY, 3))
    whole = _named(head_sums(hidden, weight, bias, targets, wants))
    scratch = 512  # as much as the Gram matrices; a row's logits are 20 times as many
    monkeypatch.setattr(linear_head, "SCRATCH_CPU", scratch)
    assert wants.columns is not None and wants.directions is not None
    with _Largest(hidden, weight, bias, targets, wants.columns, wants.directions) as largest:
        sums = head_sums(hidden, weight, bias, targets, wants)
        head_sq_norm(hidden, weight, bias, targets, sums.lse, sums.error_target, torch.ones(b, t))
    results = max(x.numel() for x in _named(sums).values())
    assert largest.bytes <= 8 * max(scratch, results, 256 * 8), largest.bytes
    for name, value in _named(sums).items():
        scale = max(1, float(whole[name].abs().max()))
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5 * scale)


def test_prompt_tokens_cost_nothing(monkeypatch) -> None:
    """Half the tokens ignored: half the logits are made."""
    made = []

    def logits(h: Tensor, *args: Any, out: Tensor) -> None:
        made.append(out.numel())
        kept(h, *args, out=out)

    kept = linear_head.logits
    monkeypatch.setattr(linear_head, "logits", logits)
    hidden, weight = torch.randn(3, 8, 4), torch.randn(11, 4)
    targets = torch.randint(0, 11, (3, 8))
    targets[:, :4] = -100
    for wants in (HeadWants(), HeadWants(gram=True)):
        made.clear()
        head_sums(hidden, weight, None, targets, wants)
        assert sum(made) == 3 * 4 * 11
