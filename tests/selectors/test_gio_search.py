"""GIO's search and its criteria: the checks of the paper's experiments, and that each one ends."""

import numpy as np
import pytest

from curate.selectors.gio_search import Descent, Found, Objective, search
from curate.selectors.gio_stop import CRITERIA, Limits, MeantStop, PublishedStop
from curate.selectors.kl import kl_all_neighbors, kl_lth_neighbor
from curate.selectors.quantise import quantise
from curate.selectors.vectors import ArrayVectors

VARIANTS = ["official", "l-nn"]
TOLERANT = {"official": "increase", "l-nn": "sequential_increase_tolerance"}


def gaussian(seed: int, mean: tuple[float, float], rows: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal(mean, 0.5 * np.eye(2), rows)


def run(
    pool: np.ndarray,
    target: np.ndarray,
    variant: str = "official",
    v_init: str = "mean",
    limits: Limits | None = None,
    start: np.ndarray | None = None,
    **objective: int,
) -> Found:
    if start is None:
        start = np.random.default_rng(0).uniform(0, 8, (100, 2))
    limits = limits or Limits(TOLERANT[variant], None)
    made = Objective(variant, **objective)
    return search(pool, target, start, made, Descent(v_init), limits, np.random.default_rng(0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("v_init", ["mean", "jump", "prev_opt"])
class TestThePublishedChecks:
    """experiments/checks: 100 points of N((3, 4), 0.5 I), start uniform on [0, 8]²."""

    def test_self_consistency(self, variant: str, v_init: str) -> None:
        pool, target = gaussian(1, (3, 4)), gaussian(5, (3, 4))
        found = run(pool, target, variant, v_init)
        # What is chosen of a sample of the same distribution is no further from the target than
        # that sample (0.15, 100 rows): the estimator's own error at this size.
        assert len(found.rows) >= 30
        assert kl_all_neighbors(target, pool[found.rows]) < 0.16
        assert found.trace[-1] < found.trace[0] - 0.5

    def test_negative_consistency(self, variant: str, v_init: str) -> None:
        found = run(gaussian(1, (300, 400)), gaussian(5, (3, 4)), variant, v_init, Limits())
        assert found.rows == [] and found.stopped == "increase"
        assert found.refused is not None and found.refused > found.trace[0]

    def test_of_two_clouds_the_targets_own_is_chosen(self, variant: str, v_init: str) -> None:
        pool = np.concatenate([gaussian(1, (3, 4)), gaussian(2, (7, 7))])
        found = run(pool, gaussian(5, (3, 4)), variant, v_init)
        assert found.rows and max(found.rows) < 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantisation_consistency(variant: str) -> None:
    """What centroids choose, exploded, is as close to the target as what rows choose."""
    pool, target = gaussian(1, (3, 4), 3000), gaussian(5, (3, 4), 1000)
    clusters = quantise(ArrayVectors(pool), 100, 1)
    goal = quantise(ArrayVectors(target), 100, 2).centroids
    found = run(clusters.centroids, goal, variant, "prev_opt")
    exploded = pool[np.isin(clusters.cluster, found.rows)]
    assert len(exploded) > 300
    # Near 0 (clusters of the tails are missing); uniform points on [0, 8]² are at 1.5 and more.
    assert kl_lth_neighbor(target, exploded) < 0.2
    assert kl_all_neighbors(target, np.random.default_rng(0).uniform(0, 8, (300, 2))) > 1.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trace_is_the_divergence_of_what_is_selected(variant: str) -> None:
    pool, target, start = gaussian(1, (3, 4), 40), gaussian(5, (3, 4), 30), gaussian(9, (5, 5), 8)
    found = run(pool, target, variant, start=start, limits=Limits("never", 10))
    estimate = kl_all_neighbors if variant == "official" else kl_lth_neighbor
    for step, kl in enumerate(found.trace):
        w = np.concatenate([start, pool[found.rows[:step]]])
        assert kl == pytest.approx(estimate(target, w), rel=1e-10, abs=1e-10)
    assert len(set(found.rows)) == len(found.rows)


def test_the_order_of_rows_changes_the_numbers_alone() -> None:
    pool, target = gaussian(1, (3, 4)), gaussian(5, (3, 4))
    order = np.random.default_rng(3).permutation(100)
    # A small scale: the published one makes the descent chaotic (see test_gio_published).
    descent, limits = Descent(scale_factor=1.0), Limits("increase", 40)
    start = np.random.default_rng(0).uniform(0, 8, (100, 2))
    draws = [np.random.default_rng(0) for _ in range(2)]
    one = search(pool, target, start, Objective(), descent, limits, draws[0])
    mixed = search(pool[order], target[::-1], start, Objective(), descent, limits, draws[1])
    assert order[mixed.rows].tolist() == one.rows


def test_scale_and_rotation_of_everything_change_nothing() -> None:
    pool, target = gaussian(1, (3, 4)), gaussian(5, (3, 4))
    start = np.random.default_rng(0).uniform(0, 8, (100, 2))
    turn, shift = np.array([[0.6, -0.8], [0.8, 0.6]]) * 7, np.array([50.0, -20.0])
    moved = [rows @ turn + shift for rows in (pool, target, start)]
    limits = Limits("never", 15)
    for variant, scale in (("official", 1.0), ("l-nn", None)):
        # The published automatic scale is ‖v‖ times something, which a translation changes; and a
        # smaller one keeps the descent from being chaotic. Gradients fall as 1 / length.
        descents = [Descent(scale_factor=s) for s in (scale, scale and scale * 49)]
        found = [
            search(*rows, Objective(variant), descent, limits, np.random.default_rng(0))
            for rows, descent in zip([(pool, target, start), moved], descents, strict=True)
        ]
        assert found[0].rows == found[1].rows


def test_ties_go_to_the_first_row() -> None:
    pool = np.repeat(gaussian(1, (3, 4), 5), 3, axis=0)
    found = run(pool, gaussian(5, (3, 4)), limits=Limits("never", 15))
    seen: dict[int, int] = {}
    for row in found.rows:  # of three equal rows always the first that is left
        assert row % 3 == seen.get(row // 3, 0)
        seen[row // 3] = row % 3 + 1


FALLING = [10.0 - 0.1 * i for i in range(60)]


class TestCriteria:
    """Each criterion on divergences given by hand: what is accepted, and what ends it."""

    def judged(self, stop: MeantStop | PublishedStop, trace: list[float]) -> tuple[str, str]:
        """Play divergences; return a letter for each step (a, r or x) and the reason."""
        said, before = "", trace[0]
        for kl in trace[1:]:
            verdict = stop.judge(kl, before)
            said += "a" if verdict.is_accepted else "r" if verdict.then == "reset" else "x"
            before = kl if verdict.is_accepted else before
            if verdict.then == "stop":
                return said, verdict.reason
        return said, ""

    @pytest.mark.parametrize(
        ("limits", "trace", "meant", "published"),
        [
            (Limits("increase"), [5, 4, 3, 3, 3.5, 1], "aaax", "aaax"),
            # Two rises are tolerated, the third in a row is not; published: never counted.
            (
                Limits("sequential_increase_tolerance", max_sequential_increases=2),
                [5, 6, 7, 4, 5, 6, 7, 8],
                "aaaaax",
                "aaaaaaa",
            ),
            (
                Limits("sequential_increase_tolerance", max_sequential_increases=0),
                [5, 6, 7],
                "x",
                "x",
            ),
            # Two rises bring the pool back, the third ends it; published: accepted.
            (Limits("max_resets", max_resets=2), [5, 6, 4, 5, 3, 4], "rarax", "aaaaa"),
            (Limits("max_resets", max_resets=0), [5, 4, 6], "ax", "ax"),
            (Limits("increase", resets_allowed=True, max_resets=1), [5, 6, 6, 4], "rx", "rx"),
            (Limits("min_difference", min_difference=0.5), [5, 4, 3.6, 3], "ax", "ax"),
            # The row that reaches it is kept; published: left out.
            (Limits("min_kl", min_kl=3.5), [5, 4, 3, 2], "aa", "ax"),
            (Limits("data_size", max_data_size=0.3), FALLING, "aaa", "aaaax"),
            (Limits("never", max_iter=4), FALLING, "aaaa", "aaaaax"),
            (Limits("never", max_iter=None), FALLING, "a" * 59, "a" * 59),
        ],
    )
    def test_fires(self, limits: Limits, trace: list[float], meant: str, published: str) -> None:
        for stop, expected in (
            (MeantStop(limits, 10), meant),
            (PublishedStop(limits, 10), published),
        ):
            said, reason = self.judged(stop, trace)
            assert said == expected
            if len(said) < len(trace) - 1:
                named = "max_iter" if limits.criterion == "never" else limits.criterion
                assert reason == named

    @pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "never"])
    def test_ends_a_search_of_ours(self, criterion: str) -> None:
        # Divergences rise at last in any pool of two clouds.
        pool = np.concatenate([gaussian(1, (3, 4), 60), gaussian(2, (30, 30), 60)])
        numbers = {"min_difference": 1e-3, "min_kl": 1.5, "max_data_size": 0.1}
        limits = Limits(criterion, None, **numbers)  # type: ignore[arg-type]
        found = run(pool, gaussian(5, (3, 4)), "l-nn", "mean", limits)
        assert found.stopped == criterion
        assert len(found.rows) < 120
        if criterion == "max_resets":
            assert found.resets == 2
        if criterion == "data_size":
            assert len(found.rows) == 12
        if criterion == "min_kl":
            assert found.trace[-1] < 1.5 <= found.trace[-2]

    def test_max_iter_is_one_more_as_published(self) -> None:
        pool, target = gaussian(1, (3, 4)), gaussian(5, (3, 4))
        limits = Limits("never", 7)
        assert len(run(pool, target, "official", limits=limits).rows) == 8
        assert len(run(pool, target, "l-nn", limits=limits).rows) == 7

    def test_the_pool_ends_a_search_too(self) -> None:
        found = run(gaussian(1, (3, 4), 6), gaussian(5, (3, 4)), limits=Limits("never", None))
        assert sorted(found.rows) == list(range(6)) and found.stopped == "pool"

    def test_a_reset_brings_rows_back(self) -> None:
        limits = Limits("increase", 60, resets_allowed=True, max_resets=2)
        pool, target = gaussian(1, (3, 4), 20), gaussian(5, (3, 4))
        far = np.concatenate([pool, gaussian(2, (90, 90), 1)])
        found = run(far, target, "official", limits=limits)
        assert found.resets == 2 and len(found.rows) > len(set(found.rows))


def test_bad_settings_are_said() -> None:
    with pytest.raises(ValueError, match="unknown stop 'never again'; choose from: increase"):
        Limits("never again")
    with pytest.raises(ValueError, match="unknown variant 'ours'; choose from: official, l-nn"):
        Objective("ours")
    with pytest.raises(ValueError, match="unknown v_init 'median'"):
        Descent("median")
    with pytest.raises(ValueError, match="neighbor=L is a setting of l-nn"):
        Objective("official", neighbor=3)
    with pytest.raises(ValueError, match="in l-nn choose neighbor=2"):
        Objective("l-nn", discard_nearest_for_xy=True)
    with pytest.raises(ValueError, match=r"share in \(0, 1\], not 2"):
        Limits(max_data_size=2)
    with pytest.raises(ValueError, match="k=5 nearest neighbours inside a target set of 3 rows"):
        run(gaussian(1, (3, 4)), gaussian(5, (3, 4), 3))
