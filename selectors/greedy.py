"""Greedy maximisation of a monotone submodular function under a budget: lazy and stochastic.

Shapes: N candidates, K picks.
"""

import math
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray


@runtime_checkable
class Gains(Protocol):
    """A set function seen from what has been chosen so far; what a row adds never grows."""

    @property
    def batch(self) -> int:
        """How many rows are best looked at together."""
        ...

    def gains(self, rows: Int64[ndarray, " k"]) -> Float32[ndarray, " k"]: ...

    def add(self, row: int) -> None: ...


Order = tuple[Int64[ndarray, " k"], Float32[ndarray, " k"]]
"""Rows in the order in which they were taken, and what each added."""


def lazy_greedy(
    function: Gains, sizes: Int64[ndarray, " n"], amount: int, least: float = -math.inf
) -> Order:
    """Return the rows that greedy takes: always the one that adds most, the earliest of equals.

    Minoux 1978: what a row added when it was last looked at is an upper bound of what it adds now,
    so only rows whose bound is the highest are looked at again. The result is that of plain greedy
    and, with sizes of 1, at least 1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978). It ends
    before the row whose size would exceed `amount`, and before one that adds less than `least`.
    """
    n = len(sizes)
    bounds = _Bounds(function.gains(np.arange(n)))
    fresh = np.zeros(n, dtype=np.int64)  # how many rows were chosen when the bound was made
    order: list[int] = []
    added: list[float] = []
    while len(order) < n:
        row = bounds.top()
        if fresh[row] != len(order):
            stale = bounds.first(function.batch, fresh != len(order))
            bounds.lower(stale, function.gains(stale))
            fresh[stale] = len(order)
            continue
        gain = float(bounds.values[row])
        if sizes[row] > amount or gain < least:
            break
        amount -= int(sizes[row])
        order.append(row)
        added.append(gain)
        bounds.lower(np.array([row]), np.array([-np.inf], dtype=np.float32))
        function.add(row)
    return np.array(order, dtype=np.int64), np.array(added, dtype=np.float32)


def stochastic_greedy(
    function: Gains,
    sizes: Int64[ndarray, " n"],
    amount: int,
    rng: np.random.Generator,
    epsilon: float = 0.01,
) -> Order:
    """Return rows that are each the best of a random sample of those left.

    Mirzasoleiman et al. 2015 (arXiv:1409.7938, algorithm 1): samples of n/k ln(1/epsilon) rows,
    k the picks, give 1 - 1/e - epsilon of the best in expectation.
    """
    n = len(sizes)
    picks = max(1, amount * n // max(1, int(sizes.sum())))
    sample = math.ceil(n / picks * math.log(1 / epsilon))
    left = np.arange(n)
    order: list[int] = []
    added: list[float] = []
    while len(left):
        drawn = np.sort(rng.choice(len(left), min(sample, len(left)), replace=False))
        gains = function.gains(left[drawn])
        best = int(drawn[np.argmax(gains)])
        row = int(left[best])
        if sizes[row] > amount:
            break
        amount -= int(sizes[row])
        order.append(row)
        added.append(float(gains.max()))
        left = np.delete(left, best)
        function.add(row)
    return np.array(order, dtype=np.int64), np.array(added, dtype=np.float32)


class _Bounds:
    """Numbers of which the largest is wanted again and again while they fall."""

    def __init__(self, values: Float32[ndarray, " n"]) -> None:
        self.values = values
        self._width = max(1, math.isqrt(len(values)))
        self._starts = np.arange(0, len(values), self._width)
        self._highest = np.maximum.reduceat(values, self._starts)

    def top(self) -> int:
        """Return the place of the largest, the first of equals."""
        start = int(self._starts[np.argmax(self._highest)])
        return start + int(np.argmax(self.values[start : start + self._width]))

    def first(self, count: int, among: ndarray) -> Int64[ndarray, " k"]:
        """Return the places of the `count` largest among those marked, ascending."""
        if count == 1:
            return np.array([self.top()])
        places = np.flatnonzero(among)
        if len(places) > count:
            cut = np.argpartition(-self.values[places], count - 1)[:count]
            places = np.union1d(places[cut], self.top())
        return places

    def lower(self, places: Int64[ndarray, " k"], values: Float32[ndarray, " k"]) -> None:
        self.values[places] = values
        for block in np.unique(places // self._width):
            start = int(self._starts[block])
            self._highest[block] = self.values[start : start + self._width].max()
