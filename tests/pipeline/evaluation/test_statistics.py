"""Intervals and paired tests against closed forms, brute force and scipy."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curate.pipeline.evaluation.statistics import mean_interval, paired_test

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))


def test_interval_of_two_values_by_hand():
    # t_{0.975, 1} = tan(0.475 pi) = 12.7062; s / sqrt(2) = |a - b| / 2.
    interval = mean_interval([0.0, 2.0])
    assert interval.mean == 1.0
    assert interval.half_width == pytest.approx(np.tan(0.475 * np.pi))
    assert (interval.low + interval.high) / 2 == pytest.approx(1.0)


@given(st.lists(NUMBERS, min_size=3, max_size=12), st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_agrees_with_scipy(values, level):
    interval = mean_interval(values, level)
    if np.std(values) < 1e-9:
        assert interval.half_width == pytest.approx(0, abs=1e-8)
        return
    low, high = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_one_value_has_no_interval():
    assert mean_interval([0.7]).half_width is None
    assert mean_interval([0.7]).low == 0.7


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=8))
def test_paired_t_agrees_with_scipy(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    differences = np.subtract(a, b)
    if np.std(differences) < 1e-6:
        return
    result = paired_test(a, b)
    assert result.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-7, abs=1e-12)
    assert result.difference == pytest.approx(differences.mean())


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=8))
def test_sign_flips_agree_with_counting_in_integers(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    differences = [x - y for x, y in pairs]
    seen = abs(sum(differences))
    flips = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    assert paired_test(a, b).p_flip == sum(f >= seen for f in flips) / len(flips)


def test_sign_flips_agree_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 9), rng.normal(0, 1, 9)
    peer = stats.permutation_test(
        (a - b,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired_test(a.tolist(), b.tolist()).p_flip == pytest.approx(peer.pvalue)


def test_sampled_flips_approach_the_exact_tail():
    # 20 differences of one size: |sum| = 12 is 16 against 4, a binomial tail in closed form.
    differences = [1.0] * 16 + [-1.0] * 4
    exact = 2 * stats.binom.sf(15, 20, 0.5)
    assert paired_test(differences, [0.0] * 20).p_flip == pytest.approx(exact, rel=0.1)


def test_five_equal_signs_cannot_fall_below_one_sixteenth():
    assert paired_test([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]).p_flip == 2 / 32


def test_equal_results_show_no_difference():
    result = paired_test([0.5, 0.6], [0.5, 0.6])
    assert (result.p_t, result.p_flip, result.verdict) == (1.0, 1.0, "no difference found")


def test_verdict_names_the_direction():
    assert paired_test([2.0, 2.1, 2.2], [1.0, 1.0, 1.1]).verdict == "better"
    assert paired_test([1.0, 1.0, 1.1], [2.0, 2.1, 2.2]).verdict == "worse"
    assert paired_test([1.0], [0.0]).verdict == "no difference found"


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6))
def test_swapping_sides_only_turns_the_sign(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    forward, backward = paired_test(a, b), paired_test(b, a)
    assert forward.difference == -backward.difference
    assert (forward.p_t, forward.p_flip) == (backward.p_t, backward.p_flip)


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="equal"):
        paired_test([1.0], [1.0, 2.0])
