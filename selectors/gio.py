"""Keep the rows that bring what is kept closest to a target set (GIO)."""

import logging
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.budget import budget_rows, check_tokens, need_columns, need_tokens
from curate.selectors.gio_rows import Method, Outcome, Quantisation, Start, gio_rows
from curate.selectors.gio_search import Descent, Objective
from curate.selectors.gio_stop import Limits
from curate.selectors.picks import Candidates, candidates, picked
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.quantise import SAMPLE
from curate.selectors.vectors import Vectors, VectorTable, part_of, usable_target

log = logging.getLogger("curate.selectors")


@dataclass(frozen=True)
class Gio:
    """Gradient Information Optimization (Everaert and Potts 2024): min KL(target || start + kept).

    The pool and the target are quantised to `clusters` and `target_clusters` centroids (0: every
    row alone), GIO runs on the centroids, and the rows of accepted clusters are kept, cluster by
    cluster in the order of acceptance and in a cluster the nearest to its centroid first (this is
    the rank), until the budget is full. With a budget the search goes on until then, unless
    `stop` or `max_iter` is given; without one (or 1.0) `stop` and `max_iter` (100) decide. A row
    whose cluster is accepted again after a reset counts as often.

    `variant` "official" is the published code (`kl_all_neighbors`, `PublishedStop`), "l-nn" is ours
    (`kl_lth_neighbor`, `MeantStop`). By default the former begins at the "mean" and stops at an
    `increase`, ours begins with a "jump" and has a `sequential_increase_tolerance`. The others are
    settings of `Objective`, `Descent`, `Limits` and `Start`, named as in the published code; `base`
    is a column that is true for the rows of the base set, which are never chosen.
    """

    uses_vectors: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    variant: str = "official"
    k: int = 5
    neighbor: int | None = None
    discard_nearest_for_xy: bool = False
    clusters: int = 1500
    target_clusters: int = 1500
    sample: int = SAMPLE
    base: str | None = None
    random_init_pct: float = 0.0
    uniform_start_size: int = 20
    uniform_low: float = -1.0
    uniform_high: float = 1.0
    normalize: bool = True
    v_init: str | None = None
    grad_desc_iter: int = 50
    lr: float = 0.01
    scale_factor: float | None = None
    random_restart_prob: float = 0.0
    stop: str | None = None
    max_iter: int | None = None
    min_difference: float = 0.0
    min_kl: float = 0.0
    max_data_size: float = 1.0
    max_sequential_increases: int = 3
    resets_allowed: bool = False
    max_resets: int = 2

    def __post_init__(self) -> None:
        if self.clusters < 0 or self.target_clusters < 0 or self.sample < 1:
            raise ValueError("clusters, target_clusters and sample are counts")
        if not 0 <= self.random_init_pct <= 1:
            raise ValueError(f"random_init_pct is a share, not {self.random_init_pct!r}")
        if self.base is not None and self.random_init_pct:
            raise ValueError("the start is a base set or a share of the pool, not both")
        if not self.uniform_low < self.uniform_high or self.uniform_start_size < 1:
            raise ValueError("a uniform start needs uniform_low < uniform_high and a size")
        self.method(has_budget=False)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.base is None else frozenset({self.base})

    def method(self, has_budget: bool, base: Vectors | None = None) -> Method:
        """Return the settings, with the defaults that depend on whether a budget decides.

        Raises:
            ValueError: one of them is out of its range.
        """
        is_ours = self.variant != "official"
        # One random row of the target out of reach says little about the next one.
        decides = "sequential_increase_tolerance" if is_ours else "increase"
        criterion = self.stop or ("never" if has_budget else decides)
        bound = self.max_iter if self.max_iter is not None or has_budget else 100
        return Method(
            Start(
                base,
                self.random_init_pct,
                self.uniform_start_size,
                self.uniform_low,
                self.uniform_high,
                self.normalize,
            ),
            Quantisation(self.clusters, self.target_clusters, self.sample),
            Objective(self.variant, self.k, self.neighbor, self.discard_nearest_for_xy),
            Descent(
                self.v_init or ("jump" if is_ours else "mean"),
                self.grad_desc_iter,
                self.lr,
                self.scale_factor,
                self.random_restart_prob,
            ),
            Limits(
                criterion,
                bound,
                self.min_difference,
                self.min_kl,
                self.max_data_size,
                self.max_sequential_increases,
                self.resets_allowed,
                self.max_resets,
            ),
        )

    def select(self, table: Table, budget: Budget, rng: np.random.Generator) -> Selection:
        need_columns(table, self.needs)
        need_tokens(budget, table)
        able = candidates(table)
        sizes = able.tokens if budget.kind == "tokens" else None
        has_budget = not (budget.kind == "fraction" and budget.value == 1)
        by_tokens = budget.kind == "tokens"
        asked = int(budget.value) if by_tokens else budget_rows(budget, table.rows)
        pool, outcome = self._run(table, able, sizes, asked if has_budget else None, rng)
        order = outcome.ordered()
        if not len(order):
            raise ValueError(
                f"gio accepts no row: the first one would take the divergence from "
                f"{outcome.found.trace[0]:.6g} to {outcome.found.refused or np.nan:.6g}; give a "
                "budget, another start or another stop"
            )
        size = np.ones(len(pool), np.int64) if sizes is None else sizes[pool]
        order = order[np.cumsum(size[order]) <= asked]
        if has_budget and outcome.found.stopped != "budget":
            why = outcome.found.stopped
            log.warning("gio ends (%s) with %d rows, less than the budget", why, len(order))
        times = outcome.times[order]
        params: dict[str, object] = outcome.report
        weights = None
        if (times > 1).any():
            weights, params = times.astype(np.float64), {**params, "weight_kind": "repeat"}
        places = able.places[pool[order]]
        return picked(table, places, weights, np.arange(len(order)), params)

    def searched(
        self, table: Table, rng: np.random.Generator
    ) -> tuple[Int64[ndarray, " p"], Outcome]:
        """Return the places of the pool's rows in the table, and what GIO does without a budget.

        Raises:
            ValueError: as `select`, but for a search that accepts no row.
        """
        able = candidates(table)
        pool, outcome = self._run(table, able, None, None, rng)
        return able.places[pool], outcome

    def _run(
        self,
        table: Table,
        able: Candidates,
        sizes: Int64[ndarray, " n"] | None,
        amount: int | None,
        rng: np.random.Generator,
    ) -> tuple[Int64[ndarray, " p"], Outcome]:
        """Return the numbers of the candidates in the pool, and what GIO does with them.

        Raises:
            ValueError: there is no target or no pool, or no row of the base set.
        """
        compared = cast(VectorTable, table)
        if compared.target is None:
            raise ValueError("gio compares with a target set: name its vectors, --target-vectors")
        target = usable_target(compared)
        assert target is not None, "the table has a target"
        pool, base = np.arange(len(able)), None
        if self.base is not None:
            is_base = _flags(table, self.base)[able.places]
            pool = np.flatnonzero(~is_base)
            if not is_base.any() or not len(pool):
                which = "no row" if not is_base.any() else "every row"
                raise ValueError(f"column {self.base!r} is true for {which} with a vector")
            base = part_of(compared.vectors, able.places[is_base])
        vectors = part_of(compared.vectors, able.places[pool])
        method = self.method(amount is not None, base)
        held = None if sizes is None else sizes[pool]
        if held is not None and amount is not None:
            check_tokens(amount, int(held.sum()))
        return pool, gio_rows(vectors, target, method, rng, held, amount)


def _flags(table: Table, column: str) -> "ndarray":
    """Return a column of true and false, or 1 and 0; null is false."""
    kind = table.schema.field(column).type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"column {column!r} holds {kind}; a base set is a column of true or false")
    parts = [
        batch.column(column).cast(pa.bool_()).fill_null(False).to_numpy(zero_copy_only=False)
        for batch in table.scan([column])
    ]
    return np.concatenate(parts)
