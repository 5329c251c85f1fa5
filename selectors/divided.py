"""Dividing a budget among groups for methods that compare the rows within each group."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray

from curate.selectors.budget import budget_rows, check_tokens, need_tokens
from curate.selectors.by_group import ByGroup
from curate.selectors.picks import Candidates, candidates
from curate.selectors.protocol import Budget, Table
from curate.selectors.vectors import ArrayVectors, Vectors, part_of

log = logging.getLogger("curate.selectors")

NONE = ArrayVectors(np.empty((0, 1), dtype=np.float32))
"""The vectors of a table without any, for methods that look elsewhere."""


@dataclass(frozen=True)
class Part:
    """The candidates of one group and what it may take of the budget.

    `places` are their places in the table, ascending, and `vectors` theirs in the same order.
    `sizes` is what each takes from `amount`: 1, or its tokens.
    """

    group: str
    places: Int64[ndarray, " n"]
    sizes: Int64[ndarray, " n"]
    amount: int
    score: Float32[ndarray, " n"] | None
    vectors: Vectors


@dataclass(frozen=True, kw_only=True)
class Divided(ByGroup):
    """Settings of methods that choose in each group by itself.

    Without `by_group` all rows are one group. With it the budget is divided as `GroupBudgets`
    says: in proportion to the rows that may be chosen, or by `group_shares`, none below its
    `min_shares`.
    """

    def parts(self, table: Table, budget: Budget) -> Iterator[Part]:
        """Yield each group that gets something, in the order of their first rows.

        Raises:
            ValueError: more tokens than there are, no token counts, or no row may be chosen.
        """
        need_tokens(budget, table)
        found = candidates(table, by=getattr(self, "by", None), by_group=self.by_group)
        sizes = np.ones(len(found), dtype=np.int64)
        if budget.kind == "tokens":
            assert found.tokens is not None, "the table counts tokens"
            sizes = found.tokens
        amounts = self._amounts(table, budget, found, sizes)
        whole = getattr(table, "vectors", None)
        for number, amount in enumerate(amounts.tolist()):
            mine = found.members(number)
            if amount and len(mine):
                places = found.places[mine]
                score = None if found.score is None else found.score[mine]
                vectors = part_of(whole, places) if whole is not None else NONE
                yield Part(found.groups[number], places, sizes[mine], amount, score, vectors)

    def _amounts(
        self, table: Table, budget: Budget, found: Candidates, sizes: Int64[ndarray, " n"]
    ) -> Int64[ndarray, " g"]:
        totals = np.zeros(len(found.groups), dtype=np.int64)
        np.add.at(totals, found.group, sizes)
        supply = int(totals.sum())
        if budget.kind == "tokens":
            amount = int(budget.value)
            check_tokens(amount, supply)
        else:
            amount = budget_rows(budget, table.rows)
            if amount > supply:
                log.warning(
                    "the budget is %d rows, only %d can be chosen: all are kept", amount, supply
                )
        if (shares := self.budgets) is None:
            return np.minimum(totals, amount)
        names = pa.record_batch([pa.array(found.groups, pa.string())], [self.by_group])
        shares.numbers.of(names)  # numbered as the candidates are
        divided = shares.divide(totals, amount)
        if (given := int(divided.sum())) < min(amount, supply):  # groups without a share have more
            if budget.kind == "tokens":
                check_tokens(amount, given)
            log.warning("the budget is %d rows, only %d have a share of it", amount, given)
        return divided


def within(
    order: Int64[ndarray, " k"], sizes: Int64[ndarray, " n"], amount: int
) -> Int64[ndarray, " m"]:
    """Return the front of an order, up to the row that would exceed the amount."""
    fits = np.cumsum(sizes[order]) <= amount
    return order[: len(order) if fits.all() else int(np.argmin(fits))]
