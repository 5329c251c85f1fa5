"""Keep the rows with the highest scores."""

from dataclasses import dataclass

import numpy as np

from curate.selectors.choose import Choice
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Top(Choice):
    """The highest scores, after the highest `drop_top` (a share of the corpus rows, or a count).

    Purely numeric: it does not know what a high score means. Ties: corpus order.
    """

    by: str
    drop_top: float | int = 0

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        return self.choose(by_score(table, self.by, "high"), budget, self.drop_top)
