"""Divergences against loops, worked numbers, derivatives by autograd and by differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors.kl import kl_all_neighbors, kl_lth_neighbor
from curate.selectors.kl_growing import AllNeighborsKl, GrowingKl, LthNeighborKl


def literal(x: torch.Tensor, w: torch.Tensor, order: int, k: int, discard: int = 0) -> torch.Tensor:
    """KL_l, or for order 0 the mean over all orders, row by row."""
    (n, d), m = x.shape, len(w)
    terms = []
    for i in range(n):
        own = sorted(float(torch.dist(x[i], x[j])) for j in range(n) if j != i)[k - 1]
        distances = (torch.dist(x[i], w[j]) for j in range(m))
        near = torch.stack(sorted(distances, key=lambda r: r.item()))
        near = near[discard:] if order == 0 else near[order - 1 : order]
        terms.append(d * (torch.log(near + 1e-8).mean() - math.log(own + 1e-8)))
    orders = range(1, m + 1) if order == 0 else [order]
    constant = sum(math.log(k * m / (o * (n - 1))) for o in orders) / len(orders)
    return torch.stack(terms).mean() + constant


def samples(seed: int, n: int = 9, m: int = 6, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)), draw.normal(size=(m, d)) * 2 + 1


def growing(x: np.ndarray, w: np.ndarray, order: int, discard: bool = False) -> GrowingKl:
    if order == 0:
        return AllNeighborsKl(x, w, k=3, discard_nearest=discard)
    return LthNeighborKl(x, w, order, k=3)


def test_the_worked_example() -> None:
    x, w = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [2.0]])
    assert kl_all_neighbors(x, w, k=1) == pytest.approx(-0.5404321, abs=5e-8)
    # By hand: log distances to W are log .5, log 2; log .5, log 1; log 2.5, log 1; inside X the
    # nearest are at 1, 1, 2. Order 1: (log .5 + log .5 + log 1 - log 2)/3 + log(2/2).
    assert kl_lth_neighbor(x, w, 1, 1) == pytest.approx(-math.log(2) + 0.0, abs=1e-7)
    assert kl_lth_neighbor(x, w, 2, 1) == pytest.approx(
        (math.log(2) + math.log(2.5) - math.log(2)) / 3 + math.log(0.5), abs=1e-7
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(5, 12), st.integers(2, 8), st.integers(1, 4))
def test_both_estimates_are_the_literal_sums(seed: int, n: int, m: int, k: int) -> None:
    x, w = samples(seed, n, m)
    tx, tw = torch.tensor(x), torch.tensor(w)
    # float64 against float64: sums of some hundred logarithms.
    for discard in (0, 1):
        ours = kl_all_neighbors(x, w, k, bool(discard))
        assert ours == pytest.approx(float(literal(tx, tw, 0, k, discard)), rel=1e-12, abs=1e-12)
    order = 1 + seed % m
    ours = kl_lth_neighbor(x, w, order, k)
    assert ours == pytest.approx(float(literal(tx, tw, order, k)), rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_the_published_estimate_is_the_mean_over_all_orders(seed: int) -> None:
    x, w = samples(seed)
    orders = [kl_lth_neighbor(x, w, order, 3) for order in range(1, len(w) + 1)]
    assert kl_all_neighbors(x, w, 3) == pytest.approx(np.mean(orders), rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([0, 1, 2, 4]))
def test_order_place_scale_and_rotation_change_nothing(seed: int, order: int) -> None:
    draw = np.random.default_rng(seed)
    x, w = samples(seed)
    rotation, _ = np.linalg.qr(draw.normal(size=(3, 3)))
    scale, shift = float(draw.uniform(0.5, 50)), draw.normal(size=3) * 20

    def moved(rows: np.ndarray) -> np.ndarray:
        return draw.permutation(rows) @ rotation * scale + shift

    before, after = growing(x, w, order).value, growing(moved(x), moved(w), order).value
    # The constant 1e-8 beside distances of 0.1 and more is what scales.
    assert after == pytest.approx(before, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([0, 1, 2, 5]), st.booleans())
def test_growing_is_the_literal_estimate_at_every_step(
    seed: int, order: int, discard: bool
) -> None:
    x, w = samples(seed, m=6)
    more = np.random.default_rng(seed + 1).normal(size=(4, 3))
    kl = growing(x, w, order, discard)
    for row in more:
        after = np.concatenate([w, row[None]])
        if order == 0:
            expected = kl_all_neighbors(x, after, 3, discard)
        else:
            expected = kl_lth_neighbor(x, after, order, 3)
        assert kl.value_with(row) == pytest.approx(expected, rel=1e-11, abs=1e-11)
        kl.add(row)
        w = after
        assert kl.m == len(w)
        assert kl.value == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_the_increment_identity_of_the_published_estimate() -> None:
    x, w = samples(3)
    g, (n, d), m, k = x[0] + 0.3, x.shape, len(w), 3

    def constant(m: int) -> float:
        return math.log(k * m / (n - 1)) - math.lgamma(m + 1) / m

    to_w = np.log(np.linalg.norm(x[:, None] - w, axis=2) + 1e-8).mean()
    to_g = np.log(np.linalg.norm(x - g, axis=1) + 1e-8).mean()
    expected = d / (m + 1) * (to_g - to_w) + constant(m + 1) - constant(m)
    increment = kl_all_neighbors(x, np.concatenate([w, g[None]]), k) - kl_all_neighbors(x, w, k)
    assert increment == pytest.approx(expected, rel=1e-10)


class TestGradient:
    def test_of_the_published_estimate_has_a_closed_form_without_w(self) -> None:
        (x, w), v = samples(5), np.array([0.4, -0.2, 0.9])
        other = np.random.default_rng(9).normal(size=w.shape) * 30
        away = v - x
        form = x.shape[1] / (len(w) + 1) * (away / (away**2).sum(1, keepdims=True)).mean(axis=0)
        for start in (w, other):
            gradient, total = growing(x, start, 0).gradient(v)
            np.testing.assert_allclose(gradient, form, rtol=1e-6)
            # Σ c_i (v - x_i) with positive c is total (v - a mean of X).
            mean = v - gradient / total
            assert (x.min(axis=0) <= mean).all() and (mean <= x.max(axis=0)).all()

    @pytest.mark.parametrize("order", [0, 1, 2, 5])
    @pytest.mark.parametrize("discard", [False, True])
    @pytest.mark.parametrize("seed", range(4))
    def test_is_that_of_autograd_and_of_differences(
        self, order: int, discard: bool, seed: int
    ) -> None:
        x, w = samples(seed, n=12)
        kl = growing(x, w, order, discard)
        v = np.random.default_rng(seed).normal(size=3)
        variable = torch.tensor(v, requires_grad=True)
        grown = torch.cat([torch.tensor(w), variable[None]])
        (by_torch,) = torch.autograd.grad(
            literal(torch.tensor(x), grown, order, 3, int(discard)), variable
        )
        gradient, _ = kl.gradient(v)
        np.testing.assert_allclose(gradient, by_torch.numpy(), rtol=1e-9, atol=1e-12)
        steps = 1e-6 * np.eye(3)
        numeric = [(kl.value_with(v + h) - kl.value_with(v - h)) / 2e-6 for h in steps]
        # Central differences: error h² times third derivatives, and 1e-15 / h of rounding.
        np.testing.assert_allclose(gradient, numeric, atol=1e-7)

    def test_of_the_lth_neighbour_depends_on_what_is_selected(self) -> None:
        x, _ = samples(7, n=30)
        far, near = np.full((6, 3), 9.0), x[:6]
        v = x.mean(axis=0)
        assert np.linalg.norm(growing(x, far, 1).gradient(v)[0]) > 0.05
        covered = np.concatenate([near, np.repeat(x, 1, axis=0)])
        gradient, total = growing(x, covered, 1).gradient(v)
        assert total == 0 and not gradient.any()

    def test_is_zero_at_a_row_of_the_target(self) -> None:
        x = np.array([[0.0], [1.0], [3.0], [7.0]])
        gradient, _ = AllNeighborsKl(x, np.array([[5.0]]), k=1).gradient(np.array([1.0]))
        # The row itself is at the least distance, which has no gradient; the others are left.
        assert gradient[0] == pytest.approx(1 / 8 * (1 - 1 / 2 - 1 / 6), rel=1e-6)


def test_equal_rows_have_the_least_distance() -> None:
    x, least = np.repeat([[2.0, 1.0], [0.0, 0.0]], 4, axis=0), math.log(1e-5 + 1e-8)
    by_hand = 2 * (least + math.log(5**0.5 + 1e-8)) / 2 - 2 * least + math.log(1 / 7)
    assert kl_all_neighbors(x, x[:1], k=1) == pytest.approx(by_hand, rel=1e-12)


def test_too_few_rows_are_said() -> None:
    x, w = samples(0)
    with pytest.raises(ValueError, match="k=9 nearest neighbours inside a target set of 9 rows"):
        kl_all_neighbors(x, w, k=9)
    with pytest.raises(ValueError, match="a start of 6 rows where the estimate needs 7"):
        kl_lth_neighbor(x, w, order=7)
    with pytest.raises(ValueError, match="a start of 1 rows where the estimate needs 2"):
        AllNeighborsKl(x, w[:1], discard_nearest=True)
