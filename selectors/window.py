"""Keep a window of the rows in the order of their scores."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.selectors.budget import need_score
from curate.selectors.choose import Choice
from curate.selectors.ordering import Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import score_column, sort_keys


@dataclass(frozen=True)
class Window(Choice):
    """The budget's rows after `drop_top` from the hard end, or from `offset` in ascending order.

    `direction` says which end is hard: "high" (the default) counts down from the highest score.
    With `offset`, 0 too, the rows are `argsort()[offset : offset + size]`, ascending: how the
    code of "Deep Learning on a Data Diet" (Paul et al. 2021) slides its window. Both are a count
    of rows or a share in [0, 1) of the corpus rows; not both at once. Ties: corpus order. Rank 0
    is the row that the window begins with. A window that reaches past the end is cut there.
    """

    by: str
    direction: Literal["high", "low"] = "high"
    drop_top: float | int = 0
    offset: float | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if self.drop_top and self.offset is not None:
            raise ValueError(
                "drop_top counts from the hard end and offset from the lowest score; give one"
            )

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        if self.offset is not None:
            return self.choose(by_score(table, self.by, "low"), budget, self.offset)
        return self.choose(by_score(table, self.by, self.direction), budget, self.drop_top)


def by_score(table: Table, by: str, first: Literal["high", "low"]) -> Ordering:
    """Return the table in the order of a score column, from the end that comes first.

    Raises:
        ValueError: there is no such column, or it holds no numbers.
    """
    need_score(table, by)
    return Ordering(table, frozenset({by}), lambda batch: sort_keys(score_column(batch, by), first))
