"""Intervals and paired tests for results over a few seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.stats import t as student

EXACT_FLIPS = 16
"""Up to this many pairs every assignment of signs is tried (65 536 of them)."""
SAMPLED_FLIPS = 100_000

Verdict = Literal["better", "worse", "no difference found"]


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its two-sided t interval; null half width for one value."""

    mean: float
    half_width: float | None

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)


def mean_interval(values: Sequence[int | float], level: float = 0.95) -> Interval:
    """Return the mean with its Student t interval, `mean ± t_{n-1} s / sqrt(n)`."""
    if not values:
        raise ValueError("an interval needs at least one value")
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 1:
        return Interval(float(x[0]), None)
    quantile = float(student.ppf(0.5 + level / 2, len(x) - 1))
    return Interval(float(x.mean()), quantile * float(x.std(ddof=1)) / len(x) ** 0.5)


@dataclass(frozen=True)
class PairedTest:
    """How two results differ over the same seeds.

    `difference` is the mean of a - b with its 95 % t interval; `p_t` is the paired t test's
    two-sided p, `p_flip` that of the sign-flip permutation test, which assumes only that a
    difference is as likely to point either way. With n pairs `p_flip` cannot fall below 2^(1-n):
    five seeds or fewer never reach 0.05. Both are null for a single pair.
    """

    difference: float
    half_width: float | None
    p_t: float | None
    p_flip: float | None
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """What the t interval says of a against b, where higher is better."""
        if self.half_width is None or abs(self.difference) <= self.half_width:
            return "no difference found"
        return "better" if self.difference > 0 else "worse"


def paired_test(a: Sequence[int | float], b: Sequence[int | float]) -> PairedTest:
    """Return the paired comparison of `a` against `b`, value by value.

    Differences that are all equal have no spread: p_t is then 0, or 1 where they are all zero.

    Raises:
        ValueError: the two have different lengths, or are empty.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired test needs equal, non-zero counts; got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = mean_interval(differences.tolist())
    if interval.half_width is None:
        return PairedTest(interval.mean, None, None, None, 1)
    return PairedTest(
        interval.mean,
        interval.half_width,
        _t_probability(differences),
        _flip_probability(differences),
        len(differences),
    )


def _t_probability(differences: np.ndarray) -> float:
    n = len(differences)
    error = float(differences.std(ddof=1)) / n**0.5
    mean = abs(float(differences.mean()))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student.sf(mean / error, n - 1))


def _flip_probability(differences: np.ndarray) -> float:
    """Return the share of sign assignments whose |sum| is at least the one seen."""
    sizes = np.abs(differences)
    # Sums of the same numbers in another order differ in the last bits: they count as ties.
    bar = abs(float(differences.sum())) - 1e-12 * float(sizes.sum())
    if len(sizes) <= EXACT_FLIPS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(sizes))))
        return float(np.mean(np.abs(signs @ sizes) >= bar))
    rng = np.random.default_rng(0)
    as_large = 1
    for _ in range(SAMPLED_FLIPS // 1000):
        signs = rng.choice((-1.0, 1.0), size=(1000, len(sizes)))
        as_large += int(np.count_nonzero(np.abs(signs @ sizes) >= bar))
    return as_large / (SAMPLED_FLIPS + 1)
