"""Weights drawn from a Dirichlet distribution around those of RENT: DWS."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.special import gammaincinv, gammaln

from curate.selectors.keyed import row_bits
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.rent import Rent
from curate.selectors.vectors import VectorTable

SMALL = 1e-20  # below it the first term of the series is exact


@dataclass(frozen=True)
class Dws(Rent):
    """Loss weights drawn from Dirichlet(alpha w), w the weights of `rent` over all rows.

    Bae et al. 2024 (ICLR, section 3): their mean is w / sum w; alpha towards infinity gives w
    itself (reweighting), alpha towards 0 all weight to one row (resampling one). Drawn once, a
    function of (seed, shard, row), where theirs are drawn for every batch. The settings are those
    of `rent`. Each is a Gamma(alpha w) variable by inversion, over the sum of all rows'.
    """

    alpha: float | int = field(default=1.0, kw_only=True)
    weight_kind: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not is_number or not 0 < self.alpha < np.inf:
            raise ValueError(f"alpha must be a number above 0, not {self.alpha!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        values, params = self.weights(table)
        key = int(rng.bit_generator.random_raw())
        drawn = gammas(self.alpha * values, uniforms(table, key))
        total = float(np.nansum(drawn))
        drawn = drawn / total if total > 0 else drawn  # a point of the simplex over all rows
        return self.weighed(table, drawn, budget, rng, params, self.weight_kind)


def gammas(
    shapes: Float64[ndarray, " n"], uniform: Float64[ndarray, " n"]
) -> Float64[ndarray, " n"]:
    """Return Gamma(shape) variables by inversion, divided by the largest; NaN for the shape NaN.

    Small shapes give numbers such as u^(1/shape), too small for any float: they are compared by
    their logarithms, so that the largest is 1 whatever the shapes. All 0 if all shapes are.
    """
    found = np.where(np.isnan(shapes), np.nan, 0.0)
    positive = shapes > 0
    if not positive.any():
        return np.asarray(found)
    shape, u = shapes[positive], uniform[positive]
    plain = gammaincinv(shape, u)
    # P(a, x) = x^a / Gamma(a + 1) up to a factor 1 - x.
    near_zero = (np.log(u) + gammaln(shape + 1)) / shape
    logs = np.where(plain > SMALL, np.log(np.maximum(plain, SMALL)), near_zero)
    found[positive] = np.exp(logs - logs.max())
    return np.asarray(found)


def uniforms(table: Table, key: int) -> Float64[ndarray, " n"]:
    """Return a number in (0, 1) for each row, a function of the key and its shard and row."""
    parts = [np.empty(0)]
    for batch in table.scan(["shard", "row"]):
        shard, row = (batch.column(name).to_numpy() for name in ("shard", "row"))
        bits = row_bits(key, shard, row) >> np.uint64(11)
        parts.append((bits.astype(np.float64) + 0.5) * 2.0**-53)
    return np.concatenate(parts)
