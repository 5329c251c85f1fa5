"""Dense projections: against sign matrices written out, in either form; what they estimate."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curate.kernels.launch import IS_INTERPRETED
from curate.kernels.projection import project, project_matrix, project_rows
from curate.kernels.rademacher import signs, stream_key

KEY = stream_key(5, "w", "whole")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _truth(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the projection in float64 and a bound on the error of float32 sums of any order.

    That is n 2^-24 times the sum of sizes for n terms (8 more for roundings of products), twice of
    which is allowed. A product of 16-bit numbers summed in float32 is multiplied by its sign with
    16 bits, which Triton's interpreter cuts off where a GPU rounds: less than 2^-15 more.
    """
    exact = left.dtype == torch.float32
    left, right = left.double().cpu(), right.double().cpu()
    grad, size = (x.flatten(1) for x in (_pair(left, right), _pair(left.abs(), right.abs())))
    i = right.shape[3]
    at = torch.arange(grad.shape[1])
    s = signs(KEY, at % i, k, rows=at // i, dtype=torch.float64)
    unit = (left.shape[2] + len(at) + 8) * 2.0**-23 + (0 if exact else 2.0**-15)
    return grad @ s / sqrt(k), unit * size.sum(1, keepdim=True) / sqrt(k)


def _pair(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("sgto,sgti->sgoi", left, right).flatten(1, 2)


def _agree(got: Tensor, want: Tensor, bound: Tensor) -> None:
    assert got.shape == want.shape
    assert ((got.double().cpu() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((2, 1, 17, 19, 35), 40),  # ragged tiles and token blocks, one block of outputs
        ((17, 2, 1, 3, 4), 100),  # one sample more than a program holds; groups; two blocks
        ((1, 1, 5, 1, 9), 1),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_projection_is_the_product_with_the_signs(dtype, shape, k, device) -> None:
    s, g, t, o, i = shape
    left = torch.randn(s, g, t, o).to(device, dtype)
    right = torch.randn(s, g, t, i).to(device, dtype)
    want, bound = _truth(left, right, k)
    _agree(project(left, right, KEY, k), want, bound)


@pytest.mark.usefixtures("poisoned")
def test_it_does_not_matter_how_a_gradient_arrives(device) -> None:
    """A table's gradient as a pair with one-hot left factors, as rows, and as a matrix."""
    index, right = torch.randint(0, 7, (2, 5), device=device), torch.randn(2, 5, 11, device=device)
    left = torch.nn.functional.one_hot(index, 7).float()[:, None]
    want, bound = _truth(left, right[:, None], 70)
    _agree(project(left, right[:, None], KEY, 70), want, bound)
    _agree(project_rows(index, right, KEY, 70), want, bound)
    _agree(project_matrix(left[:, 0].mT @ right, KEY, 70), want, bound)


@pytest.mark.usefixtures("poisoned")
def test_many_coordinates_in_the_torch_form_are_taken_in_blocks(monkeypatch) -> None:
    monkeypatch.setattr("curate.kernels.projection.SIGNS", 128)
    left, right = torch.randn(2, 2, 3, 7), torch.randn(2, 2, 3, 5)
    want, bound = _truth(left, right, 9)
    _agree(project(left, right, KEY, 9), want, bound)
    _agree(project_matrix(_pair(left, right), KEY, 9), want, bound)


def test_float64_is_summed_in_float64() -> None:
    left, right = (torch.randn(2, 1, 9, n, dtype=torch.float64) for n in (5, 7))
    want, _ = _truth(left, right, 33)
    torch.testing.assert_close(project(left, right, KEY, 33), want, rtol=1e-13, atol=1e-13)


def test_inner_products_are_kept_without_bias_and_layers_add_up() -> None:
    """Over 500 seeds: the mean is off by less than five of its standard errors, and the variance is
    (|x|^2 |y|^2 + <x, y>^2 - 2 sum x^2 y^2) / k within five of its own, sqrt(2 / 500) of it for a
    near-normal estimate (k = 64 products of near-normals: kurtosis adds a tenth)."""
    x = [torch.randn(1, 8, 9, dtype=torch.float64), torch.randn(1, 1, 30, dtype=torch.float64)]
    y = [a + torch.randn_like(a) for a in x]
    flat_x, flat_y = (torch.cat([a.flatten() for a in v]) for v in (x, y))
    exact, k = flat_x @ flat_y, 64
    found = []
    for seed in range(500):
        keys = [stream_key(seed, str(n), "whole") for n in range(2)]
        p = sum(
            project_matrix(torch.cat([a, b]), key, k) for a, b, key in zip(x, y, keys, strict=True)
        )
        found.append(p[0] @ p[1])
    estimates = torch.stack(found)
    assert (estimates.mean() - exact).abs() < 5 * estimates.std() / sqrt(500)
    squares = flat_x.square().sum() * flat_y.square().sum()
    variance = (squares + exact**2 - 2 * (flat_x * flat_y).square().sum()) / k
    assert (estimates.var() / variance - 1).abs() < 5.5 * sqrt(2 / 500)


def test_projection_is_linear_and_ones_keep_their_parity(device) -> None:
    x, y = torch.randn(2, 1, 9, 11, device=device)
    both = project_matrix(x + 2 * y, KEY, 32)
    apart = project_matrix(x, KEY, 32) + 2 * project_matrix(y, KEY, 32)
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)
    got = project_matrix(torch.ones(1, 9, 11, device=device), KEY, 32) * sqrt(32)
    torch.testing.assert_close(got, got.round(), atol=1e-4, rtol=0)
    assert (got.round().long() % 2 == 1).all()


def test_samples_and_strides_do_not_matter(device) -> None:
    left = torch.randn(3, 1, 5, 7, device=device)
    right = torch.randn(5, 3, 1, 20, device=device).permute(1, 2, 0, 3)[..., 3:12]
    got = project(left, right, KEY, 40)
    torch.testing.assert_close(got, project(left, right.contiguous(), KEY, 40))
    order = torch.tensor([2, 0, 1], device=device)
    torch.testing.assert_close(project(left[order], right[order], KEY, 40), got[order])
    torch.testing.assert_close(project(left[1:2], right[1:2], KEY, 40), got[1:2])
    index = torch.randint(0, 9, (5, 3), device=device).T
    torch.testing.assert_close(
        project_rows(index, right[:, 0], KEY, 40),
        project_rows(index.contiguous(), right[:, 0].contiguous(), KEY, 40),
    )


def test_nothing_gives_zeros(device) -> None:
    none = torch.zeros(2, 1, 0, 4, device=device)
    assert torch.equal(project(none, none, KEY, 8).cpu(), torch.zeros(2, 8))
    assert project(none[:0], none[:0], KEY, 8).shape == (0, 8)
    index = torch.zeros(2, 0, dtype=torch.long, device=device)
    assert torch.equal(project_rows(index, none[:, 0], KEY, 8).cpu(), torch.zeros(2, 8))
    assert torch.equal(project_matrix(none[:, 0], KEY, 8).cpu(), torch.zeros(2, 8))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape_is_projected(data) -> None:
    s, g, t = (data.draw(st.integers(1, n)) for n in (18, 2, 20))
    o, i = (data.draw(st.sampled_from([1, 2, 15, 16, 17])) for _ in range(2))
    k, dtype = data.draw(st.integers(1, 130)), data.draw(st.sampled_from(DTYPES))
    left, right = torch.randn(s, g, t, o).to(dtype), torch.randn(s, g, t, i).to(dtype)
    want, bound = _truth(left, right, k)
    for form in ("torch", "interpret") if IS_INTERPRETED else ("torch",):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CURATE_KERNELS", form)
            _agree(project(left, right, KEY, k), want, bound)
