"""Cooldown: groups are upsampled by temperature first, and shown as they are at the end."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.rounds import WalkedRounds
from curate.pipeline.manifests.schedules import Settled
from curate.pipeline.manifests.visits import InRounds, Visits
from curate.selectors.apportion import apportion
from curate.selectors.keyed import stream_key

_COOLDOWN = 23  # what a key is for


@dataclass(frozen=True)
class Cooldown(Settled):
    """Group i gets the share n_i^(1/t) / sum_j n_j^(1/t) of an epoch's K presentations.

    t is `temperature` in the first `hot` share of the epochs and 1 (every row once) afterwards. Li
    et al., NAACL 2025, "Upsample or Upweight?", section 5, who take 5 and one half. Presentations
    are whole numbers by largest remainder. Within a group all rows are shown equally often up to
    one, over all hot epochs together: a group that gives room to others is walked through.

    `groups` and `rows` name the groups and count their rows; the manifest's column `group` holds
    the place of each row's group among them.
    """

    groups: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    temperature: float = 5.0
    hot: float = 0.5

    @property
    def needs(self) -> tuple[str, ...]:
        return ("group",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.groups or len(self.groups) != len(self.rows):
            raise ValueError("cooldown needs groups, and their numbers of rows beside them")
        if isinstance(self.temperature, bool) or not self.temperature >= 1:
            raise ValueError(f"the temperature must be at least 1, not {self.temperature!r}")
        if isinstance(self.hot, bool) or not 0 <= self.hot <= 1:
            raise ValueError(f"hot is a share of the epochs in [0, 1], not {self.hot!r}")
        if self.epochs is None:
            raise ValueError("cooldown needs its length: say the number of epochs, --epochs")

    def visits(self, places: Places, epoch: int) -> Visits:
        temperature = self.temperature_at(epoch)
        shown = temperature_counts(self.rows, temperature)
        rounds = [
            WalkedRounds(n, m, stream_key(self.seed, _COOLDOWN, i))
            for i, (n, m) in enumerate(zip(self.rows, shown, strict=True))
        ]

        def group_of(group: int) -> Int64[ndarray, " n"]:
            return places.column(group, "group").astype(np.int64)

        return InRounds(places, epoch, rounds, group_of)

    def temperature_at(self, epoch: int) -> float:
        """Return the temperature of an epoch."""
        assert self.epochs is not None, "checked at the start"
        return self.temperature if epoch < self.hot * self.epochs else 1.0


def temperature_shares(rows: Sequence[int], temperature: float) -> list[float]:
    """Return p(i; t) = n_i^(1/t) / sum_j n_j^(1/t) (Li et al. 2025, equation 3).

    Multiplying the loss of group i by p(i; t) / p(i; 1) instead of showing it more often gives the
    same gradient in expectation, with a larger variance (theorems 1 and 2).
    """
    powers = [n ** (1 / temperature) for n in rows]
    return [power / sum(powers) for power in powers]


def temperature_counts(rows: Sequence[int], temperature: float) -> list[int]:
    """Return how often an epoch of sum(rows) presentations shows each group."""
    total = sum(rows)
    powers = [n if temperature == 1 else n ** (1 / temperature) for n in rows]
    return apportion(total, [Fraction(power) for power in powers], [total] * len(rows))
