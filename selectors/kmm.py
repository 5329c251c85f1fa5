"""Weights under which the corpus looks like a target to a kernel: kernel mean matching."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from curate.selectors.clustered import Clustered, clustered, median_distance
from curate.selectors.inner_products import target_mean
from curate.selectors.kernel_matching import Matching, from_least, match
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import VectorTable, finite_rows, part_of
from curate.selectors.weighing import Weighing

log = logging.getLogger("curate.selectors")


@dataclass(frozen=True)
class Kmm(Weighing):
    """Weights beta_i of rows for a small ||mean beta phi(x) - mean alpha phi(z)||² to a target z.

    `D=1` is kernel mean matching (Huang et al. 2007), alpha = 1. `D>1` is the double weighting of
    Segovia-Martín, Mazuelas and Liu 2023 (ICML), in which target rows that the corpus does not
    cover may lose weight; `selectors/kernel_matching.py` has the program, with its constraints:
    beta at most `bound` / sqrt(D), means apart by at most `slack` (by default 1 - 1/sqrt(n)).
    `sigma` is the kernel's width, by default the median distance between rows of the two sets (of
    up to 500 of each). Only beta is written; the mean and the least of alpha are recorded.

    Above `points` rows a set is replaced by that many centres of k-means (FAISS) with its rows'
    shares, and the rows of a cluster share its weight. The objective on all rows is then off by at
    most what is recorded: its root lies within `quantisation` = mean beta |phi(x) - phi(c(x))| plus
    the same of the target of the root of `objective`.

    Time `points`³ for the program; n · `points` · d to find the clusters. Memory: the vectors that
    k-means looks at (256 for each centre) and some 40 bytes a row.
    """

    D: float | int = 1.0
    bound: float | int = 1000.0
    sigma: float | int | None = None
    slack: float | int | None = None
    points: int = 1000
    uses_vectors: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("D", 1), ("bound", 0), ("sigma", 0), ("slack", 0)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is None and name in ("sigma", "slack"):
                continue
            if not is_number or not least <= value < np.inf or (not value and name != "slack"):
                wanted = "of at least 0" if name == "slack" else from_least(least)
                raise ValueError(f"{name} must be a number {wanted}, not {value!r}")
        if isinstance(self.points, bool) or self.points < 2:
            raise ValueError(f"points must be a whole number from 2, not {self.points!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        target_mean(table.target, table.vectors.dimension)  # says what is wrong with a target
        assert table.target is not None
        places = candidates(table).places
        seed = int(rng.bit_generator.random_raw()) >> 1
        source = clustered(part_of(table.vectors, places), self.points, seed)
        usable = np.flatnonzero(finite_rows(table.target))
        target = clustered(part_of(table.target, usable), self.points, seed)
        sigma = self.sigma or median_distance(source.centres, target.centres)
        found = match(
            source.centres,
            target.centres,
            sigma,
            self.bound,
            self.D,
            1 - 1 / np.sqrt(source.rows) if self.slack is None else self.slack,
            source.shares,
            target.shares,
        )
        values = np.full(table.rows, np.nan)
        values[places] = found.beta[source.cluster]
        params = self._said(found, source, target, sigma)
        return self.weighed(table, values, budget, rng, params)

    def _said(
        self, found: Matching, source: Clustered, target: Clustered, sigma: float | int
    ) -> dict[str, object]:
        off = source.moved(found.beta, sigma) + target.moved(found.alpha, sigma)
        params: dict[str, object] = {"objective": found.objective, "kernel_width": float(sigma)}
        if off:
            params["quantisation"] = off
            log.info("rows stand in clusters; the distance of means is known to %.3g", off)
        if self.D > 1:
            params["alpha"] = {
                "mean": float(found.alpha @ target.shares),
                "least": float(found.alpha.min()),
            }
        return params
