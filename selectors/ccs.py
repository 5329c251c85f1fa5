"""Coverage-centric selection: drop the hardest rows, then cover the range of the score."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.budget import share_of_rows
from curate.selectors.choose import Choice, without_first
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.strata import equal_width
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Ccs(Choice):
    """Random rows of `strata` strata of equal width, after the hardest `drop_top` rows are gone.

    Zheng et al. 2023 (arXiv:2210.15809, algorithm 1) and their code: `drop_top` is their β, a
    share of all rows or a count, taken from the end of the score that `direction` calls hard
    ("low" for aum and margin). The strata lie between the lowest and the highest score that is
    left. The budget goes to the strata from the smallest to the largest, the lower scores first
    among equal ones: each gets min(its rows, what is left // strata left), so small strata are
    kept whole and the largest takes what remains. Inside a stratum rows are uniformly random.

    Where theirs truncates the budget and the cut-off to whole rows, ours rounds half up as every
    method here does; and with `by_group` each group's budget is divided among the strata of the
    group's rows (their class-balanced mode gives every class the last one's count). The highest
    score belongs to the last stratum, infinite ones to the outer strata. Six scans. No ranks.
    """

    by: str
    direction: Literal["high", "low"] = "high"
    drop_top: float | int = 0
    strata: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if self.strata < 1:
            raise ValueError(f"strata must be at least 1, not {self.strata}")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        scored = by_score(table, self.by, self.direction)
        scored = without_first(scored, share_of_rows(self.drop_top, table.rows, "drop_top"))
        strata = equal_width(scored, self.by, self.strata)
        ordering, share = strata.sampled(scored, random_keys(rng), self._divide, self.budgets)
        return self.choose_in_groups(ordering, budget, share)

    def _divide(self, totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
        """Divide among the strata; rows without a score, the last number, come after all."""
        sizes = totals[: self.strata].tolist()
        amounts = allocate(amount, sizes)
        rest = amount - sum(amounts)
        return np.array([*amounts, *np.minimum(totals[self.strata :], rest)], dtype=np.int64)


def allocate(budget: int, sizes: list[int]) -> list[int]:
    """Return what each stratum gets: of 60 and sizes 5, 10, 100 it is 5, 10 and 45."""
    amounts, left = [0] * len(sizes), budget
    ascending = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for done, i in enumerate(ascending):
        amounts[i] = min(sizes[i], left // (len(sizes) - done))
        left -= amounts[i]
    return amounts
