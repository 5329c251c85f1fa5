"""Keep rows of middling score: neither the easiest nor the hardest."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import UInt32
from numpy import ndarray

from curate.selectors.choose import Choice, in_groups
from curate.selectors.cut import find_cuts
from curate.selectors.ordering import Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import key_score, score_column, sort_keys
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Moderate(Choice):
    """The rows closest to the median of `by`.

    Xia et al. 2023 ("Moderate coreset"), with the score in the place of their distance to the
    class centre (which `moderate_center` takes). `closest="rank"`, as their code: the middle of
    the order, of m rows the k from place (m - k) // 2, equal scores in corpus order.
    `closest="value"`: the smallest |score - median|, the median of an even number being the mean
    of the middle two. With `by_group` every group has a median of its own (their code sorts all
    classes together, which keeps no class balance). No ranks with "rank"; with "value" rank 0 is
    nearest.
    """

    by: str
    closest: Literal["rank", "value"] = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.closest not in ("rank", "value"):
            raise ValueError(f"closest must be rank or value, not {self.closest!r}")

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        scored = by_score(table, self.by, "low")
        if self.closest == "rank":
            return self.choose_middle(scored, budget)
        return self.choose(self._by_distance(scored), budget)

    def _by_distance(self, scored: Ordering) -> Ordering:
        """Return the order by distance from the median of the row's group; two scans."""
        if (budgets := self.budgets) is not None:
            scored = in_groups(scored, budgets)
        groups = scored.groups()
        # The cut at place a of m sorted rows has the key of row a.
        middle, _ = find_cuts(scored, lambda m: [np.maximum(m - 1, 0) // 2, m // 2])
        lower, upper = (np.array([key_score(int(k)) for k in cut.key]) for cut in middle)
        median = np.where(np.isnan(upper), lower, (lower + upper) / 2)

        def keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
            scores = score_column(batch, self.by).astype(np.float64)
            group = groups(batch)
            here = median[np.minimum(group, len(median) - 1)]
            with np.errstate(invalid="ignore", over="ignore"):
                # Equal first: an infinite score may be the median, and is then no distance away.
                away = np.where(scores == here, 0.0, np.abs(scores - here))
                return sort_keys(away.astype(np.float32), "low")

        return Ordering(scored.table, scored.columns, keys)
