"""SeTa: a random part of the rows, grouped by loss, and a window over the groups that slides."""

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray
from sklearn.cluster import KMeans

from curate.pipeline.manifests.loss_driven import LossDriven

SAMPLE = 1 << 18
"""Losses that the clusters are found on; the rest only join the nearest."""


class SeTa(LossDriven):
    """Window of round(groups * window) loss groups, from easy to hard and round again.

    Each epoch: a random share clip(1 - ratio, 0.1, 1) of all rows; k-means of their last losses in
    one dimension into `groups`, ordered by mean loss; the groups `start` .. `start + window - 1`,
    where start runs 0, 1, ... through all places and begins again. The first epoch takes all groups
    (all losses are equal then). From epoch delta * epochs on, the random share alone. Losses are
    not rescaled, so the gradient is biased by design. Zhou et al., CVPR 2025, and their code.

    Equal losses never part: with fewer distinct losses than groups there are fewer groups.
    """

    name = "seta"

    def __init__(
        self,
        rows: int,
        epochs: int,
        seed: int = 0,
        ratio: float = 0.0,
        groups: int = 10,
        window: float = 0.5,
        delta: float = 0.875,
    ) -> None:
        super().__init__(rows, epochs, seed)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), not {ratio!r}")
        if not isinstance(groups, int) or groups < 1 or not 0 < window <= 1:
            raise ValueError(
                "groups must be a whole number from 1 and window in (0, 1], "
                f"not {groups!r} and {window!r}"
            )
        if not 0 <= delta <= 1:
            raise ValueError(f"delta must be a share of the epochs in [0, 1], not {delta!r}")
        self.ratio, self.groups, self.window, self.delta = ratio, groups, window, delta

    def choose(self, epoch: int) -> tuple[Int64[ndarray, " n"], Float32[ndarray, " n"]]:
        share = min(1.0, max(0.1, 1 - self.ratio))
        everything = np.arange(self.rows, dtype=np.int64)
        part = self._random(everything, max(1, int(share * self.rows + 1e-9)), epoch)
        if 0 < epoch < self.delta * self.epochs:
            number, group = loss_groups(self.losses[part], self.groups)
            width = max(1, round(number * self.window))
            start = self.window_start(epoch, number, width)
            part = part[(group >= start) & (group < start + width)]
        return part, np.ones(len(part), dtype=np.float32)

    @staticmethod
    def window_start(epoch: int, groups: int, width: int) -> int:
        """Return the first group of the window; the first windowed epoch is epoch 1."""
        return (epoch - 1) % (groups - width + 1)


def loss_groups(losses: Float32[ndarray, " n"], groups: int) -> tuple[int, Int64[ndarray, " n"]]:
    """Return how many groups there are, and each loss's group, numbered by rising mean."""
    distinct = np.unique(losses)
    number = min(groups, len(distinct))
    if number == 1:
        return 1, np.zeros(len(losses), dtype=np.int64)
    values = losses.astype(np.float64).reshape(-1, 1)
    found = KMeans(number, random_state=0, n_init=1).fit(values[:: -(-len(values) // SAMPLE)])
    centers = np.unique(found.cluster_centers_.ravel())
    # In one dimension the nearest centre is a matter of the points half-way between centres.
    edges = (centers[1:] + centers[:-1]) / 2
    group = np.searchsorted(edges, values.ravel(), side="right")
    used, dense = np.unique(group, return_inverse=True)
    return len(used), dense.astype(np.int64)
