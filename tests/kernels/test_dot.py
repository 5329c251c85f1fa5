"""Inner products of per-sample gradients with directions against the gradients themselves."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curate.kernels import summation
from curate.kernels.dot import (
    cheaper_dot_form,
    grad_dot,
    grad_dot_matrix,
    grad_dot_product,
    grad_dot_rows,
    output_dot,
)
from curate.kernels.grad_tiles import grad_tile_sums
from curate.kernels.launch import IS_INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 1, 5, 7, 9), (2, 2, 17, 33, 20), (70, 1, 1, 3, 65), (1, 1, 1, 1, 1)]


def _factors(shape, dtypes, device) -> tuple[Tensor, Tensor]:
    s, g, t, o, i = shape
    left, right = torch.randn(s, g, t, o), torch.randn(s, g, t, i)
    return left.to(device, dtypes[0]), right.to(device, dtypes[1])


def _whole(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("sgto,sgti->sgoi", left.double(), right.double()).flatten(1, 2)


def _check(got: Tensor, left: Tensor, right: Tensor, v: Tensor) -> None:
    """Compare with float64; every rounding is of at most 2^-24 of the terms' absolute sum.

    At most 32 of them are met on the way of a term: sums are of blocks and in trees.
    """
    assert got.dtype == torch.float32
    truth = torch.einsum("sri,mri->sm", _whole(left, right), v.double())
    terms = torch.einsum("sri,mri->sm", _whole(left.abs(), right.abs()), v.double().abs())
    assert ((got.double() - truth).abs() <= 32 * 2**-24 * terms).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(DTYPES[1], DTYPES[0])])
def test_the_product_form_is_the_dot_with_the_whole_gradient(
    shape, dtypes, device, poisoned
) -> None:
    left, right = _factors(shape, dtypes, device)
    v = torch.randn(3, shape[1] * shape[3], shape[4], device=device)
    _check(grad_dot_product(left, right, v), left, right, v)
    _check(grad_dot(left, right, v), left, right, v)


sides = st.sampled_from([1, 2, 15, 16, 31, 63, 64, 65, 97])


@pytest.mark.slow
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 40), sides, sides),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)
def test_any_shape_and_dtype(device, shape, dtypes) -> None:
    left, right = _factors(shape, dtypes, device)
    v = torch.randn(2, shape[1] * shape[3], shape[4], device=device)
    _check(grad_dot_product(left, right, v), left, right, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_keep_their_bits_beside_half_factors(dtype, device) -> None:
    """V = 2^12 + small: the large part cancels, what is below half's precision is the answer."""
    left, right = _factors((2, 1, 4, 8, 16), (dtype, dtype), device)
    left[:, :, 2:], right[:, :, 2:] = left[:, :, :2], -right[:, :, :2]  # G = 0 twice over
    left[:, :, 3] = 0
    v = 4096 + torch.rand(1, 8, 16, device=device)
    for form in (grad_dot_product, lambda *x: grad_tile_sums(*x[:2], directions=x[2]).dots):
        _check(form(left, right, v), left, right, v)


def test_the_form_follows_tokens_and_directions() -> None:
    """One direction is a product; many directions, and tokens enough, make each tile of G once."""
    assert cheaper_dot_form(1, 1) == cheaper_dot_form(4096, 1) == "product"
    assert cheaper_dot_form(1, 16) == "product" and cheaper_dot_form(512, 16) == "tiles"
    assert (
        cheaper_dot_form(1, 1, "cuda") == "product" and cheaper_dot_form(512, 1, "cuda") == "tiles"
    )


@pytest.mark.parametrize("shape", [(0, 1, 3, 4, 5), (2, 1, 0, 4, 5), (2, 2, 3, 4, 5)])
def test_no_samples_tokens_or_directions(shape, device) -> None:
    left, right = _factors(shape, DTYPES[:2], device)
    v = torch.ones(2 if 0 in shape else 0, shape[1] * 4, 5, device=device)
    want = torch.zeros(shape[0], len(v), device=device)
    assert torch.equal(grad_dot(left, right, v), want)
    assert torch.equal(grad_dot_product(left, right, v), want)
    if shape[1] == 1:
        index = torch.zeros(shape[0], shape[2], dtype=torch.long, device=device)
        assert torch.equal(grad_dot_rows(index, right[:, 0], v), want)
        assert torch.equal(output_dot(left, left, None), want[:, 0])


