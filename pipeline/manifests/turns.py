"""How many rows of each class an epoch shows, so that no class is ever a whole row off its share.

Shapes: C classes, E epochs.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from numpy import ndarray


class Turns:
    """Shares of `shown` rows an epoch in proportion to `rows`, the numbers of rows of C classes.

    A class of n_c rows of K is due q_c = shown n_c / K rows in every epoch. It gets floor(q_c) and
    perhaps one more; these go to the largest remainders in epoch 0 (Hamilton), and later to those
    that have waited: after any number R of epochs a class has had floor(R q_c) or ceil(R q_c). So
    a class too small for a row in each epoch is shown in some of them.

    Giving r seats an epoch to classes that are due f_c < 1 of them (f sums to r), never a seat
    ahead or behind, is proportionate-fair scheduling; the order is PD2 (Anderson and Srinivasan
    2001, "Mixed Pfair/ERfair scheduling of asynchronous periodic tasks", section 2): earliest
    deadline, then those whose next turn overlaps this one, then the longest run of such turns.
    Whole numbers throughout. Time: C log C an epoch, epochs before the one asked for included.
    """

    def __init__(self, rows: Sequence[int], shown: int) -> None:
        self._whole = sum(rows)
        assert min(rows) > 0 and 0 < shown <= self._whole, "shares of nothing"
        due = [divmod(shown * n, self._whole) for n in rows]
        self._floor = np.array([whole for whole, _ in due], dtype=np.int64)
        self._part = [part for _, part in due]  # of `_whole`; Python's integers never overflow
        self._seats = shown - int(self._floor.sum())
        self._given = [0] * len(rows)
        self._before = [np.zeros(len(rows), dtype=np.int64)]

    def before(self, epoch: int) -> Int64[ndarray, "e c"]:
        """Return how many rows of each class were shown before the epochs 0 .. `epoch`."""
        while len(self._before) <= epoch:
            counts = self._floor.copy()
            for c in self._seated(len(self._before) - 1):
                self._given[c] += 1
                counts[c] += 1
            self._before.append(self._before[-1] + counts)
        return np.array(self._before[: epoch + 1])

    def _seated(self, epoch: int) -> list[int]:
        """Return the classes that get a row more in this epoch."""
        waiting = [c for c, part in enumerate(self._part) if part and self._is_released(c, epoch)]
        return sorted(waiting, key=self._urgency)[: self._seats]

    def _is_released(self, c: int, epoch: int) -> bool:
        """True when one more seat is not a whole one ahead of what the class is due by then."""
        return self._given[c] * self._whole // self._part[c] <= epoch

    def _urgency(self, c: int) -> tuple[int, ...]:
        """Return what sorts classes by PD2; of equals the larger share comes first."""
        part, whole, turn = self._part[c], self._whole, self._given[c] + 1
        deadline = _ceil(turn * whole, part)
        overlaps = turn * whole % part != 0
        rest, run = whole - part, 0
        if 2 * part >= whole:  # turns last two epochs or one: how far a delay would be passed on
            run = _ceil(_ceil(deadline * rest, whole) * whole, rest)
        return (deadline, -int(overlaps), -run, -part, c)


@lru_cache(maxsize=8)
def turns_of(rows: tuple[int, ...], shown: int) -> Turns:
    """Return these turns, which remember the epochs that were asked for."""
    return Turns(rows, shown)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
