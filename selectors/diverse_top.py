"""High scores that do not repeat each other: maximal marginal relevance."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.stats import rankdata

from curate.selectors.divided import Divided, within
from curate.selectors.farthest import FarthestFirst
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable


@dataclass(frozen=True)
class DiverseTop(Divided):
    """Again and again the row with the largest trade r_i - (1 - trade) max_{j in S} cos(v_i, v_j).

    Carbonell and Goldstein 1998 ("The use of MMR, diversity-based reranking", SIGIR), with a score
    in the place of a query's similarity. r_i is the average rank of the score among the candidates
    of its group over their number, in (0, 1], 1 at the end that `direction` keeps, so that scores
    of any unit are weighed against cosines. `trade=1` is the top of the score, `trade=0` rows
    far from each other that begin with the best score; the term in S is 0 for the first row.
    Equal values: the better score, then the order of the table. Ranked without groups.

    Exact, in less than one pass for each row chosen: the value of a row only falls, so those below
    the best are not compared again (`farthest`). Memory up to 100 bytes a row and 8·D a pick.
    """

    by: str
    direction: str = "high"
    trade: float | int = 0.7
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if isinstance(self.trade, bool) or not 0 <= self.trade <= 1:
            raise ValueError(f"trade must be a number in [0, 1], not {self.trade!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places = []
        for part in self.parts(table, budget):
            assert part.score is not None, "candidates have scores"
            better = part.score if self.direction == "high" else -part.score
            worth = rankdata(better) / len(better)
            order = marginal(part.vectors, worth, self.trade, part.sizes, part.amount)
            places.append(part.places[order])
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        return picked(table, chosen, ranks=ranks)


def marginal(
    vectors: Vectors,
    worth: Float64[ndarray, " n"],
    trade: float | int,
    sizes: Int64[ndarray, " n"],
    amount: int,
) -> Int64[ndarray, " k"]:
    """Return rows in the order of their marginal worth, within `amount` of `sizes`."""
    best_first = np.argsort(-worth, kind="stable")
    if trade == 1:
        return within(best_first, sizes, amount)
    return _Marginal(vectors, worth, trade, best_first).fill(sizes, amount)


class _Marginal(FarthestFirst):
    """Rows by their marginal worth, which only falls as rows are chosen, like distances do."""

    def __init__(
        self,
        vectors: Vectors,
        worth: Float64[ndarray, " n"],
        trade: float | int,
        best_first: Int64[ndarray, " n"],
    ) -> None:
        self._worth, self._trade = worth, trade
        starts = best_first[:1].tolist()
        # Blocks of rows of about the same worth: most of the worthless are never looked at.
        super().__init__(vectors, "angle", starts=starts, cells=[best_first])

    def values(self, rows: Int64[ndarray, " b"]) -> Float64[ndarray, " b"]:
        cosine = 1 - self._squares[rows].astype(np.float64) / 2  # with the nearest chosen row
        return np.asarray(self._trade * self._worth[rows] - (1 - self._trade) * cosine)
