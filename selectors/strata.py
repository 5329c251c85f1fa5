"""Strata of a score, and strata inside groups: how rows are numbered by them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt32
from numpy import ndarray

from curate.selectors.choose import Share, in_groups
from curate.selectors.group_budgets import GroupBudgets
from curate.selectors.ordering import Groups, Keys, Ordering
from curate.selectors.score_keys import UNSCORED, score_column


@dataclass(frozen=True)
class Strata:
    """`count` strata of the column `by`; rows without a score are in one more, the last."""

    by: str
    count: int
    numbers: Callable[[], Groups]

    def sampled(
        self, scored: Ordering, keys: Keys, divide: Share, budgets: GroupBudgets | None
    ) -> tuple[Ordering, Share]:
        """Return the order by `keys` inside each stratum, and how a budget is divided.

        `divide` divides among the strata; with `budgets` each group's part is divided so among
        the strata of the group's rows.
        """

        def scored_keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
            lacking = np.isnan(score_column(batch, self.by))
            return np.where(lacking, np.uint32(UNSCORED), keys(batch))

        ordering = replace(scored, keys=scored_keys, groups=self.numbers)
        if budgets is None:
            return ordering, divide
        grouped = in_groups(ordering, budgets)
        return replace(grouped, groups=self._in_groups(grouped)), self._shared(budgets, divide)

    def _in_groups(self, grouped: Ordering) -> Callable[[], Groups]:
        def fresh() -> Groups:
            group, stratum = grouped.groups(), self.numbers()
            return lambda batch: group(batch) * (self.count + 1) + stratum(batch)

        return fresh

    def _shared(self, budgets: GroupBudgets, divide: Share) -> Share:
        def share(totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
            width = self.count + 1
            padded = np.zeros(-(-len(totals) // width) * width, dtype=np.int64)
            padded[: len(totals)] = totals
            by_group = padded.reshape(-1, width)
            amounts = budgets.divide(by_group.sum(1), amount).tolist()
            parts = [divide(sizes, n) for sizes, n in zip(by_group, amounts, strict=True)]
            return np.concatenate(parts)[: len(totals)]

        return share


def equal_width(scored: Ordering, by: str, count: int) -> Strata:
    """Return strata of equal width between the lowest and the highest finite score; one scan.

    Infinite scores belong to the outer strata, and the highest score to the last one.
    """
    low, high = np.inf, -np.inf
    for rows in scored.scan():
        scores = score_column(rows.batch, by)
        finite = scores[np.isfinite(scores)]
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))

    def stratum(batch: pa.RecordBatch) -> Int64[ndarray, " n"]:
        scores = score_column(batch, by).astype(np.float64)
        if not high > low:  # one finite value at most
            place = np.where(np.isposinf(scores), 1.0, 0.0)
        else:
            place = (scores - low) / (high - low)
        inner = np.clip(np.nan_to_num(place, nan=0), 0, 1) * count
        found = np.minimum(inner.astype(np.int64), count - 1)
        return np.where(np.isnan(scores), count, found)

    return Strata(by, count, lambda: stratum)
