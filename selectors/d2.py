"""Hard rows that are spread out: message passing over a graph of neighbours, D² pruning."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64
from numpy import ndarray

from curate.selectors.divided import Divided, Part
from curate.selectors.near_rows import NearRows, near_rows
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import VectorTable

EXACT_ROWS = 200_000
"""Above as many rows (of a group) they are cut into cells, unless `cells` says otherwise."""
CELL_ROWS = 4096
FORWARD_ROWS = 65_536


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

    Distances are in the units of the vectors. The graph is exact up to 200 000 rows in a group;
    time n²·D (FAISS). Above that, or with `cells`, the rows are cut into that many cells by k-means
    (by default of about 4096 rows) and a row's neighbours looked for in the `probes` cells nearest
    to it: time about n·4096·`probes`·D, at most twice that. `recall` and
    `stretch` (see NearRows) say how near to the true ones they are. Memory is a few cells', 8 bytes
    for each neighbour of each row, 4 for each cell it looks in and some 120 for each row. Taking k
    rows is some k·sqrt(n) steps.
    """

    by: str
    direction: str = "high"
    neighbors: int = 5
    gamma: float | int = 0.1
    cells: int | None = None
    probes: int = 8
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if isinstance(self.neighbors, bool) or self.neighbors < 1:
            raise ValueError(f"neighbors must be a whole number from 1, not {self.neighbors!r}")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"gamma must be a finite number of at least 0, not {self.gamma!r}")
        if isinstance(self.cells, int) and self.cells < 1:
            raise ValueError(f"cells must be a count of at least 1, not {self.cells!r}")
        if isinstance(self.probes, bool) or self.probes < 1:
            raise ValueError(f"probes must be a whole number from 1, not {self.probes!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places, rows, most, recall, stretch = [], 0, 1, 0.0, 0.0
        for part in self.parts(table, budget):
            assert part.score is not None, "candidates have scores"
            score = part.score.astype(np.float64)
            if not np.isfinite(score).all():
                raise ValueError(f"the score {self.by!r} is infinite in some rows; D2 adds scores")
            score = score if self.direction == "high" else score.max() - score
            graph = self._graph(part, int(rng.integers(1 << 31)))
            order = passed(score, graph.near, graph.away, self.gamma, part.sizes, part.amount)
            places.append(part.places[order])
            rows, most = rows + len(score), max(most, graph.used_cells)
            recall += graph.recall * len(score)
            stretch += graph.stretch * len(score)
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        params: dict[str, object] = {"used_cells": most}
        params |= {"recall": recall / max(1, rows), "stretch": stretch / max(1, rows)}
        return picked(table, chosen, ranks=ranks, params=params)

    def _graph(self, part: Part, seed: int) -> NearRows:
        count = self.cells
        if count is None:
            rows = part.vectors.rows
            count = 1 if rows <= EXACT_ROWS else -(-rows // CELL_ROWS)
        return near_rows(part.vectors, self.neighbors, count, self.probes, seed)


def passed(
    score: Float64[ndarray, " n"],
    near: Int[ndarray, "n k"],
    away: Float32[ndarray, "n k"],
    gamma: float | int,
    sizes: Int64[ndarray, " n"],
    amount: int,
) -> Int64[ndarray, " m"]:
    """Return rows in the order in which message passing takes them, within `amount` of `sizes`.

    A row may be a neighbour of its own in place of one it lacks, at a distance past all. Only the
    highest of each block of sqrt(n) values is looked through for the highest of all.
    """
    n = len(score)
    width = max(1, math.isqrt(n))
    values = np.full((-(-n // width), width), -np.inf)
    value = values.reshape(-1)  # of each row; -inf where it is taken, and after the last
    for start in range(0, n, FORWARD_ROWS):
        some = slice(start, min(start + FORWARD_ROWS, n))
        weight = np.exp(-away[some].astype(np.float64))
        value[some] = score[some] + (weight * score[near[some]]).sum(axis=1)
    highest = values.max(axis=1)
    order: list[int] = []
    left = amount
    while len(order) < n:
        block = int(highest.argmax())
        row = block * width + int(values[block].argmax())
        if sizes[row] > left:
            break
        left -= int(sizes[row])
        order.append(row)
        pull = np.exp(-gamma * away[row].astype(np.float64))
        value[near[row]] -= pull * value[row]
        value[row] = -np.inf
        touched = np.append(near[row], row) // width
        highest[touched] = values[touched].max(axis=1)
    return np.array(order, dtype=np.int64)
