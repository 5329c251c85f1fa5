"""Keep a set number of rows of every class or group."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.selectors.budget import need_columns
from curate.selectors.choose import Choice, in_groups
from curate.selectors.group_budgets import GroupBudgets, Shares, check_shares
from curate.selectors.ordering import Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Balanced(Choice):
    """The best rows of each value of the column `by_group`, the budget divided among the values.

    `shares` and `min_shares` divide it as `GroupBudgets` says, equally by default. Inside a group
    the rows come from the end of `by` that `direction` names, or at random where `by` is None.
    Null is a group of its own. No ranks.
    """

    by_group: str
    by: str | None = None
    direction: Literal["high", "low"] = "high"
    shares: Shares | None = "equal"

    def __post_init__(self) -> None:
        if not self.by_group:
            raise ValueError("balanced needs a column of groups, by_group=COLUMN")
        check_shares("shares", self.shares, self.min_shares)
        if self.group_shares is not None:
            raise ValueError("balanced divides its budget by shares=..., not by group_shares")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        need_columns(table, self.needs)
        budgets = GroupBudgets(self.by_group, self.shares or "equal", self.min_shares)
        if self.by is None:
            ordering = Ordering(table, frozenset(), random_keys(rng))
        else:
            ordering = by_score(table, self.by, self.direction)
        return self.choose_in_groups(in_groups(ordering, budgets), budget, budgets.divide)
