"""Rows that leave no row far from all of them: k-center."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.cells import cells_of
from curate.selectors.divided import Divided, Part
from curate.selectors.farthest import FarthestFirst, nearest_to_mean
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.scaled import ScaledVectors, exponent_of
from curate.selectors.vectors import PartOfVectors, Vectors, VectorTable, usable_target

EXACT_PICKS = 10_000
"""Above as many picks the rows are cut into cells, unless `cells` says otherwise."""


@dataclass(frozen=True)
class KCenter(Divided):
    """Greedy k-center: from a start on, always the row farthest from all rows chosen before.

    Gonzalez 1985; Sener and Savarese 2018 (arXiv:1708.00489, algorithm 1). The largest distance of
    a row from its nearest chosen one, recorded as `radius`, is at most twice the smallest possible
    for as many rows (times as many groups, where there are groups); null where the budget leaves
    a group or cell without any. `metric="cosine"` measures sqrt(2 - 2 cos), `"euclidean"` the
    vectors as they are, which are looked through once more so that their scale does not matter:
    times a power of two they give the same rows. (Distances below 1e-19 of the largest number are
    0.) `start="random"` draws the first row, `"mean"` takes the one nearest the mean. Target
    vectors, where they are given, are rows one has already: they count as chosen, and there is no
    start.

    Exact up to 10 000 picks. Above that, or with `cells`, the rows are cut into that many cells by
    k-means and compared inside their cell alone, the next pick being the farthest row of all cells.
    The radius is then at most twice the best of those k rows that serve their own cells, and at
    most four times the best radius of k / cells rows. Time k·n·D / cells multiplications.

    Ranked without groups: a smaller budget keeps a prefix, if it has as many cells.
    """

    metric: Literal["cosine", "euclidean"] = "cosine"
    start: Literal["random", "mean"] = "random"
    cells: int | None = None
    uses_vectors: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("cosine", "euclidean"):
            raise ValueError(f"metric must be cosine or euclidean, not {self.metric!r}")
        if self.start not in ("random", "mean"):
            raise ValueError(f"start must be random or mean, not {self.start!r}")
        if isinstance(self.cells, int) and self.cells < 1:
            raise ValueError(f"cells must be a count of at least 1, not {self.cells!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, radii, most = [], [0.0], 1
        base = usable_target(table)
        for part in self.parts(table, budget):
            order, radius, cells = self._spread(part, base, int(rng.integers(1 << 31)))
            places.append(part.places[order])
            radii.append(radius)
            most = max(most, cells)
        chosen = np.concatenate(places)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        # A group or cell whose first row is larger than its budget has no centre.
        largest = max(radii) if np.isfinite(radii).all() else None
        return picked(table, chosen, ranks=ranks, params={"radius": largest, "used_cells": most})

    def _spread(
        self, part: Part, base: Vectors | None, seed: int
    ) -> tuple[Int64[ndarray, " k"], float, int]:
        """Return the part's rows in order, the radius they leave, and the number of cells."""
        vectors, sizes, exponent = part.vectors, part.sizes, 0
        if self.metric == "euclidean":
            exponent = exponent_of(vectors, base)
            vectors = ScaledVectors(vectors, exponent)
            base = None if base is None else ScaledVectors(base, exponent)
        picks = max(1, part.amount * len(sizes) // max(1, int(sizes.sum())))
        count = -(-picks // EXACT_PICKS) if self.cells is None else min(self.cells, picks)
        cells = cells_of(vectors, count, self.metric, seed) if count > 1 else None
        starts = []
        if base is None:
            starts = self._starts(vectors, cells, np.random.default_rng(seed))
        centres = FarthestFirst(vectors, self.metric, starts=starts, base=base, cells=cells)
        return (
            centres.fill(sizes, part.amount),
            float(np.ldexp(centres.radius(), -exponent)),
            1 if cells is None else len(cells),
        )

    def _starts(
        self,
        vectors: Vectors,
        cells: list[Int64[ndarray, " _"]] | None,
        rng: np.random.Generator,
    ) -> list[int]:
        """Return the first centre of each cell."""
        found = []
        for rows in [np.arange(vectors.rows)] if cells is None else cells:
            if self.start == "random":
                found.append(int(rows[rng.integers(len(rows))]))
            else:
                found.append(int(rows[nearest_to_mean(PartOfVectors(vectors, rows), self.metric)]))
        return found
