"""Gradient Information Optimization: rows of a pool, one by one, that bring W closer to X.

Each step lets a free point v descend the divergence KL(X || W + {v}), takes the row of the pool
that is nearest to where v ends, out of the pool, and shows it to the stopping criterion (Everaert
and Potts 2024, algorithm 1; where the published code differs, `variant` "official" follows it).

Shapes: P rows of the pool, N of the target X, M of the start W, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.gio_stop import Limits, MeantStop, PublishedStop, Stop
from curate.selectors.kl_growing import AllNeighborsKl, GrowingKl, LthNeighborKl

VARIANTS = ("official", "l-nn")
BEGINNINGS = ("mean", "prev_opt", "jump")
RUNAWAY = 1e100  # coordinates whose squares a double still holds


@dataclass(frozen=True)
class Descent:
    """How v descends, named as in the published code.

    `v_init`: v begins each step at X's mean ("mean"), where it ended ("prev_opt") or at a random
    row of X ("jump"). `grad_desc_iter` updates v ← v - lr·scale·gradient; three times as many at
    the first step, after a reset, and with probability `random_restart_prob`.

    `scale_factor` None is, in `official`, ‖v‖/‖gradient‖ at the very first v, once for all (0
    where that gradient is 0, so that v stays); in `l-nn` each update goes the share lr of the way
    to the weighted mean of rows of X that the gradient points to, which no translation changes.
    """

    v_init: str = "mean"
    grad_desc_iter: int = 50
    lr: float = 0.01
    scale_factor: float | None = None
    random_restart_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.v_init not in BEGINNINGS:
            known = ", ".join(BEGINNINGS)
            raise ValueError(f"unknown v_init {self.v_init!r}; choose from: {known}")
        if self.grad_desc_iter < 0:
            raise ValueError(f"grad_desc_iter must be 0 or more, not {self.grad_desc_iter!r}")
        if not 0 <= self.random_restart_prob <= 1:
            raise ValueError(
                f"random_restart_prob must be between 0 and 1, not {self.random_restart_prob!r}"
            )


@dataclass(frozen=True)
class Objective:
    """Which divergence: `official`, the mean over all orders of neighbours as published, or ours.

    `l-nn` looks at the l-th neighbour alone (`neighbor`, by default k), so that its gradient
    depends on W: a region of X that W covers already pulls no further. `discard_nearest_for_xy` is
    the published option for X inside the pool, of `official` alone.
    """

    variant: str = "official"
    k: int = 5
    neighbor: int | None = None
    discard_nearest_for_xy: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"unknown variant {self.variant!r}; choose from: {known}")
        for name, value in (("k", self.k), ("neighbor", self.neighbor)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value!r}")
        if self.variant == "official" and self.neighbor is not None:
            raise ValueError("official takes all neighbours; neighbor=L is a setting of l-nn")
        if self.variant != "official" and self.discard_nearest_for_xy:
            raise ValueError(
                "discard_nearest_for_xy is a setting of official; in l-nn choose neighbor=2"
            )

    def growing(self, x: Float64[ndarray, "n d"], w: Float64[ndarray, "m d"]) -> GrowingKl:
        """Return the divergence of X from W.

        Raises:
            ValueError: too few rows for k or l.
        """
        if self.variant == "official":
            return AllNeighborsKl(x, w, self.k, self.discard_nearest_for_xy)
        return LthNeighborKl(x, w, self.neighbor or self.k, self.k)


@dataclass
class Found:
    """What a search accepted, in order, and how the divergence went.

    `rows` are numbers of pool rows, more than once where a reset brought one back. `trace` begins
    with the divergence of the start and has one value for each accepted row. `refused` is the
    divergence with the row that ended the search, if one did.
    """

    rows: list[int] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    resets: int = 0
    stopped: str = ""
    refused: float | None = None


def search(
    pool: Float64[ndarray, "p d"],
    target: Float64[ndarray, "n d"],
    start: Float64[ndarray, "m d"],
    objective: Objective,
    descent: Descent,
    limits: Limits,
    rng: np.random.Generator,
    is_enough: Callable[[int], bool] | None = None,
) -> Found:
    """Return the rows of the pool that GIO accepts; the start is not among them.

    `is_enough(row)` hears of each accepted row and ends the search by returning true.

    Raises:
        ValueError: too few target rows for k, or too few start rows, or the descent runs to
            infinity.
    """
    kl = objective.growing(target, start)
    is_published = objective.variant == "official"
    stop: Stop = (PublishedStop if is_published else MeantStop)(limits, len(pool))
    mean = target.mean(axis=0)

    def beginning() -> Float64[ndarray, " d"]:
        if descent.v_init == "jump":
            return np.asarray(target[int(rng.integers(len(target)))])
        return np.asarray(mean)

    v = beginning()
    scale = descent.scale_factor
    if scale is None and is_published:
        scale = _scale_once(kl, v)
    left = _Pool(pool)
    found = Found(trace=[kl.value])
    many = True
    while left.rows:
        lucky = descent.random_restart_prob > 0 and rng.random() < descent.random_restart_prob
        updates = descent.grad_desc_iter * (3 if many or lucky else 1)
        v = _descended(kl, v, updates, descent.lr, scale)
        row = left.take_nearest(v)
        before, after = found.trace[-1], kl.value_with(pool[row])
        verdict = stop.judge(after, before)
        if descent.v_init != "prev_opt":
            v = beginning()
        many = verdict.is_first_again
        if verdict.then == "reset":
            found.resets += 1
            left = _Pool(pool)
            v = mean if descent.v_init == "prev_opt" else v
        if verdict.is_accepted:
            kl.add(pool[row])
            found.rows.append(row)
            found.trace.append(after)
            if is_enough is not None and is_enough(row):
                found.stopped = "budget"
                break
        if verdict.then == "stop":
            found.stopped = verdict.reason
            found.refused = None if verdict.is_accepted else after
            break
    found.stopped = found.stopped or "pool"
    return found


def _scale_once(kl: GrowingKl, v: Float64[ndarray, " d"]) -> float:
    steepness = float(np.linalg.norm(kl.gradient(v)[0]))
    return float(np.linalg.norm(v)) / steepness if steepness > 0 else 0.0


def _descended(
    kl: GrowingKl, v: Float64[ndarray, " d"], updates: int, lr: float, scale: float | None
) -> Float64[ndarray, " d"]:
    """Return v after these updates; one that has no gradient stays where it is."""
    for _ in range(updates):
        gradient, total = kl.gradient(v)
        if total == 0:
            return v
        v = v - lr * (1 / total if scale is None else scale) * gradient
        if not np.abs(v).max() < RUNAWAY:
            raise ValueError(
                "the descent of gio runs to infinity; give a smaller scale_factor or lr"
            )
    return v


class _Pool:
    """The rows that are left, and which of them is nearest to a point."""

    def __init__(self, rows: Float64[ndarray, "p d"]) -> None:
        self._rows, self._center = rows, rows.mean(axis=0)
        self._centred = rows - self._center
        self._squares = np.einsum("pd,pd->p", self._centred, self._centred)
        self._is_taken = np.zeros(len(rows), dtype=bool)
        self.rows = len(rows)

    def take_nearest(self, v: Float64[ndarray, " d"]) -> int:
        """Return the number of the nearest row, the first of equals, and take it out."""
        moved = v - self._center
        squares = self._squares - 2 * (self._centred @ moved)
        squares[self._is_taken] = np.inf
        # Products find who is close, differences who is nearest: equal rows then are equal.
        rounding = 1e-12 * (np.abs(squares[~self._is_taken]).max() + moved @ moved)
        close = np.flatnonzero(squares <= squares.min() + rounding)
        nearest = np.linalg.norm(self._rows[close] - v, axis=1)
        row = int(close[nearest.argmin()])
        self._is_taken[row] = True
        self.rows -= 1
        return row
