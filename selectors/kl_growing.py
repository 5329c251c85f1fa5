"""The divergence KL(X || W) of a W that grows row by row: exact increments, never all distances.

For the mean over all orders the sum of all log distances is a sufficient statistic,

    KL(W + g) - KL(W) = d/(m+1) (mean_i log ‖x_i - g‖ - mean_ij log ‖x_i - w_j‖) + C(m+1) - C(m),

and its gradient in one row v is d/(m+1) mean_i (v - x_i)/‖v - x_i‖², whatever W holds. For the l-th
neighbour the l smallest distances of each row of X are, and the gradient in v comes from the rows
whose l-th neighbour v is. Memory: X in float64, and N or N·l distances.

Shapes: N rows of X, M rows of W, D dimensions, L orders.
"""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.kl import (
    CEILING,
    EPS,
    FLOOR,
    all_orders_constant,
    check_samples,
    clipped,
    distance_blocks,
    one_order_constant,
    self_term,
)


@runtime_checkable
class GrowingKl(Protocol):
    """KL(X || W) as W grows."""

    @property
    def m(self) -> int:
        """Rows in W."""
        ...

    @property
    def value(self) -> float: ...

    def value_with(self, row: Float64[ndarray, " d"]) -> float:
        """Return KL(X || W + {row}); W stays as it is."""
        ...

    def add(self, row: Float64[ndarray, " d"]) -> None: ...

    def gradient(self, v: Float64[ndarray, " d"]) -> tuple[Float64[ndarray, " d"], float]:
        """Return the gradient of KL(X || W + {v}) in v, Σ_i c_i (v - x_i), and Σ_i c_i."""
        ...


class _Growing(ABC):
    """X, centred for products that keep their digits, and the numbers of rows."""

    def __init__(self, x: Float64[ndarray, "n d"], m: int, k: int) -> None:
        self.x, self.m, self.k = x, m, k
        self.n, self.d = x.shape
        self._center = x.mean(axis=0)
        self._centred = x - self._center
        self._squares = np.einsum("nd,nd->n", self._centred, self._centred)
        self._self_term = self_term(x, k)

    def distances(self, row: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
        """Return the distances of X's rows to one row, from differences."""
        differences = self.x - row
        return clipped(np.einsum("nd,nd->n", differences, differences))

    def pull(
        self, v: Float64[ndarray, " d"]
    ) -> tuple[Float64[ndarray, " n"], Float64[ndarray, " n"]]:
        """Return the weight of each v - x_i in the gradient of its log distance, and distances."""
        moved = v - self._center
        squares = self._squares - 2 * (self._centred @ moved) + moved @ moved
        distances = clipped(squares)
        inside = (squares > FLOOR) & (squares < CEILING)  # clipped distances have no gradient
        return np.where(inside, 1 / (distances * (distances + EPS)), 0.0), distances

    @abstractmethod
    def weights(self, v: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
        """Return the factor of each v - x_i in the gradient of KL(X || W + {v}) in v."""

    def gradient(self, v: Float64[ndarray, " d"]) -> tuple[Float64[ndarray, " d"], float]:
        weights = self.weights(v)
        total = float(weights.sum())
        return total * (v - self._center) - weights @ self._centred, total


class AllNeighborsKl(_Growing):
    """The mean over all orders of neighbours (`kl_all_neighbors`), W growing."""

    def __init__(
        self,
        x: Float64[ndarray, "n d"],
        w: Float64[ndarray, "m d"],
        k: int = 5,
        discard_nearest: bool = False,
    ) -> None:
        check_samples(len(x), len(w), k, 1 + discard_nearest)
        super().__init__(x, len(w), k)
        self.discard_nearest = discard_nearest
        blocks = [
            (np.log(distances + EPS).sum(axis=1), distances.min(axis=1))
            for distances in distance_blocks(x, w)
        ]
        self._total = float(np.concatenate([total for total, _ in blocks]).sum())
        self._nearest = np.concatenate([nearest for _, nearest in blocks])

    @property
    def value(self) -> float:
        return self._value(self._total, self._nearest, self.m)

    def value_with(self, row: Float64[ndarray, " d"]) -> float:
        distances = self.distances(row)
        total = self._total + float(np.log(distances + EPS).sum())
        return self._value(total, np.minimum(self._nearest, distances), self.m + 1)

    def add(self, row: Float64[ndarray, " d"]) -> None:
        distances = self.distances(row)
        self._total += float(np.log(distances + EPS).sum())
        self._nearest = np.minimum(self._nearest, distances)
        self.m += 1

    def weights(self, v: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
        weights, distances = self.pull(v)
        if self.discard_nearest:  # where v is the nearest it is what is left out
            weights = np.where(distances > self._nearest, weights, 0.0)
        return np.asarray(weights * (self.d / (self.n * (self.m + 1 - self.discard_nearest))))

    def _value(self, total: float, nearest: Float64[ndarray, " n"], m: int) -> float:
        if self.discard_nearest:
            total -= float(np.log(nearest + EPS).sum())
        mean = total / (self.n * (m - self.discard_nearest))
        constant = all_orders_constant(self.n, m, self.k)
        return float(self.d * mean - self._self_term + constant)


class LthNeighborKl(_Growing):
    """One order l of neighbours (`kl_lth_neighbor`), W growing."""

    def __init__(
        self,
        x: Float64[ndarray, "n d"],
        w: Float64[ndarray, "m d"],
        order: int = 5,
        k: int = 5,
    ) -> None:
        check_samples(len(x), len(w), k, order)
        super().__init__(x, len(w), k)
        self.order = order
        # Column l: the distance to the l-th neighbour; 0 to the "0-th" one.
        nearest = [np.sort(np.partition(b, order - 1)[:, :order]) for b in distance_blocks(x, w)]
        self._nearest = np.concatenate(nearest)

    @property
    def value(self) -> float:
        return self._value(self._nearest[:, -1], self.m)

    def value_with(self, row: Float64[ndarray, " d"]) -> float:
        # The new row is the l-th neighbour, or pushes the (l-1)-th there, or changes nothing.
        distances = self.distances(row)
        return self._value(np.clip(distances, self._before, self._nearest[:, -1]), self.m + 1)

    def add(self, row: Float64[ndarray, " d"]) -> None:
        widened = np.concatenate([self._nearest, self.distances(row)[:, None]], axis=1)
        self._nearest = np.sort(widened, axis=1)[:, : self.order]
        self.m += 1

    def weights(self, v: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
        weights, distances = self.pull(v)
        is_lth = (self._before <= distances) & (distances < self._nearest[:, -1])
        return np.asarray(np.where(is_lth, weights * (self.d / self.n), 0.0))

    @property
    def _before(self) -> Float64[ndarray, " n"]:
        """Distances to the neighbours one order nearer."""
        return self._nearest[:, -2] if self.order > 1 else np.zeros(self.n)

    def _value(self, lth: Float64[ndarray, " n"], m: int) -> float:
        mean = float(np.log(lth + EPS).mean())
        constant = one_order_constant(self.n, m, self.order, self.k)
        return float(self.d * mean - self._self_term + constant)
