"""Keep rows at random: the baseline that every other method is measured against."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import UInt32
from numpy import ndarray

from curate.selectors.choose import Choice
from curate.selectors.keyed import row_keys
from curate.selectors.ordering import Keys, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import UNSCORED


@dataclass(frozen=True)
class Random(Choice):
    """A uniform sample without replacement, a function of (seed, shard, row) alone.

    It does not depend on the order of the table or on how it is cut, and a smaller budget with
    the same seed is a subset. Scores are not looked at.
    """

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        return self.choose(Ordering(table, frozenset(), random_keys(rng)), budget)


def random_keys(rng: np.random.Generator) -> Keys:
    """Return keys that put rows in random order; `rng` gives one number, the rest is hashed."""
    key = int(rng.bit_generator.random_raw())  # the one stream that NumPy keeps for ever

    def keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
        shard, row = (batch.column(name).to_numpy() for name in ("shard", "row"))
        # The largest key means "no score"; one row in 4 billion moves down by one.
        return np.asarray(np.minimum(row_keys(key, shard, row), np.uint32(UNSCORED - 1)))

    return keys
