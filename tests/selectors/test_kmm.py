"""Kernel mean matching: its limits, its optimality, and what clusters change."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr

from curate.selectors.clustered import clustered, median_distance
from curate.selectors.kernel_matching import gaussian_kernel, match
from curate.selectors.kmm import Kmm
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors

pytest.importorskip("faiss")

EVERYTHING = Budget("fraction", 1.0)


def shifted(n=120, t=80, shift=1.0, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, 1)), draw.normal(shift, 0.7, size=(t, 1))


@pytest.mark.parametrize("double", [1, 4])
def test_the_same_set_twice_leaves_nothing_at_weights_of_one(double):
    """ALGORITHMS 5.5: train = test has the objective 0 at beta = alpha = 1."""
    points = np.random.default_rng(0).normal(size=(60, 3))
    found = match(points, points, 1.0, double=double)
    # The objective scaled by n is solved to 1e-8.
    assert found.objective < 1e-9
    if double == 1:
        np.testing.assert_allclose(found.beta, 1.0, atol=1e-3)
        assert (found.alpha == 1).all()


def test_weights_follow_the_ratio_of_two_normal_densities():
    source, target = shifted(400, 400)
    found = match(source, target, 0.5, bound=20)
    ratio = norm.pdf(source[:, 0], 1, 0.7) / norm.pdf(source[:, 0])
    both = np.abs(source[:, 0] - 0.5) < 1.5  # where both have mass
    # Single weights are noisy (a mean is matched, not the ratio): compare means over bins.
    bins = np.digitize(source[both, 0], np.linspace(-1, 2, 9))
    mine, theirs = (
        [np.mean(x[both][bins == b]) for b in np.unique(bins)] for x in (found.beta, ratio)
    )
    assert spearmanr(mine, theirs).statistic > 0.9
    np.testing.assert_allclose(mine, theirs, rtol=0.3, atol=0.15)  # some 30 rows a bin


@pytest.mark.parametrize("double", [1.0, 2.0, 9.0])
def test_nothing_that_is_allowed_is_nearer(double):
    """Against SciPy's sequential quadratic programming on a small case, and the constraints."""
    source, target = shifted(14, 10, shift=2.0)
    n, t, bound, slack = 14, 10, 3.0, 0.1
    found = match(source, target, 0.8, bound, double, slack)
    kernel = gaussian_kernel(np.vstack([source, target]), 0.8)
    mass = np.r_[np.full(n, 1 / n), np.full(t, -1 / t)]
    form = mass[:, None] * kernel * mass
    radius = 1 - 1 / np.sqrt(double)
    gap = {"type": "ineq", "fun": lambda x: slack**2 - (x @ mass) ** 2}
    ball = {"type": "ineq", "fun": lambda x: radius**2 * t - np.sum((x[n:] - 1) ** 2) + 1e-15}
    best = minimize(
        lambda x: 1e3 * x @ form @ x,
        np.ones(n + t),
        jac=lambda x: 2e3 * form @ x,
        bounds=[(0, bound / np.sqrt(double))] * n + [(0, 1)] * t,
        constraints=[gap] if double == 1 else [gap, ball],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    if double == 1:  # alpha is fixed by bounds, not by a ball without an inside
        best = minimize(
            lambda b: 1e3 * np.r_[b, np.ones(t)] @ form @ np.r_[b, np.ones(t)],
            np.ones(n),
            bounds=[(0, bound)] * n,
            constraints=[{"type": "ineq", "fun": lambda b: slack - abs(b.mean() - 1)}],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
    assert found.objective <= best.fun / 1e3 + 1e-8
    beta, alpha = found.beta, found.alpha
    assert (beta >= 0).all() and (beta <= bound / np.sqrt(double) + 1e-9).all()
    assert (alpha >= 0).all() and (alpha <= 1).all()
    assert abs(beta.mean() - alpha.mean()) <= slack + 1e-6
    assert np.sqrt(np.mean((alpha - 1) ** 2)) <= radius + 1e-6


def test_more_freedom_for_the_target_is_never_farther():
    source, target = shifted(60, 40, shift=3.0)
    left = [match(source, target, 0.7, 1000, d).objective for d in (1, 2, 4, 16)]
    assert (np.diff(left) <= 1e-8).all()
    covered = match(source, target, 0.7, 1000, 16).alpha
    # Target rows beyond the corpus lose most.
    far = target[:, 0] > 3.5
    assert covered[far].mean() < covered[~far].mean()


def test_order_of_rows_moves_the_weights_with_them():
    source, target = shifted(50, 30)
    shuffle = np.random.default_rng(1).permutation(50)
    plain, moved = match(source, target, 0.3), match(source[shuffle], target, 0.3)
    assert moved.objective == pytest.approx(plain.objective, abs=1e-9)


def test_clusters_move_the_mean_by_no_more_than_they_say():
    draw = np.random.default_rng(3)
    source, target = draw.normal(size=(900, 2)), draw.normal(0.7, 1, size=(300, 2))
    few = clustered(ArrayVectors(source), 60, seed=0)
    aim = clustered(ArrayVectors(target), 1000, seed=0)
    assert len(few.centres) <= 60 and few.shares.sum() == pytest.approx(1)
    assert not aim.away.any() and aim.rows == 300
    found = match(few.centres, aim.centres, 1.0, source_shares=few.shares)
    off = few.moved(found.beta, 1.0)
    mass = np.r_[found.beta[few.cluster] / 900, -found.alpha / 300]
    on_rows = mass @ gaussian_kernel(np.vstack([source, target]), 1.0) @ mass
    assert abs(np.sqrt(on_rows) - np.sqrt(found.objective)) <= off + 1e-6
    nearest = np.linalg.norm(source[:, None] - few.centres[None], axis=2).min(axis=1)
    np.testing.assert_allclose(few.away, nearest, atol=1e-3)


def test_the_median_distance():
    assert median_distance(np.array([[0.0], [1.0]]), np.array([[3.0]])) == 2.0
    assert median_distance(np.zeros((1, 2)), np.zeros((4, 2))) == 1.0


@pytest.fixture
def table(make_table):
    source, target = shifted(60, 40)
    source[5] = np.nan
    made = make_table(np.zeros(60), errors=[7])
    made.vectors = ArrayVectors(source)
    made.target = ArrayVectors(np.vstack([target, [[np.nan]]]))
    return made


def run(table, budget=EVERYTHING, seed=0, **settings):
    selection = Kmm(**settings).select(table, budget, np.random.default_rng(seed))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(zero_copy_only=False), selection.params


def test_all_rows_of_the_table_are_weighed(table):
    place, weight, params = run(table)
    assert place.tolist() == [i for i in range(60) if i not in (5, 7)]
    source = np.float32(table.vectors.array[place]).astype(np.float64)
    target = np.float32(table.target.array[:40]).astype(np.float64)
    sigma = median_distance(source, target)
    wanted = match(source, target, sigma)
    np.testing.assert_allclose(weight, wanted.beta, atol=1e-5)
    assert params["weight_kind"] == "loss" and "alpha" not in params
    assert params["objective"] == pytest.approx(wanted.objective)
    assert params["kernel_width"] == sigma
    before, after = source.mean(), np.average(source[:, 0], weights=weight)
    assert abs(after - target.mean()) < 0.2 * abs(before - target.mean())


def test_clusters_share_a_weight_and_a_draw_follows_the_weights(table):
    place, weight, params = run(table, points=8, D=2.0)
    assert len(np.unique(weight)) <= 8 and params["quantisation"] > 0
    assert 0 <= params["alpha"]["least"] <= params["alpha"]["mean"] <= 1
    means = []
    for seed in range(20):
        place, weight, _ = run(table, Budget("rows", 5), seed, use="draw")
        assert len(place) == 5 and np.isnan(weight.astype(float)).all()
        means.append(table.vectors.array[place].mean())
    # The corpus has its mean at 0, the target at 1; five of 58 rows do not exhaust the likely ones.
    assert np.mean(means) > 0.6


@pytest.mark.parametrize(("double", "slack"), [(1, 0.2), (4, 0.0), (100, 0.05)])
def test_a_bound_that_leaves_no_weights_is_refused(double, slack):
    """All beta at bound / sqrt(D) and all alpha at 1 / sqrt(D) are as near as means can be."""
    source, target = shifted(14, 10)
    least = 1 - slack * np.sqrt(double)
    with pytest.raises(ValueError, match="raise bound or slack"):
        match(source, target, 0.8, least - 0.01, double, slack)
    beta = match(source, target, 0.8, least + 0.01, double, slack).beta
    np.testing.assert_allclose(beta, least / np.sqrt(double), atol=0.15 / np.sqrt(double))


def test_wrong_settings_are_refused():
    for settings_, said in (
        ({"D": 0.5}, "D must be a number of at least 1"),
        ({"bound": 0}, "bound must be"),
        ({"sigma": 0.0}, "sigma must be"),
        ({"slack": -1.0}, "slack must be a number of at least 0"),
        ({"points": 1}, "points must be"),
        ({"use": "both"}, "use must be"),
        ({"unbiased": True}, "choose one"),
    ):
        with pytest.raises(ValueError, match=said):
            Kmm(**settings_)
