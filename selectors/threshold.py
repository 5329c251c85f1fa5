"""Keep the rows whose score passes a limit."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from numpy import ndarray

from curate.selectors.budget import check_tokens
from curate.selectors.choose import Choice
from curate.selectors.cut import find_cuts
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import score_column
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Threshold(Choice):
    """The rows with at_least <= score <= at_most; either limit may be missing, not both.

    The budget is an upper bound: of more rows than it allows, those with the highest scores are
    kept, or with the lowest where only `at_most` is given. Limits are compared in float32, as
    scores are stored. Rows without a score never pass. Ties: corpus order. Of tokens it may not be
    more than all rows with a score hold; finding that out takes one more scan.
    """

    by: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_least is None and self.at_most is None:
            raise ValueError("threshold needs a limit: at_least=..., at_most=... or both")
        if np.isnan([x for x in (self.at_least, self.at_most) if x is not None]).any():
            raise ValueError("a threshold cannot be NaN")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        first: Literal["high", "low"] = "low" if self.at_least is None else "high"
        ordering = by_score(table, self.by, first)
        if budget.kind == "tokens":
            _, totals = find_cuts(self.counted(ordering, budget), lambda totals: [totals])
            check_tokens(int(budget.value), int(totals.sum()))
        ordering = replace(ordering, passes=self._passes)
        return self.choose(ordering, budget, may_fall_short=True)

    def _passes(self, batch: pa.RecordBatch) -> Bool[ndarray, " n"]:
        scores = score_column(batch, self.by)
        passing = ~np.isnan(scores)
        if self.at_least is not None:
            passing &= scores >= np.float32(self.at_least)
        if self.at_most is not None:
            passing &= scores <= np.float32(self.at_most)
        return np.asarray(passing)
