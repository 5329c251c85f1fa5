"""Matching pursuit with weights of at least 0: few vectors whose weighted sum is near a target.

Shapes: n rows, d coordinates, s rows of the support.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.linalg import cho_solve, cholesky, solve_triangular

Project = Callable[["Float64[ndarray, ' d']"], "Float64[ndarray, ' n']"]
Take = Callable[[int], "Float64[ndarray, ' d']"]

STILL = 1e-6  # inner products of float32 vectors are known to about 1e-7 of the norms


def pursue(
    project: Project,
    take: Take,
    target: Float64[ndarray, " d"],
    sizes: Int64[ndarray, " n"],
    amount: int,
    penalty: float | int,
) -> tuple[Int64[ndarray, " s"], Float64[ndarray, " s"]]:
    """Return rows, as they came, and weights w >= 0 for a small ||A'w - b||² + penalty ||w||².

    Orthogonal matching pursuit as GradMatch uses it (Killamsetty et al. 2021, arXiv:2103.00123,
    algorithm 2): again and again the row whose vector points most along what is left of the
    target `b` joins the support, and all weights of the support are found anew. With w >= 0 that
    is the active-set method of Lawson and Hanson (1974, chapter 23), ended at the budget: the
    objective falls at every step, a row whose weight would be negative leaves the support again,
    and where no row points along the rest any more, the weights are the optimum over all rows and
    there may be fewer than the budget allows.

    `project(v)` gives the inner products of all rows with v, `take(i)` row i. `amount` bounds the
    sum of `sizes` over the support; the first row that would exceed it ends the search. Time: one
    projection and s² for each row that joins, s³ for each that leaves. Memory: s·(s + d).
    """
    support = _Support(target, float(penalty))
    left = amount
    scale = float(np.linalg.norm(target))
    for _ in range(3 * len(sizes)):  # Lawson and Hanson's bound on steps that rounding draws out
        along = project(support.rest())
        along[support.rows] = -np.inf
        best = int(np.argmax(along)) if len(along) else -1
        if best < 0 or along[best] == -np.inf or sizes[best] > left:
            break
        vector = take(best)
        if vector @ support.rest() <= STILL * scale * np.linalg.norm(vector):
            break
        dropped = support.join(best, vector)
        left = amount - int(sizes[support.rows].sum())
        if best in dropped:  # only by rounding: its weight rises from 0 by what was just checked
            break
    return np.array(support.rows, dtype=np.int64), support.weights


class _Support:
    """The rows that carry weight, with the Cholesky factor of their penalised Gram matrix."""

    def __init__(self, target: Float64[ndarray, " d"], penalty: float) -> None:
        self.target, self.penalty = target, penalty
        self.rows: list[int] = []
        self.weights = np.empty(0)
        self._vectors = np.empty((16, len(target)))
        self._factor = np.zeros((16, 16))

    def rest(self) -> Float64[ndarray, " d"]:
        """Return what the weighted sum leaves of the target."""
        return np.asarray(self.target - self.weights @ self._vectors[: len(self.rows)])

    def join(self, row: int, vector: Float64[ndarray, " d"]) -> list[int]:
        """Add a row, find all weights anew, and return the rows that left for it."""
        s = len(self.rows)
        if s == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
            self._factor = np.pad(self._factor, (0, s))
        others = self._vectors[:s] @ vector
        below = solve_triangular(self._factor[:s, :s], others, lower=True) if s else others
        square = float(vector @ vector) + self.penalty
        self._vectors[s] = vector
        self._factor[s, :s] = below
        self._factor[s, s] = np.sqrt(max(square - float(below @ below), 1e-14 * square))
        self.rows.append(row)
        self.weights = np.append(self.weights, 0.0)
        return self._settle()

    def _settle(self) -> list[int]:
        """Go towards the best weights until one reaches 0; that row leaves, and again."""
        dropped: list[int] = []
        while self.rows:
            s = len(self.rows)
            best = cho_solve((self._factor[:s, :s], True), self._vectors[:s] @ self.target)
            if (best > 0).all():
                self.weights = best
                break
            falling = np.flatnonzero(best <= 0)
            steps = self.weights[falling] / (self.weights[falling] - best[falling])
            step = float(steps.min())
            moved = self.weights + step * (best - self.weights)
            gone = np.zeros(s, dtype=bool)
            gone[falling[steps <= step]] = True
            self.weights = moved
            dropped += self._leave(gone)
        return dropped

    def _leave(self, gone: ndarray) -> list[int]:
        out = [row for row, is_gone in zip(self.rows, gone, strict=True) if is_gone]
        self.rows = [row for row, is_gone in zip(self.rows, gone, strict=True) if not is_gone]
        self.weights = self.weights[~gone]
        s = len(self.rows)
        self._vectors[:s] = self._vectors[: len(gone)][~gone]
        if s:
            gram = self._vectors[:s] @ self._vectors[:s].T + self.penalty * np.eye(s)
            self._factor[:s, :s] = cholesky(gram, lower=True)
        return out
