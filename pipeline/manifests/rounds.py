"""How often each of n rows is shown in round 0, 1, 2, … of m presentations each.

Both kinds answer for any round and any rows, without the rounds before it being run.
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
    """`n` rows, `m` presentations a round."""

    @property
    def n(self) -> int: ...

    @property
    def m(self) -> int: ...

    def times(self, epoch: int, rows: Rows) -> Rows:
        """Return how often that round shows each row; the sum over all rows is `m`."""
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
    _cutoff: "_Cutoffs" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_cutoff", _Cutoffs(self))

    def times(self, epoch: int, rows: Rows) -> Rows:
        each, rest = divmod(self.m, self.n)
        if not rest:
            return np.full(len(rows), each, dtype=np.int64)
        if each:
            walk = WalkedRounds(self.n, rest, self.key)
            return each + walk.times(epoch, rows)
        return self._is_taken(epoch, rows).astype(np.int64)

    def _is_taken(self, epoch: int, rows: Rows) -> IsTaken:
        walk, at = divmod(epoch * self.m, self.n)
        if at + self.m <= self.n:
            return self._is_between(walk, at, at + self.m, rows)
        left = self.n - at
        tail = self._is_between(walk, at, self.n, rows)
        return np.asarray(tail | self._is_between(walk + 1, 0, self.m - left, rows))

    def _is_between(self, walk: int, start: int, stop: int, rows: Rows) -> IsTaken:
        """True for rows that stand at places [start, stop) of this walk; rounds begin or end there.

        A walk is its permutation, but for the first places, which a round shares with the walk
        before: they go to the first rows that this round does not hold yet.
        """
        place = self._permutation(walk).place_of(rows)
        head = self._head(walk)
        if not head or start > head:
            return np.asarray((place >= start) & (place < stop))
        in_head = (place < self._cutoff.of(walk)) & ~self._is_deferred(walk, rows)
        # The rows passed over are within the next round, which reaches past the cut-off.
        return np.asarray(in_head if start == 0 else (place < stop) & ~in_head)

    def _is_deferred(self, walk: int, rows: Rows) -> IsTaken:
        """True for rows that the walk before gave to the round that reaches into this walk."""
        taken = self.m - self._head(walk)
        return self._is_between(walk - 1, self.n - taken, self.n, rows)

    def _head(self, walk: int) -> int:
        """Return how many places of this walk belong to a round that began in the one before."""
        return -(walk * self.n) % self.m

    def _permutation(self, walk: int) -> Permutation:
        return Permutation(self.n, stream_key(self.key, _WALK, walk))


class _Cutoffs:
    """How many places of a walk's permutation its first round reads to find the rows it lacks."""

    def __init__(self, rounds: WalkedRounds) -> None:
        self.of = lru_cache(maxsize=64)(self._find)
        self._rounds = rounds

    def __reduce__(self) -> tuple[object, ...]:
        return (_Cutoffs, (self._rounds,))

    def _find(self, walk: int) -> int:
        rounds, wanted, at = self._rounds, self._rounds._head(walk), 0
        while True:
            places = np.arange(at, min(at + CHUNK, rounds.n), dtype=np.int64)
            rows = rounds._permutation(walk).row_at(places)
            free = np.flatnonzero(~rounds._is_deferred(walk, rows))
            if len(free) >= wanted:
                return at + int(free[wanted - 1]) + 1
            wanted, at = wanted - len(free), at + CHUNK
