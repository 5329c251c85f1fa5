"""Rows that stand for all others, weighted by how many they stand for: CRAIG."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.cells import cells_of
from curate.selectors.craig_cells import CELL_ROWS, in_cells
from curate.selectors.craig_search import represent
from curate.selectors.divided import Divided, Part
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.scaled import ScaledVectors, exponent_of
from curate.selectors.vectors import VectorTable

EXACT_ROWS = 20_000
"""Above as many rows (of a group) they are cut into cells, unless `cells` says otherwise."""


@dataclass(frozen=True)
class Craig(Divided):
    """Rows that minimise sum_i min_{j in S} d_ij greedily; the weight counts the rows nearest to j.

    Mirzasoleiman, Bilmes and Leskovec 2020 (arXiv:1906.01827, algorithm 1): facility location on
    max d - d of Euclidean distances between gradients of the last layer, in each group (class) by
    itself, by exact lazy greedy. After the first row (that with the least sum of distances) the
    order does not depend on what stands for max d. Weights of a group add up to its rows; DeepCore
    counts from 1, so that its weights add up to the rows and the picks together. Of equally
    near picks the earlier one counts the row, a pick always itself. Ranked without groups.

    Exact up to 20 000 rows in a group, in time n²·D, twice, and some n·D for each pick; above 5792
    rows distances are computed again when they are needed. Above 20 000, or with `cells`, the rows
    are cut into that many cells by k-means (by default of about 5792 rows, none of more) and no
    row serves rows of another cell: the order is greedy's where a row without a pick in its cell
    is as far away as any two rows can be (twice the largest distance from the mean). A pick's
    weight counts its cell's rows nearest to it; rows of a cell that got no pick are counted by the
    nearest of all. The sum of distances is then at most what greedy minimised. Time n·5792·D, and
    k·D for each row of a cell without a pick. Memory: some 350 MB and 60 bytes a row. How many
    cells there were is recorded (`used_cells`).
    """

    cells: int | None = None
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.cells, int) and self.cells < 1:
            raise ValueError(f"cells must be a count of at least 1, not {self.cells!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, weights, most = [], [], 1
        for part in self.parts(table, budget):
            picks, counts, cells = self._represent(part, int(rng.integers(1 << 31)))
            places.append(part.places[picks])
            weights.append(counts.astype(np.float64))
            most = max(most, cells)
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        weight = np.concatenate(weights) if weights else np.empty(0)
        params: dict[str, object] = {"used_cells": most, "weight_kind": "loss"}
        return picked(table, chosen, weight, ranks, params=params)

    def _represent(
        self, part: Part, seed: int
    ) -> tuple[Int64[ndarray, " k"], Int64[ndarray, " k"], int]:
        """Return the part's picks in order, how many rows each counts, and the number of cells."""
        rows, count = part.vectors.rows, self.cells
        if count is None:
            count = 1 if rows <= EXACT_ROWS else -(-rows // CELL_ROWS)
        if count > 1 and rows > 1:
            seen = ScaledVectors(part.vectors, exponent_of(part.vectors))
            cells = cells_of(seen, min(count, rows), "euclidean", seed, CELL_ROWS)
            return *in_cells(part.vectors, cells, part.sizes, part.amount), len(cells)
        found = represent(part.vectors, part.sizes, part.amount)
        return found.picks, found.counts, 1