def test_a_sample_has_the_same_bits_in_any_batch(backend, device) -> None:
    if backend == "torch":
        pytest.skip("libraries choose their order by the size of the batch")
    left, right = _factors((5, 1, 20, 9, 70), (torch.bfloat16,) * 2, device)
    v, index = torch.randn(2, 9, 70, device=device), torch.randint(0, 9, (5, 20), device=device)
    order = torch.tensor([2, 0, 4, 3, 1], device=device)
    forms = [
        lambda n: grad_dot_rows(index[n], right[n, 0], v),
        lambda n: output_dot(left[n], left[n].square(), None),
    ]
    if not IS_INTERPRETED:  # numpy multiplies a row differently at another place in its block
        forms.append(lambda n: grad_dot_product(left[n], right[n], v))
    for form in forms:
        together = form(torch.arange(5, device=device))
        assert torch.equal(form(order), together[order])
        assert torch.equal(form(order[:1]), together[order[:1]])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(), (1,), (3, 5)])
def test_the_free_form_is_the_dot_with_the_layers_weight(
    dtype, tokens, has_bias, device, poisoned
) -> None:
    grad, output = torch.randn(4, *tokens, 33), torch.randn(4, *tokens, 33)
    grad, output = grad.to(device, dtype), output.to(device, dtype)
    bias = torch.randn(33, device=device) if has_bias else None
    less = output.double() if bias is None else output.double() - bias.double()
    terms = (grad.double() * less).flatten(1)
    got = output_dot(grad, output, bias)
    assert got.dtype == torch.float32
    assert ((got.double() - terms.sum(1)).abs() <= 32 * 2**-24 * terms.abs().sum(1)).all()


def test_a_linear_layers_output_gives_its_weights_dot(device) -> None:
    layer, x = nn.Linear(6, 9, device=device), torch.randn(4, 5, 6, device=device)
    grad = torch.randn(4, 5, 9, device=device)
    free = output_dot(grad, layer(x), layer.bias).detach()
    dots = grad_dot(grad[:, None], x[:, None], layer.weight.detach()[None])
    torch.testing.assert_close(free, dots[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(DTYPES[1], DTYPES[0])])
def test_looked_up_rows_are_unit_vectors(dtypes, device, poisoned) -> None:
    index = torch.randint(0, 30, (3, 9), device=device)
    right = torch.randn(3, 9, 17).to(device, dtypes[0])
    v = torch.randn(2, 30, 17).to(device, dtypes[1])
    unit = nn.functional.one_hot(index, 30).to(right.dtype)
    _check(grad_dot_rows(index, right, v), unit[:, None], right[:, None], v)
    table = v.transpose(1, 2).contiguous().transpose(1, 2)  # directions whose rows are broken up
    torch.testing.assert_close(grad_dot_rows(index, right, table), grad_dot_rows(index, right, v))


@pytest.mark.parametrize("scratch", [20, 1 << 22])
def test_scratch_bounds_what_is_made_at_a_time(scratch, monkeypatch) -> None:
    monkeypatch.setattr(summation, "SCRATCH", scratch)
    left, right = (x.double() for x in _factors((5, 2, 7, 8, 6), DTYPES[:2], "cpu"))
    grad = _whole(left, right)
    v = torch.randn(3, *grad.shape[1:], dtype=torch.float64)
    want = torch.einsum("sri,mri->sm", grad, v)
    for got in (grad_dot_product(left, right, v), grad_dot_matrix(grad, v)):
        torch.testing.assert_close(got, want)
    bias = torch.randn(8, dtype=torch.float64)
    free = (left * (left.square() - bias)).sum((1, 2, 3))
    torch.testing.assert_close(output_dot(left, left.square(), bias), free)
