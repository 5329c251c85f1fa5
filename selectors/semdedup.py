"""One row of each set of near duplicates: SemDeDup."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from curate.selectors.divided import Divided, Part, within
from curate.selectors.picks import Candidates, picked
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.quantise import SAMPLE, quantise
from curate.selectors.score_keys import sort_keys
from curate.selectors.similar_before import similar_before
from curate.selectors.vectors import UnitVectors, VectorTable

CLUSTER_ROWS = 2048
"""Rows in a cluster, about, unless `clusters` says otherwise."""
SEEN_ROWS = 16_384
"""Rows that k-means sees at least: with a sample of a few, "far from the centroid" is chance."""
EPSILON = 0.05
"""Where neither a budget nor `epsilon` says how similar rows may be."""


@dataclass(frozen=True)
class SemDeDup(Divided):
    """Rows that are not too similar to one that comes before them in their k-means cluster.

    Abbas et al. 2023 (arXiv:2303.09540). Unit vectors are clustered, a cluster is put in order, and
    row j is removed if max over i before j of cos_ij > 1 - epsilon. As in their code a removed row
    still removes others: of a chain of similar rows only the first is kept, though its ends may
    be unlike. Rows of different clusters are never compared.

    `keep` is the order: `"hard"` (their default) has the row farthest from the centroid first,
    `"easy"` the nearest, `"random"` any, `"score"` (the default where `by` is given) the end of
    `by` that `direction` names. Ties: corpus order.

    With `epsilon` a budget is a bound: of more rows than it allows, those least similar to
    one before them. Without `epsilon` the budget is met by the same order, which is that of the
    epsilon that keeps so many; without either, epsilon is 0.05. `similarity`, recorded, is the
    largest that was kept. With `by_group` each group is searched by itself. `clusters` is their
    number in each, by default one for 2048 rows; k-means sees 128 rows for each, all of up to
    16 384 rows. Ranked, the least similar first, without groups.

    Time n·clusters·D for k-means and n·D for each row of a cluster; memory one cluster's vectors.
    """

    by: str | None = None
    direction: Literal["high", "low"] = "high"
    keep: Literal["hard", "easy", "random", "score"] | None = None
    epsilon: float | int | None = None
    clusters: int | None = None
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in (None, "hard", "easy", "random", "score"):
            raise ValueError(f"keep must be hard, easy, random or score, not {self.keep!r}")
        if self.keep == "score" and self.by is None:
            raise ValueError("keep=score needs the score, --by SCORE")
        if self.keep not in (None, "score") and self.by is not None:
            raise ValueError(f"keep={self.keep} makes no use of a score; leave --by out")
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")
        if self.epsilon is not None and not 0 <= self.epsilon <= 2:
            raise ValueError(f"epsilon is 1 - cos, between 0 and 2, not {self.epsilon!r}")
        if isinstance(self.clusters, int) and self.clusters < 1:
            raise ValueError(f"clusters must be a count of at least 1, not {self.clusters!r}")

    @property
    def order(self) -> str:
        """What puts a cluster in order: `keep`, or its default."""
        return self.keep or ("hard" if self.by is None else "score")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        epsilon = EPSILON if self.epsilon is None and _is_all(budget) else self.epsilon
        places, similar, clusters, rows = [], [], 0, 0
        for part in self.parts(table, budget):
            before, count = self._compared(part, int(rng.integers(1 << 31)))
            order = np.argsort(before, kind="stable")
            if epsilon is not None:
                order = order[~(before[order].astype(np.float64) > 1 - epsilon)]
            order = within(order, part.sizes, part.amount)
            places.append(part.places[order])
            similar.append(before[order])
            clusters, rows = clusters + count, rows + len(before)
        chosen = np.concatenate(places)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        params: dict[str, object] = {
            "similarity": max((float(s.max()) for s in similar if len(s)), default=-1.0),
            "used_clusters": clusters,
            "compared": rows,
            "used_keep": self.order,
        }
        params |= {} if epsilon is None else {"used_epsilon": epsilon}
        return picked(table, chosen, ranks=ranks, params=params)

    def _compared(self, part: Part, seed: int) -> tuple[Float32[ndarray, " n"], int]:
        """Return how similar each row is to one before it, and the number of clusters."""
        n = len(part.places)
        count = math.ceil(n / CLUSTER_ROWS) if self.clusters is None else min(self.clusters, n)
        sample = max(SAMPLE, -(-SEEN_ROWS // count))
        found = quantise(UnitVectors(part.vectors), count, seed, sample)
        if self.order == "random":
            key = np.random.default_rng(seed).permutation(n)
        elif self.order == "score":
            assert part.score is not None, "candidates have the score asked for"
            key = sort_keys(part.score, self.direction)
        else:
            key = sort_keys(found.distance, "high" if self.order == "hard" else "low")
        order = np.lexsort((key, found.cluster))
        edges = np.cumsum(found.rows)[:-1]
        return similar_before(part.vectors, np.split(order, edges)), len(found.rows)

    def _amounts(
        self, table: Table, budget: Budget, found: Candidates, sizes: Int64[ndarray, " n"]
    ) -> Int64[ndarray, " g"]:
        if not _is_all(budget):
            return super()._amounts(table, budget, found, sizes)
        return np.bincount(found.group, minlength=len(found.groups))


def _is_all(budget: Budget) -> bool:
    return budget.kind == "fraction" and budget.value == 1
