"""Few rows whose weighted gradients add up to those of all rows: GradMatch."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.divided import Divided, Part, within
from curate.selectors.inner_products import inner_products, mean_of, one_row, row_sum
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.pursuit import pursue
from curate.selectors.target_groups import check_target_group, target_groups
from curate.selectors.vectors import Vectors, VectorTable, usable_target

log = logging.getLogger("curate.selectors")


@dataclass(frozen=True)
class GradMatch(Divided):
    """Rows and weights w >= 0 for a small ||sum_i w_i g_i - goal||² + penalty ||w||².

    Killamsetty et al. 2021 (arXiv:2103.00123, algorithm 2), by orthogonal matching pursuit on the
    vectors, which should be gradients of the last layer. Each group of `by_group` (their classes)
    is matched by itself. DeepCore's code solves the normal equations by least squares, another
    problem wherever a weight is 0; here the weights are the minimum of the objective itself, so a
    row that came early may leave again. What is matched (recorded as `goal`):

    - "rows", the sum over all candidates of the group: the training gradient, as the authors do
      unless told otherwise;
    - "target", where target vectors are given, the mean of the target's in place of the
      candidates' mean: the validation gradient (their `valid`). With `target_group`, a column of
      the target that names its groups as `by_group` does, each group is matched to the target's
      sum over its own, as they do with classes.

    All weights together stand for all candidates. Another scale of the goal, a mean for a sum,
    multiplies all weights by one number and moves no minimum.

    Only rows that point along what is left are taken, so there may be fewer than the budget.
    `fill="random"` then adds rows at random with weight 1 (a row that stands for itself), as the
    authors' code does; `fill="none"` keeps fewer. How many were matched is recorded. No ranks.
    """

    penalty: float | int = 1.0
    fill: str = "random"
    target_group: str | None = None
    uses_vectors: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.penalty, int | float) and not isinstance(self.penalty, bool)
        if not is_number or not 0 <= self.penalty < np.inf:
            raise ValueError(f"penalty must be a finite number of at least 0, not {self.penalty!r}")
        if self.fill not in ("random", "none"):
            raise ValueError(f"fill must be random or none, not {self.fill!r}")
        check_target_group(self.target_group, self.by_group)

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        goals = Goals(table, self.target_group)
        places: list[ndarray] = []
        weights: list[ndarray] = []
        is_match: list[ndarray] = []
        for part in self.parts(table, budget):
            rows, weight = self._match(part, goals.of(part))
            more = self._more(part, rows, rng)
            places += [part.places[rows], part.places[more]]
            weights += [weight, np.ones(len(more))]  # a random row stands for itself
            is_match += [np.ones(len(rows), dtype=bool), np.zeros(len(more), dtype=bool)]
        found, weight = np.concatenate(is_match), np.concatenate(weights)
        if not len(found):
            raise ValueError(
                f"no row points along the sum of all vectors of the {goals.kind}; are they "
                "gradients?"
            )
        matched, filled = int(found.sum()), int((~found).sum())
        if filled:
            log.warning("%d rows match the gradients; %d more are random ones", matched, filled)
        weight[found] *= goals.scale()
        params: dict[str, object] = {"goal": goals.kind, "matched": matched, "filled": filled}
        params["weight_kind"] = "loss"
        return picked(table, np.concatenate(places), weight, params=params)

    def _match(self, part: Part, goal: Float64[ndarray, " d"]) -> tuple[ndarray, ndarray]:
        rows, weights = pursue(
            lambda v: inner_products(part.vectors, v),
            lambda i: one_row(part.vectors, i),
            goal,
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


class Goals:
    """What the weighted rows of each part are to add up to, and in which unit: see GradMatch."""

    def __init__(self, table: VectorTable, target_group: str | None) -> None:
        whole = usable_target(table)
        if whole is None and target_group is not None:
            raise ValueError("target_group names a column of a target: give --target-vectors")
        self.kind = "rows" if whole is None else "target"
        self._groups: dict[str, Vectors] | None = None
        self._mean: Float64[ndarray, " d"] | None = None
        if target_group is not None:
            self._groups = target_groups(table, target_group)
        elif whole is not None:
            self._mean = mean_of(whole)
        self._rows = self._targets = 0

    def of(self, part: Part) -> Float64[ndarray, " d"]:
        """Return the goal of a part; 0, to which no row points, where the target has none of it."""
        if self._groups is not None:
            mine = self._groups.get(part.group)
            if mine is None:
                log.warning("the target has no row of the group %r to be matched", part.group)
                return np.zeros(part.vectors.dimension)
            self._rows, self._targets = self._rows + len(part.places), self._targets + mine.rows
            return row_sum(mine)
        if self._mean is not None:
            return self._mean * len(part.places)
        return row_sum(part.vectors)

    def scale(self) -> float:
        """Return what weights are multiplied by to stand for candidates, not for target rows."""
        return self._rows / self._targets if self._targets else 1.0
