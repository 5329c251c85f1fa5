"""Sums that do not depend on the order or the grouping of what is added."""

from fractions import Fraction

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

_HALF = 27  # a double's 53 bits in two whole parts, each small enough to be counted exactly
_EXPONENTS = 2200


class ExactSum:
    """The exact sum of finite doubles, added in batches of up to 2^26.

    One integer per exponent is kept: batches, shards and workers in any order give the same sum,
    so whatever is derived from it is a function of the rows alone.
    """

    def __init__(self) -> None:
        self._parts = [[0] * _EXPONENTS, [0] * _EXPONENTS]

    def add(self, values: Float64[ndarray, " n"]) -> None:
        mantissa, exponent = np.frexp(values)
        high = np.trunc(np.ldexp(mantissa, _HALF))
        low = np.ldexp(mantissa, 2 * _HALF) - np.ldexp(high, _HALF)
        places, where = np.unique(exponent, return_inverse=True)
        for part, halves in zip(self._parts, (high, low), strict=True):
            # Whole numbers below 2^27 each, so the sums in float64 are exact.
            for place, total in zip(places.tolist(), np.bincount(where, halves), strict=True):
                part[place + _EXPONENTS // 2] += int(total)

    def exact(self) -> Fraction:
        """Return the sum, not rounded."""
        high, low = self._parts
        whole = 0  # in units of the smallest place
        for i in range(_EXPONENTS - 1, -1, -1):
            whole += ((high[i] << _HALF) + low[i]) << i
        return Fraction(whole, 1 << (2 * _HALF + _EXPONENTS // 2))

    def value(self) -> float:
        """Return the sum as the nearest double."""
        return float(self.exact())


class Moments:
    """Count, mean, standard deviation (population) and range of the finite values added."""

    def __init__(self) -> None:
        self.count = 0
        self.lowest, self.highest = np.inf, -np.inf
        self._sum, self._squares = ExactSum(), ExactSum()

    def add(self, values: Float64[ndarray, " n"]) -> None:
        """Count the finite values; their magnitude must stay below 1e150, as float32 does."""
        finite = values[np.isfinite(values)]
        if not len(finite):
            return
        self.count += len(finite)
        self.lowest = min(self.lowest, float(finite.min()))
        self.highest = max(self.highest, float(finite.max()))
        self._sum.add(finite)
        for part in _squares(finite):
            self._squares.add(part)

    @property
    def total(self) -> float:
        return self._sum.value()

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 of nothing."""
        return float(self._sum.exact() / max(1, self.count))

    @property
    def std(self) -> float:
        """The square root of the mean squared deviation, without cancellation; 0 of nothing."""
        if not self.count:
            return 0.0
        mean = self._sum.exact() / self.count
        variance = self._squares.exact() / self.count - mean**2
        return float(np.sqrt(max(0.0, float(variance))))


def _squares(values: Float64[ndarray, " n"]) -> list[Float64[ndarray, " n"]]:
    """Return doubles whose sum is the exact square, up to the underflow of the smallest."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32).astype(np.float64)
    if np.array_equal(narrow, values):
        return [values * values]  # 24 bits each: exact
    # Veltkamp's splitting into 26 and 27 bits (Dekker 1971): every product below is exact.
    scaled = values * 134217729.0
    high = scaled - (scaled - values)
    low = values - high
    return [high * high, 2 * high * low, low * low]
