"""Draw an epoch's rows in proportion to their scores, as PA&DA does."""

from dataclasses import dataclass

import numpy as np

from curate.selectors.draws import Draw
from curate.selectors.importance import check_share, importance_rates
from curate.selectors.protocol import Budget, Selection, Table


@dataclass(frozen=True)
class PaDa(Draw):
    """Rows drawn with replacement with probabilities p_i = tau s_i / sum(s) + (1 - tau) / N.

    The data part of PA&DA (Lu et al. 2023, CVPR; their code draws N rows an epoch with
    tau = epoch / epochs and EL2N as the score). The budget counts draws and the weight, of kind
    `repeat`, is how often a row was drawn. That is biased towards high scores by design;
    `unbiased=True` weighs by counts / (N p) instead. One selection is one epoch: in theirs rows
    that were not drawn lose their score, here a row's score stays. Scores must be finite and not
    negative.
    """

    by: str
    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau)

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        rates = importance_rates(table, self.by, 1 - self.tau)
        return self.draw_again(table, budget, rng, rates)
