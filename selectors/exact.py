"""One row of each set of equal ones."""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt64
from numpy import ndarray

from curate.selectors.budget import budget_rows, check_tokens, need_tokens
from curate.selectors.divided import within
from curate.selectors.keyed import keyed64, mix64
from curate.selectors.picks import Candidates, candidates, picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.score_keys import sort_keys
from curate.selectors.vectors import Vectors, VectorTable

log = logging.getLogger("curate.selectors")
COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Exact:
    """The first row of each set of rows with equal vectors, or the best by a score.

    With `--vectors hash:text` these are rows with the same text (image, ...). With `by` the row of
    a set that comes first from the end `direction` names is kept; of equal scores the earlier.
    Vectors are equal when all their float32 numbers are; 0 and -0 are. They are found by 128-bit
    hashes and then compared. `duplicates`, recorded, is how many rows equal one that is kept.

    A budget is a bound: of more rows than it allows, those with the best scores, without `by` a
    random sample. No ranks. Time: two passes; memory 60 bytes a row.
    """

    by: str | None = None
    direction: Literal["high", "low"] = "high"
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.direction not in ("high", "low"):
            raise ValueError(f"direction must be high or low, not {self.direction!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.by is None else frozenset({self.by})

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        need_tokens(budget, table)
        found = candidates(table, by=self.by)
        order = np.arange(len(found))
        if found.score is not None:
            order = np.argsort(sort_keys(found.score, self.direction), kind="stable")
        kept = order[~is_repeated(table.vectors, found.places[order])]
        duplicates = len(found) - len(kept)
        kept = _bounded(kept, table, found, budget, self.by is None, rng)
        return picked(table, found.places[kept], params={"duplicates": duplicates})


def is_repeated(vectors: Vectors, places: Int64[ndarray, " n"]) -> ndarray:
    """Return which of these places hold a vector that an earlier one of them holds, as booleans."""
    one, two = (hashes[places] for hashes in _hashes(vectors))
    order = np.lexsort((np.arange(len(places)), two, one))
    is_new = np.ones(len(places), dtype=bool)
    is_new[1:] = (np.diff(one[order]) != 0) | (np.diff(two[order]) != 0)
    first = order[np.maximum.accumulate(np.where(is_new, np.arange(len(places)), 0))]
    repeated = np.zeros(len(places), dtype=bool)
    rest = np.flatnonzero(~is_new)
    for start in range(0, len(rest), COMPARED_ROWS):
        some = rest[start : start + COMPARED_ROWS]
        mine, theirs = (vectors.take(places[x[some]]) for x in (order, first))
        repeated[order[some]] = (mine == theirs).all(axis=1)
    return repeated


def _hashes(vectors: Vectors) -> tuple[UInt64[ndarray, " n"], UInt64[ndarray, " n"]]:
    """Return two 64-bit hashes of each vector; equal vectors have equal ones."""
    keys = [keyed64(seed, np.arange(vectors.dimension)) for seed in (1, 2)]
    parts = [[_hash(block, key) for key in keys] for block in vectors.blocks()]
    one, two = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return one, two


def _hash(block: Float32[ndarray, "b d"], key: UInt64[ndarray, " d"]) -> UInt64[ndarray, " b"]:
    bits = (block + np.float32(0)).view(np.uint32).astype(np.uint64)  # -0.0 + 0.0 is 0.0
    mixed = mix64((bits + key).ravel()).reshape(bits.shape)
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))


def _bounded(
    kept: Int64[ndarray, " k"],
    table: VectorTable,
    found: Candidates,
    budget: Budget,
    is_random: bool,
    rng: np.random.Generator,
) -> Int64[ndarray, " m"]:
    """Return as many of the kept rows as the budget allows, the first ones or random ones."""
    sizes, amount = np.ones(len(found), dtype=np.int64), 0
    if budget.kind == "tokens":
        assert found.tokens is not None, "the table counts tokens"
        sizes, amount = found.tokens, int(budget.value)
        check_tokens(amount, int(sizes.sum()))
    else:
        amount = budget_rows(budget, table.rows)
    if sizes[kept].sum() <= amount:
        return kept
    return within(rng.permutation(kept) if is_random else kept, sizes, amount)
