"""What score-based selectors share: cut the order at the budget, then emit the rows inside.

Memory is one batch, the counters of the cuts and, with ranks, what `selectors/ranks.py` says.
Scans of the table: two to find the cut and one to emit; two more when rows are dropped from the
front of a token budget.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt32
from numpy import ndarray

from curate.selectors.budget import budget_rows, need_tokens, share_of_rows
from curate.selectors.cut import find_cuts
from curate.selectors.ordering import First, Ordering
from curate.selectors.protocol import Budget, Selection
from curate.selectors.ranks import with_ranks

log = logging.getLogger("curate.selectors")

Share = Callable[["Int64[ndarray, ' g']", int], "Int64[ndarray, ' g']"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings that all score-based selectors have.

    `include_errors`: rows that could not be scored may be chosen, after all that could.
    `ranked`: number the rows of methods that order them. `carry`: table columns that come along
    in the selection's batches.
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
    ) -> Selection:
        """Return the first rows of the order that the budget allows, after those dropped.

        `drop` is a count of rows or a share in [0, 1) of the corpus rows.

        Raises:
            ValueError: more tokens than there are (unless `may_fall_short`), or none counted.
        """
        ordering = self._counted(ordering, budget)
        skip = share_of_rows(drop, ordering.table.rows, "the part to drop")
        if skip and ordering.by_tokens:
            in_rows = replace(ordering, by_tokens=False)
            (front,), _ = find_cuts(in_rows, lambda totals: [np.minimum(totals, skip)])
            ordering, skip = replace(ordering, without=front), 0
        amount = _amount(budget, ordering)
        (dropped, kept), totals = find_cuts(
            ordering, lambda totals: [np.minimum(totals, n) for n in (skip, skip + amount)]
        )
        _check_supply(budget, amount, int(totals.sum()) - skip, may_fall_short)
        rows = _emit(ordering, kept, dropped if skip else None, self.carry)
        return Selection(_finished(rows, self.ranked), _ties(kept))

    def choose_in_groups(self, ordering: Ordering, budget: Budget, share: Share) -> Selection:
        """Return the first rows of each group; `share(totals, amount)` divides the budget.

        The rows have no rank: a smaller budget is divided anew, so it is no prefix.
        """
        ordering = self._counted(ordering, budget)
        amount = _amount(budget, ordering)
        (front,), totals = find_cuts(ordering, lambda totals: [share(totals, amount)])
        _check_supply(budget, amount, int(totals.sum()), may_fall_short=False)
        rows = _emit(ordering, front, None, self.carry)
        return Selection(_finished(rows, ranked=False), _ties(front))

    def _counted(self, ordering: Ordering, budget: Budget) -> Ordering:
        need_tokens(budget, ordering.table)
        return replace(
            ordering, by_tokens=budget.kind == "tokens", include_errors=self.include_errors
        )


def _amount(budget: Budget, ordering: Ordering) -> int:
    if budget.kind == "tokens":
        return int(budget.value)
    return budget_rows(budget, ordering.table.rows)


def _check_supply(budget: Budget, amount: int, supply: int, may_fall_short: bool) -> None:
    if amount <= supply:
        return
    if supply <= 0:
        raise ValueError("no row is left to choose: all have errors, no score, or are dropped")
    if budget.kind == "tokens" and not may_fall_short:
        raise ValueError(
            f"a budget of {amount} tokens is more than the {supply} tokens that can be chosen"
        )
    if budget.kind != "tokens" and not may_fall_short:
        log.warning("the budget is %d rows, only %d can be chosen: all are kept", amount, supply)


def _emit(
    ordering: Ordering, front: First, dropped: First | None, carry: tuple[str, ...]
) -> Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]]:
    """Yield the chosen rows (shard, row, carried columns) and their keys, in corpus order."""
    inside = front.mask()
    outside = None if dropped is None else dropped.mask()
    for rows in ordering.scan(carry):
        kept = inside(rows)
        if outside is not None:
            kept &= ~outside(rows)
        if kept.any():
            chosen = rows.where(kept)
            batch = chosen.batch.select(["shard", "row", *dict.fromkeys(carry)])
            yield batch, chosen.key


def _finished(
    rows: Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]], ranked: bool
) -> Iterator[pa.RecordBatch]:
    """Yield the batches with `weight` and `rank`, null where there is none."""
    batches = with_ranks(rows) if ranked else (batch for batch, _ in rows)
    for batch in batches:
        columns: dict[str, Any] = dict(zip(batch.schema.names, batch.columns, strict=True))
        carried = [name for name in columns if name not in ("shard", "row", "rank")]
        nulls = pa.nulls(batch.num_rows)
        weight, rank = nulls.cast(pa.float32()), columns.get("rank", nulls.cast(pa.int32()))
        arrays = [columns["shard"], columns["row"], weight, rank, *(columns[n] for n in carried)]
        yield pa.record_batch(arrays, ["shard", "row", "weight", "rank", *carried])


def _ties(front: First) -> dict[str, object]:
    """Return what is recorded: equal keys are taken in row order, so many met at the cuts."""
    return {"ties": {"rule": "row order", "at_cut": int(front.tied.sum())}}
