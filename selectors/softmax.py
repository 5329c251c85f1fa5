"""Draw or weigh rows by the softmax of their scores."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, UInt32
from numpy import ndarray

from curate.selectors.choose import Weights
from curate.selectors.draws import Draw, Rates
from curate.selectors.gumbel import check_tau, log_rates
from curate.selectors.ordering import Candidates, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.score_keys import UNSCORED, score_column


@dataclass(frozen=True)
class Softmax(Draw):
    """Rows drawn, or weighted, in proportion to exp(tau z), z = (score - mean) / deviation.

    The weights of PRESENCE (Thakkar et al. 2023) with the score in the place of their
    self-influence, standardised over all scored rows of the table (population deviation; equal
    scores have z = 0) where theirs are over the microbatches of a step. `tau` > 0 favours high
    scores, `tau` < 0 low ones, 0 none; `temperature` is 1 / tau, for those who think so. PRESENCE
    trains with tau = +1 and switches to -1: `switched_tau` says when, and two manifests, one for
    each sign, are its two phases.

    `use="draw"`: without replacement (Gumbel-top-k), unweighted unless `unbiased`.
    `use="weight"`: a uniform sample (all rows with a budget of 1.0) with softmax loss weights.
    Scores must be finite. Four scans.
    """

    by: str
    tau: float | None = None
    temperature: float | None = None
    use: Literal["draw", "weight"] = "draw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use not in ("draw", "weight"):
            raise ValueError(f"use must be draw or weight, not {self.use!r}")
        if self.use == "weight" and self.unbiased:
            raise ValueError("use=weight weighs by the softmax, unbiased undoes it; choose one")
        if self.tau is not None and self.temperature is not None:
            raise ValueError("tau is 1 / temperature; give one of the two")
        if self.temperature is not None and not abs(self.temperature) > 0:
            raise ValueError(f"the temperature must not be 0 or NaN; not {self.temperature!r}")
        check_tau(self.sharpness)

    @property
    def sharpness(self) -> float:
        """The tau that is meant: 1 where nothing is said."""
        if self.temperature is not None:
            return 1 / self.temperature
        return 1.0 if self.tau is None else self.tau

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        rates = log_rates(table, self.by, self.sharpness, scaled=True)
        if self.use == "draw":
            return self.draw(table, budget, rng, rates)
        keys = random_keys(rng)

        def scored_keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
            lacking = np.isnan(score_column(batch, self.by))
            return np.where(lacking, np.uint32(UNSCORED), keys(batch))

        ordering = Ordering(table, rates.columns, scored_keys, passes=rates.can_ring)
        selection = self.choose(ordering, budget, weigh=lambda *_: _softmax(rates))
        return Selection(selection.batches, {**selection.params, "weight_kind": "loss"})


def _softmax(rates: Rates) -> Weights:
    """Return weights in proportion to the rates, in the range of float32."""
    shift = max(0.0, rates.highest - 80)

    def weights(rows: Candidates) -> Float64[ndarray, " n"]:
        return np.asarray(np.exp(rates.log(rows.batch) - shift))

    return weights


def softmax_weights(scores: Float64[ndarray, " n"], tau: float) -> Float64[ndarray, " n"]:
    """Return exp(tau z) / sum, z the standardised scores: the weights of PRESENCE."""
    std = scores.std()
    z = tau * (scores - scores.mean()) / (std if std > 0 else 1.0)
    weights = np.exp(z - z.max())
    return np.asarray(weights / weights.sum())


def switched_tau(step: int, switch: int, first: float = 1.0, then: float = -1.0) -> float:
    """Return the tau of a training step: `first` up to step `switch`, `then` afterwards."""
    return first if step <= switch else then
