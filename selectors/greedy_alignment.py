"""Rows whose summed gradients point most along a target's: the greedy search of SELECT."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.divided import Divided
from curate.selectors.inner_products import inner_products, one_row, target_mean
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable, square_norms


@dataclass(frozen=True)
class GreedyAlignment(Divided):
    """Again and again the row j with the largest cos(g_j + sum_{s in S} g_s, target).

    SELECT of Morris et al. 2025 ("Approximating language model training data from weights"), where
    the target is the difference of two models' weights, theta_base - theta_expert; here it is the
    mean of the target's vectors, which must come from the same source as the rows' (the same
    sketch). With `by_group` each group has a sum and a budget of its own; `group_shares=equal` is
    their balanced form. Equal cosines in the order of the table. Ranked without groups.

    Time n·d for each pick; memory some 50 bytes a row.
    """

    uses_vectors: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        target = target_mean(table.target, table.vectors.dimension)
        places = []
        for part in self.parts(table, budget):
            places.append(part.places[align(part.vectors, target, part.sizes, part.amount)])
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        return picked(table, chosen, ranks=ranks)


def align(
    vectors: Vectors, target: Float64[ndarray, " d"], sizes: Int64[ndarray, " n"], amount: int
) -> Int64[ndarray, " k"]:
    """Return rows in the order of the greedy search; it ends before `sizes` exceed `amount`.

    A sum of length 0 has cosine 0.

    Raises:
        ValueError: the target is 0, so that it has no direction.
    """
    length = float(np.linalg.norm(target))
    if not length:
        raise ValueError(
            "the target's mean vector is 0 and points nowhere; is it the gradient of a model "
            "that has nothing left to learn there?"
        )
    along = inner_products(vectors, target / length)
    squares = square_norms(vectors)
    with_sum = np.zeros(vectors.rows)
    sum_along = sum_square = 0.0
    is_left = np.ones(vectors.rows, dtype=bool)
    picks: list[int] = []
    left = amount
    while len(picks) < vectors.rows:
        lengths = np.sqrt(np.maximum(squares + 2 * with_sum + sum_square, 0))
        cosines = np.divide(along + sum_along, lengths, out=np.zeros_like(along), where=lengths > 0)
        best = int(np.argmax(np.where(is_left, cosines, -np.inf)))
        if sizes[best] > left:
            break
        left -= int(sizes[best])
        picks.append(best)
        is_left[best] = False
        sum_along += float(along[best])
        sum_square += float(squares[best] + 2 * with_sum[best])
        if left > 0:
            with_sum += inner_products(vectors, one_row(vectors, best))
    return np.array(picks, dtype=np.int64)
