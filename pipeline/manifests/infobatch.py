"""InfoBatch: leave out part of the well-learned rows, and weight the rest of them up."""

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from curate.pipeline.manifests.loss_driven import LossDriven


class InfoBatch(LossDriven):
    """Of rows whose last loss is below the mean, floor((1 - ratio) n) random ones stay.

    They get the weight 1 / (1 - ratio), all others 1, so that the expected sum of weighted losses
    is the sum of all losses (exactly, where (1 - ratio) n is whole). From epoch delta * epochs on,
    everything with weight 1. The first epoch prunes nothing: all losses are equal. Qin et al., ICLR
    2024, section 3; defaults of their code. Their weights survive into the last epochs where delta
    * epochs is not whole; ours do not. Schedulers that count steps must know of the shorter epochs.
    """

    name = "infobatch"

    def __init__(
        self, rows: int, epochs: int, seed: int = 0, ratio: float = 0.5, delta: float = 0.875
    ) -> None:
        super().__init__(rows, epochs, seed)
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), not {ratio!r}")
        if not 0 <= delta <= 1:
            raise ValueError(f"delta must be a share of the epochs in [0, 1], not {delta!r}")
        self.ratio, self.delta = ratio, delta

    def choose(self, epoch: int) -> tuple[Int64[ndarray, " n"], Float32[ndarray, " n"]]:
        everything = np.arange(self.rows, dtype=np.int64)
        weights = np.ones(self.rows, dtype=np.float32)
        if epoch >= self.delta * self.epochs:
            return everything, weights
        learned = self.losses < self.losses.mean(dtype=np.float64)
        well = np.flatnonzero(learned)
        # The small term keeps 0.3 * 10 from being 2.
        kept = self._random(well, int((1 - self.ratio) * len(well) + 1e-9), epoch)
        weights[kept] = 1 / (1 - self.ratio)
        chosen = np.sort(np.concatenate([np.flatnonzero(~learned), kept]))
        return chosen, weights[chosen]
