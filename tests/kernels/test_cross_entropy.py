"""Token cross entropy against float64 torch, and on rows where the naive form cancels."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.kernels import cross_entropy, online_softmax
from curate.kernels.cross_entropy import (
    gathering,
    token_cross_entropy,
    token_statistics,
    token_sums,
)
from curate.kernels.softmax_tiles import partial_sums


def _truth(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Statistics from mpmath-free float64, through log_softmax and one-hot."""
    z = logits.double().flatten(0, -2)
    y = targets.flatten()
    logp = z.log_softmax(-1)
    p = logp.exp()
    one_hot = F.one_hot(y.clamp(min=0), z.shape[-1]).double()
    rest = z.masked_fill(one_hot.bool(), -torch.inf)
    out = {
        "loss": -(logp * one_hot).sum(-1),
        "el2n": (p - one_hot).norm(dim=-1),
        "entropy": torch.special.entr(p).sum(-1),
        "margin": (z * one_hot).sum(-1) - rest.amax(-1),
        "correct": (z.argmax(-1) == y).double(),
        "error_target": -p.masked_fill(one_hot.bool(), 0.0).sum(-1),
        "lse": z.logsumexp(-1),
        "sq_prob": p.square().sum(-1),
        "argmax": z.argmax(-1).double(),
        "aligned": ((p - one_hot) * z).nan_to_num().sum(-1),
    }
    return {k: v.masked_fill(y == -100, 0.0).reshape(targets.shape) for k, v in out.items()}


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from([(1,), (7,), (2, 5), (3, 1, 4), (0,), (2, 0)]),
    classes=st.sampled_from([2, 3, 10, 257]),
    scale=st.sampled_from([0.0, 1.0, 10.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 999),
)
def test_agrees_with_float64(shape, classes, scale, dtype, seed) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, classes, generator=gen) * scale).to(dtype)
    targets = torch.randint(0, classes, shape, generator=gen)
    targets = targets.masked_fill(torch.rand(shape, generator=gen) < 0.2, -100)
    _check(logits, targets)


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Everything that one pass gives, within float32's rounding of the largest logit."""
    truth, sums = _truth(logits, targets), token_sums(logits, targets)
    assert sums.loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    real = logits.double()[targets != -100]
    scale = float(real[real.isfinite()].abs().amax()) if real.numel() else 0.0
    for name, got in sums._asdict().items():
        want = truth[name]
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=2e-5,
            atol=8e-6 * max(1, scale),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert torch.equal(token_cross_entropy(logits, targets), sums.loss)
    assert all(map(torch.equal, token_statistics(logits, targets), sums.statistics))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
# Widths on both sides of every block (16, 128, 1024, 2048), and one that takes two parts.
@pytest.mark.parametrize("classes", [1, 2, 16, 17, 129, 1025, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_agrees_with_float64(classes, dtype, backend, device, poisoned) -> None:
    logits = (torch.randn(3, classes + 3) * 10).to(dtype)[:, :classes]  # rows apart
    targets = torch.tensor([classes - 1, -100, 0])
    logits[1] = torch.nan
    _check(logits.to(device), targets.to(device))
    z = logits.to(device).requires_grad_()
    seed = torch.tensor([2.0, torch.inf, -0.5], device=device)
    (grad,) = torch.autograd.grad(token_cross_entropy(z, targets.to(device)), z, seed)
    one_hot = F.one_hot(targets.clamp(min=0), classes)
    exact = (logits.double().softmax(-1) - one_hot) * seed.cpu()[:, None]
    exact[1] = 0.0
    # One rounding to the logits' dtype, and before it float32's of log-sum and exponent.
    steps = 2**-22 * float(logits.detach().nan_to_num().abs().amax())
    rtol = torch.finfo(dtype).eps + steps
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=rtol, atol=2**-24)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_parts_of_the_classes_are_merged_in_order(backend, device) -> None:
    """Few tokens are split over the classes; where the first of equal maxima lies still counts."""
    logits = torch.zeros(2, 5000, device=device)
    logits[:, [3000, 4500]] = 1.0
    targets = torch.tensor([4500, 3000], device=device)
    assert len(partial_sums(logits, targets)) == 3
    sums = token_sums(logits, targets)
    assert sums.argmax.tolist() == [3000, 3000] and sums.correct.tolist() == [0.0, 1.0]
    _check(logits.cpu(), targets.cpu())
    assert all(map(torch.equal, sums, token_sums(logits, targets))), "not the same bits again"


def test_confident_rows_keep_their_relative_accuracy(backend, device) -> None:
    """At ||e|| from 1e-2 to 1e-12 in float32; autograd's own p - y loses all digits on the way."""
    gap, rtol = torch.linspace(4, 28, 13), 4e-6  # one float32 step of a sum near 28 is 2e-6
    logits = torch.zeros(13, 5)
    logits[:, 2] = gap
    logits[:, 0] = 0.5
    targets = torch.full((13,), 2)
    truth = (logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).clone()
    truth[:, 2] = -(truth.sum(-1) - truth[:, 2])
    logits, targets, truth = logits.to(device), targets.to(device), truth.to(device)
    z = logits.clone().requires_grad_()
    loss = token_cross_entropy(z, targets)
    (error,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(error.double(), truth, rtol=rtol, atol=0)
    torch.testing.assert_close(
        token_statistics(logits, targets).el2n.double(), truth.norm(dim=-1), rtol=rtol, atol=0
    )
    torch.testing.assert_close(
        loss.detach().double(), torch.log1p(-truth[:, 2] / (1 + truth[:, 2])), rtol=rtol, atol=0
    )


def test_gradient_is_the_numerical_one_and_scales_with_its_seed() -> None:
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 5, -100, 2], [1, 1, 1, -100], [3, 2, 0, 4]])
    assert torch.autograd.gradcheck(lambda z: token_cross_entropy(z, targets), (logits,))


