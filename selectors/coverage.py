"""How well chosen rows stand for all: sum over rows of the similarity to the nearest chosen one.

Shapes: M rows to stand for, N candidates, K candidates looked at together, D dimensions.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from curate.selectors.vectors import Vectors

HELD_BYTES = 1 << 28
"""Similarities that take no more are computed once and held; else again when they are needed."""
BATCH = 32  # columns of similarities computed at once


class Coverage:
    """F(S) = sum_i max_{j in S} s_ij, where s_ij = 1/2 + cos_ij / 2, and what a row would add.

    Facility location: monotone, submodular, 0 for no row. `demand` are the rows i, `supply` the
    candidates j. Similarities are rounded to float32 from products in float64, sums in float64.
    Memory: at most HELD_BYTES for similarities, or the unit vectors of the demand a block at a
    time, and 8 bytes a row.
    """

    def __init__(self, supply: Vectors, demand: Vectors) -> None:
        self._supply, self._demand = supply, demand
        self.covered = np.zeros(demand.rows)
        """Each row's similarity to its nearest chosen row."""
        self._held: Float32[ndarray, "n m"] | None = None
        if supply.rows * demand.rows * 4 <= HELD_BYTES:
            self._held = np.empty((supply.rows, demand.rows), dtype=np.float32)
            for start in range(0, supply.rows, 1024):
                rows = np.arange(start, min(start + 1024, supply.rows))
                self._held[rows] = self._computed(rows)
        share = max(1, HELD_BYTES // (16 * max(1, demand.rows)))
        self.batch = 1 if self._held is not None else min(BATCH, share)

    def gains(self, rows: Int64[ndarray, " k"]) -> Float32[ndarray, " k"]:
        """Return what each candidate would add, rounded so that no noise tells equals apart."""
        added = np.empty(len(rows))
        for some in np.split(np.arange(len(rows)), range(self.batch, len(rows), self.batch)):
            for place, column in zip(some, self._similar(rows[some]), strict=True):
                added[place] = np.maximum(column - self.covered, 0).sum()
        return added.astype(np.float32)

    def add(self, row: int) -> None:
        """Choose a candidate."""
        np.maximum(self.covered, self._similar(np.array([row]))[0], out=self.covered)

    def mean(self) -> float:
        """Return F / M, the mean similarity of a row to its nearest chosen one."""
        return float(self.covered.mean())

    def _similar(self, rows: Int64[ndarray, " k"]) -> Float32[ndarray, "k m"]:
        return self._computed(rows) if self._held is None else self._held[rows]

    def _computed(self, rows: Int64[ndarray, " k"]) -> Float32[ndarray, "k m"]:
        theirs = _wide_units(self._supply.take(rows))
        found = np.empty((len(rows), self._demand.rows), dtype=np.float32)
        at = 0
        for block in self._demand.blocks():
            products = theirs @ _wide_units(block).T
            found[:, at : at + len(block)] = 0.5 + 0.5 * products
            at += len(block)
        return np.maximum(found, 0)


def _wide_units(block: Float32[ndarray, "b d"]) -> Float64[ndarray, "b d"]:
    wide = block.astype(np.float64)
    lengths = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.where(lengths > 0, lengths, 1))
