"""Keep what the score's source keeps: the end that the scorer's direction names."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.selectors.choose import Choice
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.window import by_score


@dataclass(frozen=True)
class Keep(Choice):
    """The rows at the end of the scores that `direction` names, after `drop_top` of them.

    `direction` is what the scorer's own `direction.keep` says. `drop_top` is a share of the corpus
    rows or a count: it leaves out the very first, which are often mislabelled. Ties: corpus order.
    """

    by: str
    direction: Literal["high", "low"]
    drop_top: float | int = 0

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        return self.choose(by_score(table, self.by, self.direction), budget, self.drop_top)
