"""RS2, repeated random sampling: every epoch a random part of the selection."""

from collections.abc import Callable
from dataclasses import dataclass
from math import floor

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.rounds import FreshRounds, Rounds, UnevenRounds, WalkedRounds
from curate.pipeline.manifests.schedules import Settled
from curate.pipeline.manifests.turns import turns_of
from curate.pipeline.manifests.visits import InRounds, Visits
from curate.selectors.keyed import stream_key

_RS2 = 21  # what a key is for


@dataclass(frozen=True)
class Rs2(Settled):
    """Epoch e shows m = floor(fraction K + 0.5) of the K rows (at least one), none of them twice.

    Without replacement (the default) the epochs walk through a permutation of the rows and are
    filled from the next one at its end, so that after R epochs every row was shown floor(R m / K)
    or ceil(R m / K) times. With replacement every epoch draws a uniform subset of its own.
    Okanovic et al., ICLR 2024, section 3. The rate schedule should be as long as the training is:
    with a fraction r, r times the epochs' steps.

    With `groups`, each epoch is stratified by them: of the n_c rows of a class it shows
    floor(m n_c / K) or one more, by largest remainder in epoch 0, and later such that each class
    has had its share of the epochs so far, rounded down or up (`Turns`). Each class is drawn from,
    or walked through, by itself, so the promise above holds for every row in this form too. (The
    published code rounds every class's share and never shows a class whose share rounds to 0.)
    `groups` and `rows` name the classes and count their rows; the manifest's column `group` holds
    the place of each row's class among them.

    Time: each epoch evaluates the permutation once per row. Without replacement and above a
    fraction of 1/2, up to 1 / (1 - fraction) times.
    """

    fraction: float = 0.1
    replacement: bool = False
    groups: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("group",) if self.groups else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.fraction, bool) or not 0 < self.fraction <= 1:
            raise ValueError(f"the fraction of rs2 must be in (0, 1], not {self.fraction!r}")
        if not isinstance(self.replacement, bool):
            raise ValueError(f"replacement of rs2 must be true or false, not {self.replacement!r}")
        if len(self.groups) != len(self.rows) or any(n < 1 for n in self.rows):
            raise ValueError("groups of rs2 need their numbers of rows beside them, from 1")

    def visits(self, places: Places, epoch: int) -> Visits:
        total, key = int(places.starts[-1]), stream_key(self.seed, _RS2)
        shown = max(1, floor(self.fraction * total + 0.5))
        if self.groups:
            return InRounds(places, epoch, self._rounds(epoch, shown), _groups_of(places))
        rounds: Rounds = (FreshRounds if self.replacement else WalkedRounds)(total, shown, key)
        sizes = np.diff(places.starts)
        return InRounds(places, epoch, [rounds], lambda g: np.zeros(sizes[g], dtype=np.int64))

    def _rounds(self, epoch: int, shown: int) -> list[Rounds]:
        """Return each class's rounds, as far as this epoch."""
        before = turns_of(self.rows, shown).before(epoch + 1)
        keys = [stream_key(self.seed, _RS2, i) for i in range(len(self.rows))]
        if self.replacement:
            sizes = (before[-1] - before[-2]).tolist()
            return [FreshRounds(*each) for each in zip(self.rows, sizes, keys, strict=True)]
        return [UnevenRounds(*each) for each in zip(self.rows, keys, before.T, strict=True)]


def _groups_of(places: Places) -> Callable[[int], Int64[ndarray, " n"]]:
    return lambda index: places.column(index, "group").astype(np.int64)
