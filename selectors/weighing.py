"""What reweighting methods share: a weight for every row becomes a selection under a budget."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, UInt32
from numpy import ndarray

from curate.selectors.added_column import AddedColumn
from curate.selectors.draws import Draw
from curate.selectors.importance import importance_rates
from curate.selectors.ordering import Candidates, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.random import random_keys
from curate.selectors.score_keys import UNSCORED, score_column

COLUMN = "weight (computed)"


@dataclass(frozen=True, kw_only=True)
class Weighing(Draw):
    """Settings of methods that give each row a weight.

    `use="weight"`: a uniform sample of the budget, all rows with `--budget 1.0`, with these
    weights. `use="draw"`: rows drawn without replacement in proportion to them, unweighted (or,
    with `unbiased`, weighted back to the corpus). Rows without a weight are never chosen, those of
    weight 0 never drawn.
    """

    use: str = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use not in ("weight", "draw"):
            raise ValueError(f"use must be weight or draw, not {self.use!r}")
        if self.use == "weight" and self.unbiased:
            raise ValueError("use=weight writes the weights, unbiased undoes them; choose one")

    def weighed(
        self,
        table: Table,
        values: Float64[ndarray, " n"],
        budget: Budget,
        rng: np.random.Generator,
        params: dict[str, object],
        kind: str = "loss",
    ) -> Selection:
        """Return the budget's rows by these weights of all rows, NaN where a row has none.

        Raises:
            ValueError: all weights are 0.
        """
        added = AddedColumn(table, COLUMN, values)
        if not np.nanmax(values, initial=0.0) > 0:
            raise ValueError("all weights are 0; no row is left to choose")
        if self.use == "draw":
            selection = self.draw(added, budget, rng, importance_rates(added, COLUMN, mix=0.0))
            return replace(selection, params={**selection.params, **params})
        keys = random_keys(rng)

        def weighted_keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
            lacking = np.isnan(score_column(batch, COLUMN))
            return np.where(lacking, np.uint32(UNSCORED), keys(batch))

        def weights(rows: Candidates) -> Float64[ndarray, " n"]:
            return np.asarray(score_column(rows.batch, COLUMN).astype(np.float64))

        ordering = Ordering(added, frozenset({COLUMN}), weighted_keys)
        selection = self.choose(ordering, budget, weigh=lambda *_: weights)
        return Selection(selection.batches, {**selection.params, **params, "weight_kind": kind})
