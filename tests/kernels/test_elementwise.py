"""Sums of products over tokens and positions, against torch's own norms differentiated."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels import elementwise
from curate.kernels.elementwise import (
    channel_products,
    channel_sum,
    norm_products,
    token_products,
    token_sum,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _pair(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    return (
        torch.randn(shape, dtype=torch.float64).to(device, dtype),
        torch.randn(shape, dtype=torch.float64).to(device, dtype),
    )


def _check(got: Tensor, want: Tensor, absolute: Tensor, terms: int) -> None:
    """n additions of float32 are off by at most n eps of the sum of absolute values.

    A few roundings more go into each term: a difference, a scale, a product.
    """
    assert got.dtype == torch.float32
    bound = (terms + 8) * 2.0**-23 * absolute + 1e-30
    assert torch.all((got.double() - want).abs() <= bound)


# Blocks are of 16 tokens in runs of 512, of 128 features, of 4 rows and 256 positions.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 513, 3), (2, 7, 130), (5, 31, 129)])
def test_tokens_are_summed(shape, dtype, backend, device, poisoned) -> None:
    x, y = _pair(shape, dtype, device)
    a, b = x.double(), y.double()
    _check(token_products(x, y), (a * b).sum(1), (a * b).abs().sum(1), shape[1])
    _check(token_sum(x), a.sum(1), a.abs().sum(1), shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 3, 257), (1, 9, 130)])
def test_positions_are_summed(shape, dtype, backend, device, poisoned) -> None:
    x, y = _pair(shape, dtype, device)
    mean = torch.randn(shape[1], device=device)
    a, b, m = x.double(), y.double(), mean.double()[:, None]
    _check(channel_products(x, y), (a * b).sum(2), (a * b).abs().sum(2), shape[2])
    _check(
        channel_products(x, y, mean),
        ((a - m) * b).sum(2),
        ((a.abs() + m.abs()) * b.abs()).sum(2),
        shape[2],
    )
    _check(channel_sum(x), a.sum(2), a.abs().sum(2), shape[2])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 17, 130), (1, 3, 513), (2, 4, 1)])
def test_norms_have_the_gradient_that_autograd_finds(
    shape, dtype, centred, backend, device, poisoned
) -> None:
    g, x = _pair(shape, dtype, device)
    weight = torch.ones(shape[2], dtype=torch.float64, device=device, requires_grad=True)

    def normalised(row: Tensor) -> Tensor:
        if centred:
            return F.layer_norm(row, shape[2:], weight, None, 1e-5)
        return F.rms_norm(row, shape[2:], weight, 1e-5)

    want = torch.stack([
        torch.autograd.grad((normalised(row) * up).sum(), weight)[0]
        for row, up in zip(x.double(), g.double(), strict=True)
    ])  # fmt: skip
    got = norm_products(g, x, eps=1e-5, centred=centred)
    # |xhat| <= sqrt(d); mean and scale are themselves sums over d.
    largest = shape[2] ** 0.5 * g.double().abs().sum(1)
    _check(got, want, largest, shape[1] + shape[2])


def test_an_offset_far_from_zero_is_taken_off_first(backend, device) -> None:
    """x = 1000 + noise: its product with y, less 1000 times y's sum, would keep four digits."""
    x, y = _pair((2, 3, 256), torch.float32, device)
    x = x + 1000
    mean = torch.full((3,), 1000.0, device=device)
    want = ((x.double() - 1000) * y.double()).sum(2)
    torch.testing.assert_close(channel_products(x, y, mean).double(), want, rtol=1e-5, atol=1e-4)
    tokens = norm_products(y, x, eps=1e-5, centred=True)
    exact = norm_products(y.double(), x.double(), eps=1e-5, centred=True)
    # The mean is known to 1000 * 2^-24 = 6e-5 of a standard deviation: so is each xhat.
    torch.testing.assert_close(tokens.double(), exact, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("step", "cut", "transposed"), [(2, 1, False), (1, 2, True)])
def test_strides_do_not_matter(step, cut, transposed, backend, device) -> None:
    x, y = _pair((3 * step, 9, 10), torch.float32, device)
    x, y = x[::step, :, cut:], y[::step, :, cut:]
    if transposed:
        x, y = x.mT, y.mT
    a, b = x.contiguous(), y.contiguous()
    for f in (token_products, channel_products):
        torch.testing.assert_close(f(x, y), f(a, b))
    torch.testing.assert_close(token_sum(x), token_sum(a))
    torch.testing.assert_close(channel_sum(x), channel_sum(a))
    n, m = (norm_products(p, q, eps=1e-6, centred=True) for p, q in ((x, y), (a, b)))
    torch.testing.assert_close(n, m, rtol=1e-5, atol=1e-5)


def test_a_sample_has_the_same_bits_alone_and_in_a_batch(backend, device, monkeypatch) -> None:
    if backend == "torch":
        pytest.skip("torch orders its sums by the whole shape")
    x, y = _pair((5, 33, 12), torch.float32, device)
    for f in (
        token_products, channel_products, lambda a, _: token_sum(a), lambda a, _: channel_sum(a),
        lambda a, b: norm_products(a, b, eps=1e-5, centred=True),
    ):  # fmt: skip
        whole = f(x, y)
        for i in range(5):
            assert torch.equal(f(x[i : i + 1], y[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_sums_to_zero(shape, backend, device, poisoned) -> None:
    x = torch.ones(shape, device=device)
    for got in (token_products(x, x), token_sum(x), norm_products(x, x, eps=1e-5, centred=True)):
        assert torch.equal(got, torch.zeros(shape[0], shape[2], device=device))
    for got in (channel_products(x, x), channel_sum(x)):
        assert torch.equal(got, torch.zeros(shape[:2], device=device))


def test_a_large_batch_is_summed_a_few_samples_at_a_time(monkeypatch) -> None:
    x, y = _pair((7, 3, 4), torch.float32, torch.device("cpu"))
    whole = [f(x, y) for f in (token_products, channel_products)]
    norm = norm_products(x, y, eps=1e-5, centred=True)
    monkeypatch.setattr(elementwise, "TILE", 24)
    for f, want in zip((token_products, channel_products), whole, strict=True):
        torch.testing.assert_close(f(x, y), want)
    torch.testing.assert_close(norm_products(x, y, eps=1e-5, centred=True), norm)
