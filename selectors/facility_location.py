"""Rows that stand for all others: facility location."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.cells import cells_of
from curate.selectors.coverage import Coverage
from curate.selectors.divided import Divided, Part, within
from curate.selectors.greedy import Order, lazy_greedy, stochastic_greedy
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable, part_of, usable_target

EXACT_ROWS = 20_000
"""Above as many rows (of a group) they are cut into cells, unless `cells` says otherwise."""
CELL_ROWS = 8192


@dataclass(frozen=True)
class FacilityLocation(Divided):
    """Greedy for F(S) = sum_i max_{j in S} s_ij, s = 1/2 + cos / 2.

    The sum is over all rows that may be chosen, of each group by itself (DeepCore chooses per class
    so), or over the target vectors where they are given. `greedy="lazy"` gives what plain greedy
    gives, at least 1 - 1/e of the best; `"stochastic"` looks at a random sample of rows for each
    pick and gives 1 - 1/e - `epsilon` in expectation (Mirzasoleiman et al. 2015). F / rows is
    recorded as `coverage`: the mean similarity of a row to the nearest one chosen.

    Exact up to 20 000 rows in a group; time n²·D, and about n·D for every few picks. Above that,
    or with `cells`, the rows are cut into that many cells by k-means (by default of about 8192
    rows, none of more) and s is 0 between cells: the order is that of greedy for this smaller F,
    which the true F is at least. Time n·8192·D, memory 600 MB and some 40 bytes a row. Ranked
    without groups.
    """

    greedy: Literal["lazy", "stochastic"] = "lazy"
    epsilon: float | int = 0.01
    cells: int | None = None
    uses_vectors: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.greedy not in ("lazy", "stochastic"):
            raise ValueError(f"greedy must be lazy or stochastic, not {self.greedy!r}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be between 0 and 1, not {self.epsilon!r}")
        if isinstance(self.cells, int) and self.cells < 1:
            raise ValueError(f"cells must be a count of at least 1, not {self.cells!r}")
        if self.greedy == "stochastic" and self.cells not in (None, 1):
            raise ValueError(
                "stochastic greedy compares all rows; give it no cells, or lazy greedy"
            )

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, covered, rows, most = [], 0.0, 0, 1
        target = usable_target(table)
        for part in self.parts(table, budget):
            order, mean, cells = self._represent(part, target, int(rng.integers(1 << 31)))
            places.append(part.places[order])
            demand = len(part.places) if target is None else target.rows
            covered, rows, most = covered + mean * demand, rows + demand, max(most, cells)
        chosen = np.concatenate(places)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        params: dict[str, object] = {"coverage": covered / rows, "used_cells": most}
        return picked(table, chosen, ranks=ranks, params=params)

    def _represent(
        self, part: Part, target: Vectors | None, seed: int
    ) -> tuple[Int64[ndarray, " k"], float, int]:
        """Return the part's rows in order, their coverage, and the number of cells."""
        vectors, sizes = part.vectors, part.sizes
        cells = self._cells(vectors, target, seed)
        if len(cells) > 1:
            order, mean = _in_cells(part, cells)
            return order, mean, len(cells)
        function = Coverage(vectors, vectors if target is None else target)
        if self.greedy == "lazy":
            order, _ = lazy_greedy(function, sizes, part.amount)
        else:
            rng = np.random.default_rng(seed)
            order, _ = stochastic_greedy(function, sizes, part.amount, rng, self.epsilon)
        return order, function.mean(), 1

    def _cells(
        self, vectors: Vectors, target: Vectors | None, seed: int
    ) -> list[Int64[ndarray, " _"]]:
        count = self.cells
        if count is None:
            is_exact = target is not None or self.greedy == "stochastic"
            is_small = vectors.rows <= EXACT_ROWS
            count = 1 if is_exact or is_small else -(-vectors.rows // CELL_ROWS)
        elif count > 1 and target is not None:
            raise ValueError("a target is covered by rows of all cells; leave cells out")
        if count == 1:
            return [np.arange(vectors.rows)]
        return cells_of(vectors, min(count, vectors.rows), "cosine", seed, CELL_ROWS)


def _in_cells(part: Part, cells: list[Int64[ndarray, " _"]]) -> tuple[Int64[ndarray, " k"], float]:
    """Return greedy's order where rows of different cells are not similar at all, and F / rows.

    What greedy's rows add only falls, in each cell, so greedy over all cells takes the largest of
    what the cells' own orders add: each cell is searched once. What a row must add at least to be
    among the budget's rows is known better with every cell, and ends the later ones early.
    """
    vectors, by_tokens = part.vectors, bool((part.sizes != 1).any())
    rows, gains = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for cell in cells:
        is_full = len(gains) == part.amount and not by_tokens
        least = float(gains.min()) if is_full else -np.inf
        order, added = _of_all(part_of(vectors, cell), least)
        added = np.minimum.accumulate(added)  # rounding may lift one by its last bit
        rows, gains = np.concatenate([rows, cell[order]]), np.concatenate([gains, added])
        first = np.argsort(-gains, kind="stable")
        if not by_tokens:
            first = first[: part.amount]
        rows, gains = rows[first], gains[first]
    order = within(rows, part.sizes, part.amount)
    return order, float(gains[: len(order)].sum(dtype=np.float64)) / vectors.rows


def _of_all(vectors: Vectors, least: float) -> Order:
    """Return greedy's order of all rows that add at least so much; frees the similarities."""
    ones = np.ones(vectors.rows, dtype=np.int64)
    return lazy_greedy(Coverage(vectors, vectors), ones, vectors.rows, least)
