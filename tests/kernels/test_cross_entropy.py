"""Token cross entropy against float64 torch, and on rows where the naive form cancels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.kernels import cross_entropy
from curate.kernels.cross_entropy import token_cross_entropy, token_statistics


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
    truth = _truth(logits, targets)
    loss, stats = token_cross_entropy(logits, targets), token_statistics(logits, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, got in [("loss", loss), *stats._asdict().items()]:
        torch.testing.assert_close(got.double(), truth[name], rtol=2e-5, atol=2e-5 * max(1, scale))


def test_confident_rows_keep_their_relative_accuracy() -> None:
    """At ||e|| from 1e-2 to 1e-12 in float32; autograd's own p - y loses all digits on the way."""
    gap, rtol = torch.linspace(4, 28, 13), 4e-6  # one float32 step of a sum near 28 is 2e-6
    logits = torch.zeros(13, 5)
    logits[:, 2] = gap
    logits[:, 0] = 0.5
    targets = torch.full((13,), 2)
    truth = (logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).clone()
    truth[:, 2] = -(truth.sum(-1) - truth[:, 2])
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


def test_ignored_tokens_give_zero_even_where_logits_are_nan() -> None:
    logits = torch.randn(4, 7)
    logits[1] = torch.nan
    logits.requires_grad_()
    targets = torch.tensor([0, -100, 6, -100])
    loss = token_cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[1] == loss[3] == 0
    assert not grad[1].any() and not grad[3].any()
    assert all(not s[[1, 3]].any() for s in token_statistics(logits, targets))


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


def test_masked_classes_and_ties() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 3.0, -torch.inf]])
    stats = token_statistics(logits, torch.tensor([1, 1]))
    assert stats.correct.tolist() == [0.0, 1.0]  # the first of equal logits is the prediction
    assert stats.entropy.tolist() == pytest.approx([math.log(2), 0.0])
    z = logits.requires_grad_()
    loss = token_cross_entropy(z, torch.tensor([1, 1]))
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(29, 11), torch.randint(0, 11, (29,))
    whole = token_statistics(logits, targets)
    monkeypatch.setattr(cross_entropy, "CHUNK_CPU", 37)
    for a, b in zip(whole, token_statistics(logits, targets), strict=True):
        assert torch.equal(a, b)
