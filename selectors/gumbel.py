"""Draw rows by a column of log weights: Gumbel-top-k."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.draws import Draw, Rates, read_scores
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import score_column


@dataclass(frozen=True)
class Gumbel(Draw):
    """The rows with the highest tau * score + Gumbel noise.

    With a log ratio log p_target(x) - log p_raw(x) as the score this is how DSIR resamples (Xie
    et al. 2023, arXiv:2302.03169, section 3): drawing without replacement in proportion to
    exp(tau * score). Rows have no weights, as theirs, since the point is to look like the target;
    `unbiased=True` undoes that. Rank 0 is the highest. Scores must be finite. Four scans.
    """

    by: str
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tau(self.tau)

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        return self.draw(table, budget, rng, log_rates(table, self.by, self.tau, scaled=False))


def log_rates(table: Table, by: str, tau: float, scaled: bool) -> Rates:
    """Return rates exp(tau * (score - mean)), with the score over its deviation if `scaled`.

    Raises:
        ValueError: a score is not finite.
    """
    moments, _ = read_scores(table, by)
    mean, std = moments.mean, moments.std if scaled else 1.0

    span = (moments.lowest - mean, moments.highest - mean)
    highest = max(tau * far / (std or 1.0) for far in span)

    def rates(batch: pa.RecordBatch) -> Float64[ndarray, " n"]:
        scores = score_column(batch, by).astype(np.float64)
        return tau * (scores - mean) / (std or 1.0)  # equal scores: all 0

    return Rates(frozenset({by}), rates, moments.count, moments.count, highest=highest)


def check_tau(tau: float) -> None:
    """Raise ValueError unless tau is a finite number."""
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not np.isfinite(tau):
        raise ValueError(f"tau must be a finite number, not {tau!r}")