def test_ignored_tokens_give_zero_even_where_logits_are_nan(backend, device) -> None:
    logits = torch.randn(4, 7, device=device)
    logits[1] = torch.nan
    logits.requires_grad_()
    targets = torch.tensor([0, -100, 6, -100], device=device)
    loss = token_cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[1] == loss[3] == 0
    assert not grad[1].any() and not grad[3].any()
    assert all(not s[[1, 3]].any() for s in token_statistics(logits, targets))


@pytest.mark.parametrize("classes", [5, 3000])
def test_a_target_or_another_class_that_is_nan_gives_nan(
    classes, backend, device, sanitized
) -> None:
    """A GPU's maximum drops NaN: no statistic may hide it."""
    logits = torch.randn(4, classes, device=device)
    targets = torch.tensor([1, 2, 3, classes - 1], device=device)
    logits[0, 1] = logits[1, 1] = logits[3, classes - 1] = torch.nan
    sums = token_sums(logits, targets)
    for value in (sums.loss, sums.lse, sums.el2n, sums.margin):
        assert value.isnan().tolist() == [True, True, False, True]


def test_worked_example_of_data_diet() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    stats = token_statistics(logits, torch.tensor([0]))
    assert stats.el2n.item() == pytest.approx(0.4243361, abs=1e-7)
    assert stats.margin.item() == 1 and stats.correct.item() == 1


def test_el2n_of_uniform_probabilities_and_of_two_classes() -> None:
    for c in (2, 3, 100):
        el2n = token_statistics(torch.zeros(1, c), torch.tensor([c - 1])).el2n.item()
        assert el2n == pytest.approx(math.sqrt((c - 1) / c), rel=1e-6)
    z = torch.randn(50, 2)
    y = torch.randint(0, 2, (50,))
    p_y = z.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    torch.testing.assert_close(token_statistics(z, y).el2n, 2**0.5 * (1 - p_y))


def test_masked_classes_and_ties(backend, device) -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 3.0, -torch.inf]], device=device)
    targets = torch.tensor([1, 1], device=device)
    stats = token_statistics(logits, targets)
    assert stats.correct.tolist() == [0.0, 1.0]  # the first of equal logits is the prediction
    assert stats.entropy.tolist() == pytest.approx([math.log(2), 0.0])
    z = logits.requires_grad_()
    loss = token_cross_entropy(z, targets)
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(29, 11), torch.randint(0, 11, (29,))
    whole = token_statistics(logits, targets)
    monkeypatch.setattr(cross_entropy, "CHUNK_CPU", 37)
    for a, b in zip(whole, token_statistics(logits, targets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 7, 256, 300, 512, 1300])
def test_first_maximum_is_the_first_of_equals(width) -> None:
    z = torch.randint(0, 4, (50, width)).float()
    top, at = online_softmax.first_max(z)
    assert torch.equal(top, z.amax(1))
    # numpy's arg-max is documented to return the first.
    assert at.tolist() == z.numpy().argmax(1).tolist()


def test_gathering_keeps_what_the_loss_has_read(backend, device) -> None:
    logits, targets = (
        torch.randn(2, 5, 9, device=device),
        torch.randint(0, 9, (2, 5), device=device),
    )
    logits.requires_grad_()
    with gathering() as gathered:
        loss = token_cross_entropy(logits, targets)
        kept = gathered.statistics(logits)
    assert kept is not None
    assert all(map(torch.equal, kept, token_statistics(logits, targets)))
    assert gathered.statistics(logits.detach()) is kept, "the same numbers in the same place"
    assert gathered.statistics(logits.detach().clone()) is None
    assert gathered.statistics(logits[:, 1:]) is None
    assert torch.equal(loss, token_cross_entropy(logits, targets))
    with torch.no_grad():
        logits.mul_(2)
    assert gathered.statistics(logits) is None, "the logits are others now"


def test_gathering_holds_no_logits_and_ends_with_its_block() -> None:
    targets = torch.zeros(3, dtype=torch.long)
    with gathering() as outer:
        with gathering() as inner:
            logits = torch.randn(3, 4)
            token_cross_entropy(logits, targets)
        assert inner.statistics(logits) is not None and outer.statistics(logits) is None
        storage = weakref.ref(logits.untyped_storage())
        address = logits.data_ptr()
        del logits
        gc.collect()
        assert storage() is None
        # Whatever comes to lie at the old address is something else.
        again = [torch.randn(3, 4) for _ in range(64)]
        assert all(inner.statistics(x) is None for x in again), hex(address)
        after = torch.randn(3, 4)
    token_cross_entropy(after, targets)
    assert outer.statistics(after) is None
