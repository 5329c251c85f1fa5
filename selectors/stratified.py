"""Keep a random sample of every stratum of the score."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.apportion import apportion
from curate.selectors.choose import Choice
from curate.selectors.cut import find_cuts
from curate.selectors.ordering import Candidates, Groups, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.score_keys import score_column, sort_keys
from curate.selectors.strata import Strata, equal_width
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Stratified(Choice):
    """Random rows of `strata` strata of the score, the budget divided among these.

    `edges="width"`: strata of equal width between the lowest and the highest finite score
    (infinite scores belong to the outer strata). `edges="quantile"`: strata of equal size, equal
    scores split in corpus order. `shares="proportional"` gives each stratum its share of the
    rows, `"equal"` the same amount to each; both by largest remainder, and strata too small for
    theirs give the rest to the others. With `by_group` each group's budget is divided so among
    the same strata of its rows. Five scans of the table at most. No ranks.
    """

    by: str
    strata: int = 50
    edges: Literal["width", "quantile"] = "width"
    shares: Literal["proportional", "equal"] = "proportional"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strata < 1:
            raise ValueError(f"strata must be at least 1, not {self.strata}")
        if self.edges not in ("width", "quantile"):
            raise ValueError(f"edges must be width or quantile, not {self.edges!r}")
        if self.shares not in ("proportional", "equal"):
            raise ValueError(f"shares must be proportional or equal, not {self.shares!r}")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        scored = by_score(table, self.by, "low")
        width = self.edges == "width"
        strata = equal_width(scored, self.by, self.strata) if width else self._by_size(scored)
        ordering, share = strata.sampled(scored, random_keys(rng), self._divide, self.budgets)
        return self.choose_in_groups(ordering, budget, share)

    def _divide(self, totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
        sizes = totals.tolist()
        shares = sizes if self.shares == "proportional" else [1] * len(sizes)
        return np.array(apportion(amount, shares, sizes), dtype=np.int64)

    def _by_size(self, scored: Ordering) -> Strata:
        inner = range(1, self.strata)
        fronts, _ = find_cuts(scored, lambda n: [n * i // self.strata for i in inner])

        def fresh() -> Groups:
            insides = [front.mask() for front in fronts]

            def stratum(batch: pa.RecordBatch) -> Int64[ndarray, " n"]:
                scores = score_column(batch, self.by)
                there = np.flatnonzero(~np.isnan(scores))
                zeros, ones = np.zeros(len(there), np.int64), np.ones(len(there), np.int64)
                rows = Candidates(batch, sort_keys(scores[there], "low"), zeros, ones)
                found = np.full(len(scores), self.strata, dtype=np.int64)
                found[there] = self.strata - 1 - sum(inside(rows) for inside in insides)
                return found

            return stratum

        return Strata(self.by, self.strata, fresh)
