"""A keyed permutation of [0, n) that any process can evaluate, both ways, at any place.

Up to EXACT rows it sorts 64 random bits per row (uniform over all permutations, 16 bytes a row).
Beyond, a Feistel network over the next power of two, walked along its cycles until it falls inside
[0, n) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 3 and 4): no
memory, fewer than two evaluations a row on average.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.keyed import keyed64, stream_key

EXACT = 1 << 18
FEISTEL_ROUNDS = 6

Rows = Int64[ndarray, " n"]


@dataclass(frozen=True)
class Permutation:
    """A permutation of [0, n), a function of (n, key)."""

    n: int
    key: int

    def row_at(self, places: Rows) -> Rows:
        """Return the row that stands at each place."""
        if self.n <= EXACT:
            return np.asarray(_sorted(self.n, self.key)[0][places])
        return self._walked(places, self._forward)

    def place_of(self, rows: Rows) -> Rows:
        """Return the place at which each row stands."""
        if self.n <= EXACT:
            return np.asarray(_sorted(self.n, self.key)[1][rows])
        return self._walked(rows, self._backward)

    def _walked(self, start: Rows, step: Callable[[ndarray], ndarray]) -> Rows:
        found = step(start.astype(np.uint64))
        outside = np.flatnonzero(found >= self.n)
        while len(outside):
            found[outside] = step(found[outside])
            outside = outside[found[outside] >= self.n]
        return np.asarray(found.astype(np.int64))

    def _forward(self, x: ndarray) -> ndarray:
        low_bits, high_bits = self._halves()
        high, low = x >> np.uint64(low_bits), x & np.uint64((1 << low_bits) - 1)
        for i in range(0, FEISTEL_ROUNDS, 2):
            high = high ^ self._mixed(low, i, high_bits)
            low = low ^ self._mixed(high, i + 1, low_bits)
        return np.asarray((high << np.uint64(low_bits)) | low)

    def _backward(self, x: ndarray) -> ndarray:
        low_bits, high_bits = self._halves()
        high, low = x >> np.uint64(low_bits), x & np.uint64((1 << low_bits) - 1)
        for i in range(FEISTEL_ROUNDS - 2, -1, -2):
            low = low ^ self._mixed(high, i + 1, low_bits)
            high = high ^ self._mixed(low, i, high_bits)
        return np.asarray((high << np.uint64(low_bits)) | low)

    def _mixed(self, half: ndarray, i: int, bits: int) -> ndarray:
        bits64 = keyed64(stream_key(self.key, i), half)
        return np.asarray(bits64 >> np.uint64(64 - bits))

    def _halves(self) -> tuple[int, int]:
        bits = (self.n - 1).bit_length()
        return bits // 2, bits - bits // 2


@lru_cache(maxsize=16)
def _sorted(n: int, key: int) -> tuple[Rows, Rows]:
    rows = np.argsort(keyed64(key, np.arange(n, dtype=np.int64))).astype(np.int64)
    places = np.empty_like(rows)
    places[rows] = np.arange(n)
    return rows, places
