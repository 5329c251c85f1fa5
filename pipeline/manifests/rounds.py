"""How often each of n rows is shown in round 0, 1, 2, … of about m presentations each.

All kinds answer for any round and any rows, without the rounds before it being run.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from curate.pipeline.manifests.permutation import Permutation
from curate.selectors.keyed import stream_key

_FRESH, _WALK = 11, 12  # what a permutation is for (1 to 4 are the epoch's)
CHUNK = 1 << 18

Rows = Int64[ndarray, " n"]
IsTaken = Bool[ndarray, " n"]


class Rounds(Protocol):
    """Rounds over `n` rows."""

    @property
    def n(self) -> int: ...

    def times(self, epoch: int, rows: Rows) -> Rows:
        """Return how often that round shows each row."""
        ...


@dataclass(frozen=True)
class FreshRounds:
    """Each round draws anew: every row floor(m / n) times, and a uniform set of the rest once more.

    With m <= n these are independent uniform subsets without duplicates: RS2 "with replacement"
    (Okanovic et al. 2024, section 3).
    """

    n: int
    m: int
    key: int

    def times(self, epoch: int, rows: Rows) -> Rows:
        each, rest = divmod(self.m, self.n)
        place = Permutation(self.n, stream_key(self.key, _FRESH, epoch)).place_of(rows)
        return each + (place < rest).astype(np.int64)


@dataclass(frozen=True)
class WalkedRounds:
    """Rounds are consecutive stretches of a walk through permutation after permutation of the rows.

    A round that reaches the end of one permutation is filled from the next (Okanovic et al. 2024,
    section 3, "without replacement"; their code wraps modulo n + 1, which makes some rounds short).
    The next permutation defers the rows that this round holds already, so that no round shows a row
    twice. After R rounds every row was shown floor(R m / n) or ceil(R m / n) times.

    With m > n every round shows all rows floor(m / n) times, and walks with the rest.
    """

    n: int
    m: int
    key: int
    _walk: "Walk" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rest = self.m % self.n
        object.__setattr__(self, "_walk", Walk(self.n, self.key, EvenSteps(rest)))

    def times(self, epoch: int, rows: Rows) -> Rows:
        each, rest = divmod(self.m, self.n)
        if not rest:
            return np.full(len(rows), each, dtype=np.int64)
        return each + self._walk.is_taken(epoch, rows).astype(np.int64)


@dataclass(frozen=True)
class UnevenRounds:
    """As `WalkedRounds`, where round e takes `begins[e]` to `begins[e + 1]` of the walk.

    The sizes of any two rounds differ by one at most, and none is above `n`.
    """

    n: int
    key: int
    begins: Int64[ndarray, " e"]
    _walk: "Walk" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = np.diff(self.begins)
        assert np.ptp(sizes) <= 1 and 0 <= sizes.min() and sizes.max() <= self.n, "odd rounds"
        object.__setattr__(self, "_walk", Walk(self.n, self.key, UnevenSteps(self.begins)))

    def times(self, epoch: int, rows: Rows) -> Rows:
        return self._walk.is_taken(epoch, rows).astype(np.int64)


class Steps(Protocol):
    """Where rounds begin, in rows from the start of the first walk."""

    def begin(self, epoch: int) -> int: ...

    def holder(self, place: int) -> int:
        """Return the round that holds this place; of a place after the last, the one after it."""
        ...


@dataclass(frozen=True)
class EvenSteps:
    m: int

    def begin(self, epoch: int) -> int:
        return epoch * self.m

    def holder(self, place: int) -> int:
        return place // self.m


@dataclass(frozen=True)
class UnevenSteps:
    begins: Int64[ndarray, " e"]

    def begin(self, epoch: int) -> int:
        return int(self.begins[epoch])

    def holder(self, place: int) -> int:
        return int(np.searchsorted(self.begins, place, side="right")) - 1


class Walk:
    """Permutation after permutation of n rows, cut into rounds by `steps`."""

    def __init__(self, n: int, key: int, steps: Steps) -> None:
        self.n, self.key, self.steps = n, key, steps
        self.cutoff = lru_cache(maxsize=64)(self._cutoff)

    def __reduce__(self) -> tuple[object, ...]:
        return (Walk, (self.n, self.key, self.steps))

    def is_taken(self, epoch: int, rows: Rows) -> IsTaken:
        """True for the rows that this round shows."""
        begin, end = self.steps.begin(epoch), self.steps.begin(epoch + 1)
        walk, at = divmod(begin, self.n)
        stop = at + end - begin
        if stop <= self.n:
            return self._is_between(walk, at, stop, rows)
        tail = self._is_between(walk, at, self.n, rows)
        return np.asarray(tail | self._is_between(walk + 1, 0, stop - self.n, rows))

    def _is_between(self, walk: int, start: int, stop: int, rows: Rows) -> IsTaken:
        """True for rows that stand at places [start, stop) of this walk; rounds begin or end there.

        A walk is its permutation, but for the first places, which a round shares with the walk
        before: they go to the first rows that this round does not hold yet.
        """
        place = self._permutation(walk).place_of(rows)
        head = self._head(walk)
        if not head or start > head:
            return np.asarray((place >= start) & (place < stop))
        in_head = (place < self.cutoff(walk)) & ~self._is_deferred(walk, rows)
        # The rows passed over are within the next round, which reaches past the cut-off.
        return np.asarray(in_head if start == 0 else (place < stop) & ~in_head)

    def _is_deferred(self, walk: int, rows: Rows) -> IsTaken:
        """True for rows that the walk before gave to the round that reaches into this walk."""
        taken = walk * self.n - self._shared(walk)[0]
        return self._is_between(walk - 1, self.n - taken, self.n, rows)

    def _head(self, walk: int) -> int:
        """Return how many places of this walk belong to a round that began in the one before."""
        return self._shared(walk)[1] - walk * self.n

    def _shared(self, walk: int) -> tuple[int, int]:
        """Return where the round that reaches into this walk begins and ends; empty if none."""
        start = walk * self.n
        holder = self.steps.holder(start)
        if self.steps.begin(holder) == start:
            return start, start
        return self.steps.begin(holder), self.steps.begin(holder + 1)

    def _permutation(self, walk: int) -> Permutation:
        return Permutation(self.n, stream_key(self.key, _WALK, walk))

    def _cutoff(self, walk: int) -> int:
        """Return how many places of the permutation hold the rows that its first round lacks."""
        wanted, at = self._head(walk), 0
        while True:
            places = np.arange(at, min(at + CHUNK, self.n), dtype=np.int64)
            rows = self._permutation(walk).row_at(places)
            free = np.flatnonzero(~self._is_deferred(walk, rows))
            if len(free) >= wanted:
                return at + int(free[wanted - 1]) + 1
            wanted, at = wanted - len(free), at + CHUNK
