"""Draw rows in proportion to their scores, weighted so that nothing is biased."""

import logging
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.draws import Draw, Rates, read_scores
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import score_column

log = logging.getLogger("curate.selectors")


@dataclass(frozen=True)
class Importance(Draw):
    """Rows drawn with probabilities p_i = (1 - mix) s_i / sum(s) + mix / N, N the scored rows.

    Drawn in proportion to gradient norms, the mean gradient has the least variance (Zhao and Zhang
    2015; Katharopoulos and Fleuret 2018); `mix` bounds the largest weight by 1 / mix. Without
    `replacement` every row comes once and the weight is 1 / its inclusion probability; with it
    the budget counts draws, and a row drawn c times comes once with the weight c / (N p). Both
    are unbiased exactly before the weights are scaled to mean 1 (`selectors/draws.py` says why;
    the manifest records the scale). `unbiased=False`: no weights, or the counts. Rank 0 was drawn
    first. Scores must be finite and not negative. Four scans.
    """

    by: str
    mix: float = 0.0
    replacement: bool = False
    unbiased: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("mix", self.mix)

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        rates = importance_rates(table, self.by, self.mix)
        if zeros := rates.rows - rates.able:
            log.warning(
                "%d rows have score 0 and are never drawn; mix=0.1 gives them a chance", zeros
            )
        draw = self.draw_again if self.replacement else self.draw
        return draw(table, budget, rng, rates)


def importance_rates(table: Table, by: str, mix: float) -> Rates:
    """Return (1 - mix) s / mean(s) + mix as rates, which sum to the number of rows.

    Raises:
        ValueError: a score is negative or not finite, or all are 0 and `mix` is not 1.
    """
    moments, zeros = read_scores(table, by, least=0)
    mean, rows = moments.mean, moments.count
    if not mean and mix < 1:
        raise ValueError(
            f"all scores of {by!r} are 0, so none is more important than another; "
            "use --method random"
        )

    def log_rates(batch: pa.RecordBatch) -> Float64[ndarray, " n"]:
        scores = score_column(batch, by).astype(np.float64)
        with np.errstate(divide="ignore"):
            return np.log((1 - mix) * scores / (mean or 1) + mix)

    return Rates(frozenset({by}), log_rates, rows, rows if mix else rows - zeros, total=rows)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless the value is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1], not {value!r}")
