"""Keep a set number of rows of every class or group."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.apportion import apportion
from curate.selectors.budget import need_columns, need_score
from curate.selectors.choose import Choice
from curate.selectors.groups import GroupNumbers
from curate.selectors.ordering import Keys, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.score_keys import score_column, sort_keys


@dataclass(frozen=True)
class Balanced(Choice):
    """The best rows of each value of the column `by_group`, the budget divided among the values.

    `shares="equal"` gives every group the same amount, `"proportional"` its share of the corpus,
    and a mapping {value: share} what it says (values it does not name get nothing); by largest
    remainder, the smaller value first among equal remainders. Groups too small for their amount
    give the rest to the others. Inside a group the rows come from the end of `by` that
    `direction` names, or at random where `by` is None. Null is a group of its own. No ranks.
    """

    by_group: str
    by: str | None = None
    direction: Literal["high", "low"] = "high"
    shares: Literal["equal", "proportional"] | Mapping[str | int, float] = "equal"

    def __post_init__(self) -> None:
        if isinstance(self.shares, Mapping):
            if not self.shares or min(self.shares.values()) < 0 or not sum(self.shares.values()):
                raise ValueError("shares must be positive numbers, such as {en: 0.7, de: 0.3}")
        elif self.shares not in ("equal", "proportional"):
            raise ValueError(
                f"shares must be equal, proportional or a mapping, not {self.shares!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.by_group} | ({self.by} if self.by else set()))

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        need_columns(table, self.needs)
        numbers = GroupNumbers(self.by_group)
        ordering = Ordering(table, self.needs, self._keys(table, rng), lambda: numbers.of)

        def divide(totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
            return self._divide(numbers.values, totals, amount)

        return self.choose_in_groups(ordering, budget, divide)

    def _keys(self, table: Table, rng: np.random.Generator) -> Keys:
        if self.by is None:
            return random_keys(rng)
        by = self.by
        need_score(table, by)
        return lambda batch: sort_keys(score_column(batch, by), self.direction)

    def _divide(
        self, values: list[str], totals: Int64[ndarray, " g"], amount: int
    ) -> Int64[ndarray, " g"]:
        """Divide in the order of the values, not of their first appearance."""
        order = sorted(range(len(totals)), key=lambda i: values[i])
        sizes = [int(totals[i]) for i in order]
        shares = self._shares([values[i] for i in order], sizes)
        amounts = np.zeros(len(totals), dtype=np.int64)
        amounts[order] = apportion(amount, shares, sizes)
        return amounts

    def _shares(self, values: list[str], sizes: list[int]) -> list[int] | list[Fraction]:
        if not isinstance(self.shares, Mapping):
            return sizes if self.shares == "proportional" else [1] * len(sizes)
        named = {str(value): Fraction(str(share)) for value, share in self.shares.items()}
        if unknown := sorted(named.keys() - set(values)):
            known = ", ".join(values[:20])
            raise ValueError(
                f"shares names {unknown[0]!r}, which column {self.by_group!r} does not hold; "
                f"it holds: {known}"
            )
        return [named.get(value, Fraction(0)) for value in values]
