"""GIO over rows by way of clusters: quantise, search among the centroids, explode to their rows.

Shapes: N rows of the pool, T of the target, D dimensions, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy import ndarray

from curate.selectors.gio_search import Descent, Found, Objective, search
from curate.selectors.gio_stop import Limits
from curate.selectors.quantise import SAMPLE, Clusters, quantise
from curate.selectors.vectors import Vectors


@dataclass(frozen=True)
class Quantisation:
    """Clusters of the pool and of the target (0: every row alone), and what k-means sees."""

    clusters: int = 1500
    target_clusters: int = 1500
    sample: int = SAMPLE


@dataclass(frozen=True)
class Start:
    """What W begins with: the rows of a base set, a share of the pool, or random points.

    Random points are `uniform_start_size` draws from [low, high]^D, of length 1 if `normalize`,
    as published (there a share of the pool is `random_init_pct`). A share of the pool stays in the
    pool.
    """

    base: Vectors | None = None
    random_init_pct: float = 0.0
    uniform_start_size: int = 20
    uniform_low: float = -1.0
    uniform_high: float = 1.0
    normalize: bool = True

    @property
    def kind(self) -> str:
        if self.base is not None:
            return "base"
        return "random" if self.random_init_pct else "uniform"

    def rows(
        self, pool: Float64[ndarray, "k d"], clusters: int, rng: np.random.Generator
    ) -> Float64[ndarray, "m d"]:
        """Return the first rows of W; a base set of more rows than `clusters` is quantised."""
        if self.base is not None:
            return quantise(self.base, clusters, int(rng.integers(1 << 62))).centroids
        if self.random_init_pct:
            count = int(self.random_init_pct * len(pool))
            return pool[rng.choice(len(pool), count, replace=False)]
        size = (self.uniform_start_size, pool.shape[1])
        points = rng.uniform(self.uniform_low, self.uniform_high, size)
        if not self.normalize:
            return points
        lengths = np.linalg.norm(points, axis=1, keepdims=True)
        return np.asarray(points / np.where(lengths > 0, lengths, 1))


@dataclass(frozen=True)
class Outcome:
    """What GIO did with each row.

    `step` is the step at which the row's cluster was first accepted, from 0, and -1 where it never
    was; `times` how often that was; `distance` that to the centroid.
    """

    step: Int32[ndarray, " n"]
    times: Int32[ndarray, " n"]
    distance: Float32[ndarray, " n"]
    found: Found
    report: dict[str, object]

    def ordered(self) -> Int64[ndarray, " k"]:
        """Return the rows of accepted clusters: by step, nearest to the centroid, then by place."""
        chosen = np.flatnonzero(self.step >= 0)
        return chosen[np.lexsort((self.distance[chosen], self.step[chosen]))]


@dataclass(frozen=True)
class Method:
    """All settings of GIO."""

    start: Start
    quantisation: Quantisation
    objective: Objective
    descent: Descent
    limits: Limits


def gio_rows(
    pool: Vectors,
    target: Vectors,
    method: Method,
    rng: np.random.Generator,
    sizes: Int64[ndarray, " n"] | None = None,
    amount: int | None = None,
) -> Outcome:
    """Return what GIO does with the pool's rows; all vectors must be finite.

    With `amount` the search ends when the accepted clusters hold so much of `sizes` (rows where
    None). Memory: what `quantise` says of the pool and then of the target, and 3 · K · D · 8 bytes
    while searching.

    Raises:
        ValueError: the dimensions differ, or there are too few rows of target or start for k.
    """
    if pool.dimension != target.dimension:
        raise ValueError(
            f"the target's vectors have {target.dimension} dimensions and the pool's "
            f"{pool.dimension}; take both from the same model"
        )
    settings = method.quantisation
    seeds = rng.integers(1 << 62, size=2).tolist()
    clusters = quantise(pool, settings.clusters, seeds[0], settings.sample)
    goal = quantise(target, settings.target_clusters, seeds[1], settings.sample)
    start = method.start.rows(clusters.centroids, settings.clusters, rng)
    holds = clusters.rows if sizes is None else _held(clusters, sizes)
    is_enough = None if amount is None else _until(holds, amount)
    found = search(
        clusters.centroids,
        goal.centroids,
        start,
        method.objective,
        method.descent,
        method.limits,
        rng,
        is_enough,
    )
    step = np.full(len(clusters.centroids), -1, dtype=np.int32)
    chosen = np.array(found.rows, dtype=np.int64)
    step[chosen[::-1]] = np.arange(len(chosen))[::-1]  # the first time stays
    times = np.bincount(chosen, minlength=len(step)).astype(np.int32)
    of = clusters.cluster
    report = _report(method, clusters, goal, len(start), found)
    return Outcome(step[of], times[of], clusters.distance, found, report)


def _held(clusters: Clusters, sizes: Int64[ndarray, " n"]) -> Int64[ndarray, " k"]:
    held = np.zeros(len(clusters.centroids), dtype=np.int64)
    np.add.at(held, clusters.cluster, sizes)
    return held


def _until(holds: Int64[ndarray, " k"], amount: int) -> Callable[[int], bool]:
    """Return the function that hears of accepted clusters and says when they hold the amount."""
    left, seen = amount, set[int]()

    def is_enough(cluster: int) -> bool:
        nonlocal left
        left -= 0 if cluster in seen else int(holds[cluster])
        seen.add(cluster)
        return left <= 0

    return is_enough


def _report(
    method: Method, clusters: Clusters, goal: Clusters, start_rows: int, found: Found
) -> dict[str, object]:
    """Return what a manifest says of a search beside its settings."""
    is_ours = method.objective.variant != "official"
    estimate = "KL of the l-th neighbour (ours)" if is_ours else "KL of all neighbours (published)"
    return {
        "estimate": estimate,
        "start": {"kind": method.start.kind, "rows": start_rows},
        "pool_clusters": len(clusters.centroids),
        "pool_sample_rows": clusters.sample_rows,
        "target_clusters_found": len(goal.centroids),
        "accepted_clusters": len(found.rows),
        "resets": found.resets,
        "stopped": found.stopped,
        "kl_refused": found.refused,
        "kl_trace": found.trace,
    }
