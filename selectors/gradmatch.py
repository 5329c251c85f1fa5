"""Few rows whose weighted gradients add up to those of all rows: GradMatch."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy import ndarray

from curate.selectors.divided import Divided, Part, within
from curate.selectors.inner_products import inner_products, one_row, row_sum
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.pursuit import pursue
from curate.selectors.vectors import VectorTable

log = logging.getLogger("curate.selectors")


@dataclass(frozen=True)
class GradMatch(Divided):
    """Rows and weights w >= 0 for a small ||sum_i w_i g_i - sum_all g||² + penalty ||w||².

    Killamsetty et al. 2021 (arXiv:2103.00123, algorithm 2), by orthogonal matching pursuit on the
    vectors, which should be gradients of the last layer. Each group of `by_group` (their classes)
    is matched by itself; all weights together stand for the sum over all candidates. Their code
    matches the mean, which divides all weights by one number and moves no minimum. It also solves
    the normal equations by least squares, another problem wherever a weight is 0; here the weights
    are the minimum of the objective itself, so a row that came early may leave again.

    Only rows that point along what is left are taken, so there may be fewer than the budget.
    `fill="random"` then adds rows at random with weight 1 (a row that stands for itself), as the
    authors' code does; `fill="none"` keeps fewer. How many were matched is recorded. No ranks.
    """

    penalty: float | int = 1.0
    fill: str = "random"
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.penalty, int | float) and not isinstance(self.penalty, bool)
        if not is_number or not 0 <= self.penalty < np.inf:
            raise ValueError(f"penalty must be a finite number of at least 0, not {self.penalty!r}")
        if self.fill not in ("random", "none"):
            raise ValueError(f"fill must be random or none, not {self.fill!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places: list[ndarray] = []
        weights: list[ndarray] = []
        matched = filled = 0
        for part in self.parts(table, budget):
            rows, weight = self._match(part)
            more = self._more(part, rows, rng)
            matched, filled = matched + len(rows), filled + len(more)
            places += [part.places[rows], part.places[more]]
            weights += [weight, np.ones(len(more))]
        if not matched + filled:
            raise ValueError("no row points along the sum of all vectors; are they gradients?")
        if filled:
            log.warning("%d rows match the gradients; %d more are random ones", matched, filled)
        params: dict[str, object] = {"matched": matched, "filled": filled, "weight_kind": "loss"}
        return picked(table, np.concatenate(places), np.concatenate(weights), params=params)

    def _match(self, part: Part) -> tuple[ndarray, ndarray]:
        rows, weights = pursue(
            lambda v: inner_products(part.vectors, v),
            lambda i: one_row(part.vectors, i),
            row_sum(part.vectors),
            part.sizes,
            part.amount,
            self.penalty,
        )
        left = part.amount - int(part.sizes[rows].sum())
        if self.fill == "none" and left and len(rows) < len(part.sizes):
            log.warning("%d rows match the gradients, fewer than the budget allows", len(rows))
        return rows, weights

    def _more(self, part: Part, rows: ndarray, rng: np.random.Generator) -> ndarray:
        """Return further rows at random, as many as the budget still allows."""
        if self.fill == "none":
            return np.empty(0, dtype=np.int64)
        others = np.setdiff1d(np.arange(len(part.sizes)), rows)
        left = part.amount - int(part.sizes[rows].sum())
        return within(rng.permutation(others), part.sizes, left)
