"""What score-based selectors share: cut the order at the budget, then emit the rows inside.

Memory is one batch, the counters of the cuts and, with ranks, what `selectors/ranks.py` says.
Scans of the table: two to find the cut and one to emit; two more when rows are dropped from the
front of a token or group budget, two more for the least that groups keep.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64, UInt32
from numpy import ndarray

from curate.selectors.budget import (
    budget_rows,
    check_tokens,
    need_columns,
    need_tokens,
    share_of_rows,
)
from curate.selectors.by_group import ByGroup
from curate.selectors.cut import find_cuts
from curate.selectors.group_budgets import GroupBudgets
from curate.selectors.ordering import Candidates, Exclusion, First, Ordering
from curate.selectors.protocol import Budget, Selection
from curate.selectors.ranks import with_ranks

log = logging.getLogger("curate.selectors")

Share = Callable[["Int64[ndarray, ' g']", int], "Int64[ndarray, ' g']"]
Inside = Callable[[Candidates], "Bool[ndarray, ' n']"]
Weights = Callable[[Candidates], "Float64[ndarray, ' n']"]
Weigh = Callable[[First, float], Weights | None]
"""Makes the weights of chosen rows when the cuts are known, and which share of all they keep."""


@dataclass(frozen=True, kw_only=True)
class Choice(ByGroup):
    """Settings that all score-based selectors have.

    `include_errors`: rows that could not be scored may be chosen, after all that could.
    `ranked`: number the rows of methods that order them. `carry`: table columns that come along
    in the selection's batches.

    `by_group` is a column of classes, languages or domains. With `group_shares` the budget is
    divided among its values and the method chooses inside each; with `min_shares` alone each value
    keeps at least that share of the budget, its first rows, and the rest goes to the first rows of
    all. What they may say is in `GroupBudgets`; with neither the division is in proportion. Rows
    that are dropped are dropped before that, from the order of all. Divided selections have no
    ranks: a smaller budget is divided anew, so it is no prefix.
    """

    include_errors: bool = False
    ranked: bool = True
    carry: tuple[str, ...] = ()

    def choose(
        self,
        ordering: Ordering,
        budget: Budget,
        drop: float | int = 0,
        may_fall_short: bool = False,
        weigh: Weigh | None = None,
    ) -> Selection:
        """Return the first rows of the order that the budget allows, after those dropped.

        `drop` is a count of rows or a share in [0, 1) of the corpus rows. `weigh` weighs them;
        budgets of groups are then always divided.

        Raises:
            ValueError: more tokens than there are (unless `may_fall_short`), or none counted.
        """
        ordering = self.counted(ordering, budget)
        skip = share_of_rows(drop, ordering.table.rows, "drop_top (or offset)")
        budgets = self.budgets
        if budgets is not None or ordering.by_tokens:
            ordering, skip = without_first(ordering, skip), 0
        if budgets is not None:
            grouped = in_groups(ordering, budgets)
            if self.group_shares is None and self.min_shares is not None and weigh is None:
                return self._choose_with_floors(ordering, grouped, budgets, budget, may_fall_short)
            return self.choose_in_groups(grouped, budget, budgets.divide, may_fall_short, weigh)
        amount = amount_of(budget, ordering)
        (dropped, kept), totals = find_cuts(
            ordering, lambda totals: [np.minimum(totals, n) for n in (skip, skip + amount)]
        )
        supply = int(totals.sum()) - skip
        _check_supply(budget, amount, supply, may_fall_short)
        weights = None if weigh is None else weigh(kept, min(1.0, amount / max(1, supply)))
        inside = _between(dropped, kept) if skip else kept.mask()
        rows = _emit(ordering, inside, self.carry, weights)
        return Selection(finished(rows, self.ranked), _ties(kept))

    def choose_in_groups(
        self,
        ordering: Ordering,
        budget: Budget,
        share: Share,
        may_fall_short: bool = False,
        weigh: Weigh | None = None,
    ) -> Selection:
        """Return the first rows of each group; `share(totals, amount)` divides the budget."""
        ordering = self.counted(ordering, budget)
        amount = amount_of(budget, ordering)
        parts: list[Int64[ndarray, " g"]] = []

        def divided(totals: Int64[ndarray, " g"]) -> list[Int64[ndarray, " g"]]:
            parts.append(share(totals, amount))
            return parts

        (front,), totals = find_cuts(ordering, divided)
        supply = int(totals.sum())
        # Groups without a share may be all that is left.
        _check_supply(budget, amount, min(supply, int(parts[0].sum())), may_fall_short)
        weights = None if weigh is None else weigh(front, min(1.0, amount / max(1, supply)))
        rows = _emit(ordering, front.mask(), self.carry, weights)
        return Selection(finished(rows, ranked=False), _ties(front))

    def choose_middle(self, ordering: Ordering, budget: Budget) -> Selection:
        """Return the rows in the middle of the order, of each group where there are groups.

        Of m rows the k from place (m - k) // 2; tokens likewise, the part before in whole rows.
        """
        ordering = self.counted(ordering, budget)
        amount = amount_of(budget, ordering)
        budgets = self.budgets
        divide: Share = np.minimum
        if budgets is not None:
            ordering, divide = in_groups(ordering, budgets), budgets.divide

        def window(totals: Int64[ndarray, " g"]) -> list[Int64[ndarray, " g"]]:
            size = divide(totals, amount)
            start = (totals - size) // 2
            return [start, start + size]

        (before, kept), totals = find_cuts(ordering, window)
        supply = int(divide(totals, amount).sum())
        _check_supply(budget, amount, supply, may_fall_short=False)
        inside = _between(before, kept)
        if ordering.by_tokens:  # the part before ends at a whole row: cut from there
            size = divide(totals, amount)
            ordering = ordering.but(Exclusion(before, ordering))
            (kept,), _ = find_cuts(ordering, lambda left: [np.minimum(left, size[: len(left)])])
            inside = kept.mask()
        rows = _emit(ordering, inside, self.carry, None)
        return Selection(finished(rows, ranked=False), _ties(kept))

    def counted(self, ordering: Ordering, budget: Budget) -> Ordering:
        """Return the order with rows counted as the budget counts them."""
        need_tokens(budget, ordering.table)
        return replace(
            ordering, by_tokens=budget.kind == "tokens", include_errors=self.include_errors
        )

    def _choose_with_floors(
        self,
        ordering: Ordering,
        grouped: Ordering,
        budgets: GroupBudgets,
        budget: Budget,
        may_fall_short: bool,
    ) -> Selection:
        """Return the least that each group keeps, then the first of all other rows."""
        amount = amount_of(budget, ordering)
        (least,), totals = find_cuts(grouped, lambda totals: [budgets.floors(totals, amount)])
        supply = int(totals.sum())
        _check_supply(budget, amount, supply, may_fall_short)
        others = ordering.but(Exclusion(least, grouped))

        def left(totals: Int64[ndarray, " g"]) -> list[Int64[ndarray, " g"]]:
            return [np.minimum(totals, amount - (supply - int(totals.sum())))]

        (last,), _ = find_cuts(others, left)
        must, may = least.mask(), last.mask()

        def inside(rows: Candidates) -> Bool[ndarray, " n"]:
            kept = must(rows)
            rest = replace(rows.where(~kept), group=np.zeros(int((~kept).sum()), dtype=np.int64))
            kept[~kept] = may(rest)
            return kept

        rows = _emit(grouped, inside, self.carry, None)
        return Selection(finished(rows, ranked=False), _ties(last))


def in_groups(ordering: Ordering, budgets: GroupBudgets) -> Ordering:
    """Return the order with the rows numbered by group."""
    need_columns(ordering.table, frozenset({budgets.by_group}))
    columns = ordering.columns | {budgets.by_group}
    return replace(ordering, columns=columns, groups=lambda: budgets.numbers.of)


def without_first(ordering: Ordering, rows: int) -> Ordering:
    """Return the order without its first rows; two scans."""
    if not rows:
        return ordering
    in_rows = replace(ordering, by_tokens=False)
    (front,), _ = find_cuts(in_rows, lambda totals: [np.minimum(totals, rows)])
    return ordering.but(Exclusion(front, in_rows))


def amount_of(budget: Budget, ordering: Ordering) -> int:
    """Return the budget in rows, or in tokens where it is in tokens."""
    if budget.kind == "tokens":
        return int(budget.value)
    return budget_rows(budget, ordering.table.rows)


def _check_supply(budget: Budget, amount: int, supply: int, may_fall_short: bool) -> None:
    if amount <= supply:
        return
    if supply <= 0:
        raise ValueError("no row is left to choose: all have errors, no score, or are dropped")
    if may_fall_short:
        return
    if budget.kind == "tokens":
        check_tokens(amount, supply)
    else:
        log.warning("the budget is %d rows, only %d can be chosen: all are kept", amount, supply)


def _between(before: First, kept: First) -> Inside:
    """Return the mask of what is in the second front and not in the first."""
    outside, inside = before.mask(), kept.mask()
    return lambda rows: inside(rows) & ~outside(rows)


def _emit(
    ordering: Ordering, inside: Inside, carry: tuple[str, ...], weights: Weights | None
) -> Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]]:
    """Yield the chosen rows (shard, row, carried columns, weight) and keys, in corpus order."""
    for rows in ordering.scan(carry):
        kept = inside(rows)
        if kept.any():
            chosen = rows.where(kept)
            batch = chosen.batch.select(["shard", "row", *dict.fromkeys(carry)])
            if weights is not None:
                weight = weights(chosen).astype(np.float32)
                batch = batch.append_column("weight", pa.array(weight))
            yield batch, chosen.key


def finished(
    rows: Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]], ranked: bool
) -> Iterator[pa.RecordBatch]:
    """Yield the batches with `weight` and `rank`, null where there is none."""
    batches = with_ranks(rows) if ranked else (batch for batch, _ in rows)
    for batch in batches:
        columns: dict[str, Any] = dict(zip(batch.schema.names, batch.columns, strict=True))
        carried = [n for n in columns if n not in ("shard", "row", "weight", "rank")]
        nulls = pa.nulls(batch.num_rows)
        weight = columns.get("weight", nulls.cast(pa.float32()))
        rank = columns.get("rank", nulls.cast(pa.int32()))
        arrays = [columns["shard"], columns["row"], weight, rank, *(columns[n] for n in carried)]
        yield pa.record_batch(arrays, ["shard", "row", "weight", "rank", *carried])


def _ties(front: First) -> dict[str, object]:
    """Return what is recorded: equal keys are taken in row order, so many met at the cuts."""
    return {"ties": {"rule": "row order", "at_cut": int(front.tied.sum())}}
