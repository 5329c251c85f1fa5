"""RS2, repeated random sampling: every epoch a random part of the selection."""

from dataclasses import dataclass
from math import floor

import numpy as np

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.rounds import FreshRounds, Rounds, WalkedRounds
from curate.pipeline.manifests.schedules import Settled
from curate.pipeline.manifests.visits import InRounds, Visits
from curate.selectors.keyed import stream_key

_RS2 = 21  # what a key is for


@dataclass(frozen=True)
class Rs2(Settled):
    """Epoch e shows floor(fraction K + 0.5) of the K rows (at least one), none of them twice.

    Without replacement (the default) the epochs walk through a permutation of the rows and are
    filled from the next one at its end, so that after R epochs every row was shown floor(R m / K)
    or ceil(R m / K) times. With replacement every epoch draws a uniform subset of its own.
    Okanovic et al., ICLR 2024, section 3. The rate schedule should be as long as the training is:
    with a fraction r, r times the epochs' steps.

    Time: each epoch evaluates the permutation once per row. Without replacement and above a
    fraction of 1/2, up to 1 / (1 - fraction) times.
    """

    fraction: float = 0.1
    replacement: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.fraction, bool) or not 0 < self.fraction <= 1:
            raise ValueError(f"the fraction of rs2 must be in (0, 1], not {self.fraction!r}")
        if not isinstance(self.replacement, bool):
            raise ValueError(f"replacement of rs2 must be true or false, not {self.replacement!r}")

    def visits(self, places: Places, epoch: int) -> Visits:
        rows, key = int(places.starts[-1]), stream_key(self.seed, _RS2)
        shown = max(1, floor(self.fraction * rows + 0.5))
        rounds: Rounds = (FreshRounds if self.replacement else WalkedRounds)(rows, shown, key)
        sizes = np.diff(places.starts)
        return InRounds(places, epoch, [rounds], lambda g: np.zeros(sizes[g], dtype=np.int64))
