"""Hard rows that are spread out: message passing over a graph of neighbours, D² pruning."""

import heapq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.divided import Divided
from curate.selectors.inner_products import mean_of
from curate.selectors.neighbors import Neighbors
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable


@dataclass(frozen=True)
class D2(Divided):
    """Rows by a score that neighbours raise beforehand and chosen neighbours lower.

    Maharana, Yadav and Bansal 2024 (arXiv:2310.07931, section 3): each row is joined to its
    `neighbors` nearest rows by Euclidean distance d. Forward, s_i + sum_j exp(-d_ij) s_j (no gamma
    in it, as in the authors' code, and d, not d²). Then the row with the highest value is taken and
    exp(-gamma d) times its value subtracted from each of its neighbours, again and again. A large
    gamma leaves the order of the forward values; a small one takes one row of a dense place
    after another. `direction="low"` counts max(s) - s instead. The stratified form of their code is
    `by_group` on a column of strata. Equal values in the order of the table. Ranked without groups.

    Distances are in the units of the vectors. Time n²d (FAISS); memory the vectors, some 40
    bytes for each neighbour of each row and 200 for each row.
    """

    by: str
    direction: str = "high"
    neighbors: int = 5
    gamma: float | int = 0.1
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if isinstance(self.neighbors, bool) or self.neighbors < 1:
            raise ValueError(f"neighbors must be a whole number from 1, not {self.neighbors!r}")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"gamma must be a finite number of at least 0, not {self.gamma!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places = []
        for part in self.parts(table, budget):
            assert part.score is not None, "candidates have scores"
            score = part.score.astype(np.float64)
            if not np.isfinite(score).all():
                raise ValueError(f"the score {self.by!r} is infinite in some rows; D2 adds scores")
            score = score if self.direction == "high" else score.max() - score
            near, away = nearest(part.vectors, self.neighbors)
            order = passed(score, near, away, self.gamma, part.sizes, part.amount)
            places.append(part.places[order])
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        return picked(table, chosen, ranks=ranks)


def passed(
    score: Float64[ndarray, " n"],
    near: Int64[ndarray, "n k"],
    away: Float64[ndarray, "n k"],
    gamma: float | int,
    sizes: Int64[ndarray, " n"],
    amount: int,
) -> Int64[ndarray, " m"]:
    """Return rows in the order in which message passing takes them, within `amount` of `sizes`."""
    value = score + (np.exp(-away) * score[near]).sum(axis=1)
    pull = np.exp(-gamma * away)
    taken = np.zeros(len(value), dtype=bool)
    queue = [(-v, i) for i, v in enumerate(value.tolist())]
    heapq.heapify(queue)
    order: list[int] = []
    left = amount
    while queue:
        lowest, row = heapq.heappop(queue)
        if taken[row] or -lowest != value[row]:  # entered again with another value
            continue
        if sizes[row] > left:
            break
        left -= int(sizes[row])
        taken[row] = True
        order.append(row)
        value[near[row]] -= pull[row] * value[row]
        for other in near[row].tolist():
            if not taken[other]:
                heapq.heappush(queue, (-float(value[other]), other))
    return np.array(order, dtype=np.int64)


def nearest(vectors: Vectors, k: int) -> tuple[Int64[ndarray, "n k"], Float64[ndarray, "n k"]]:
    """Return each row's k nearest other rows, nearest first, and how far they are.

    Fewer than k where there are fewer rows. Rows are moved by their mean first: FAISS takes
    distances from float32 products, which far from the origin lose their digits.
    """
    mean = mean_of(vectors).astype(np.float32)
    index = Neighbors(vectors.dimension, "euclidean")
    for block in vectors.blocks():
        index.add(block - mean)
    k = min(k, vectors.rows - 1)
    near = np.empty((vectors.rows, k), dtype=np.int64)
    away = np.empty((vectors.rows, k))
    at = 0
    for block in vectors.blocks() if k else ():
        distance, number = index.search(block - mean, k + 1)
        own = number == np.arange(at, at + len(block))[:, None]
        own[~own.any(axis=1), -1] = True  # among copies of itself a row may not find itself
        near[at : at + len(block)] = number[~own].reshape(len(block), k)
        away[at : at + len(block)] = distance[~own].reshape(len(block), k)
        at += len(block)
    return near, away
