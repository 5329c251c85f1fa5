"""How far a sample X is from a sample W: KL(p_X || p_W) estimated from distances to neighbours.

With r_il the distance from row i of X to its l-th neighbour in W, and s_i that to its k-th
neighbour among the other rows of X (Wang, Kulkarni and Verdú 2009, for any l and k):

    KL_l = (d/n) Σ_i log(r_il / s_i) + log(k m / (l (n - 1)))

GIO (Everaert and Potts 2024) takes the mean over all orders l = 1 ... m, so that the gradient in
any row of W is never 0. Distances are at least 1e-5 and 1e-8 is added to them before the logarithm,
as in the published code (`grad-info-opt` 0.1.2). Values may be negative. Everything in float64.

Shapes: N rows of X, M rows of W, D dimensions.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.spatial.distance import cdist
from scipy.special import gammaln

EPS, FLOOR, CEILING = 1e-8, 1e-10, 1e20
"""Added to distances; the least and the largest square of one."""
_BLOCK_NUMBERS = 1 << 23  # distances held at once: 64 MB


def kl_all_neighbors(
    x: Float64[ndarray, "n d"],
    w: Float64[ndarray, "m d"],
    k: int = 5,
    discard_nearest: bool = False,
) -> float:
    """Return the mean of KL_l over all orders l = 1 ... m: the estimator of GIO's code.

    `discard_nearest` leaves out the nearest row of W of each row of X, for W that holds X itself;
    the constant stays that of m orders, as published.

    Raises:
        ValueError: X has not more than k rows, or W none (two with `discard_nearest`).
    """
    check_samples(len(x), len(w), k, 1 + discard_nearest)
    total = lowest = 0.0
    for distances in distance_blocks(x, w):
        logs = np.log(distances + EPS)
        total += float(logs.sum())
        lowest += float(logs.min(axis=1).sum())
    terms = len(w) - discard_nearest
    mean = (total - discard_nearest * lowest) / (len(x) * terms)
    own = self_term(x, k)
    return float(x.shape[1] * mean - own + all_orders_constant(len(x), len(w), k))


def kl_lth_neighbor(
    x: Float64[ndarray, "n d"], w: Float64[ndarray, "m d"], order: int = 5, k: int = 5
) -> float:
    """Return KL_l for one order l of neighbours in W.

    Raises:
        ValueError: X has not more than k rows, or W fewer than l.
    """
    check_samples(len(x), len(w), k, order)
    total = 0.0
    for distances in distance_blocks(x, w):
        total += float(np.log(np.partition(distances, order - 1, axis=1)[:, order - 1] + EPS).sum())
    mean = total / len(x)
    own = self_term(x, k)
    return float(x.shape[1] * mean - own + one_order_constant(len(x), len(w), order, k))


def self_term(x: Float64[ndarray, "n d"], k: int) -> float:
    """Return (d/n) Σ_i log s_i, the part of the estimate that is X's alone."""
    total = 0.0
    for distances in distance_blocks(x, x):
        # The row itself is the nearest, so the k-th other one comes at k.
        total += float(np.log(np.partition(distances, k, axis=1)[:, k] + EPS).sum())
    return float(x.shape[1] * total / len(x))


def all_orders_constant(n: int, m: int, k: int) -> float:
    """Return the mean of log(k m / (l (n - 1))) over l = 1 ... m."""
    return math.log(k * m / (n - 1)) - float(gammaln(m + 1)) / m


def one_order_constant(n: int, m: int, order: int, k: int) -> float:
    """Return log(k m / (l (n - 1)))."""
    return math.log(k * m / (order * (n - 1)))


def clipped(squares: Float64[ndarray, "..."]) -> Float64[ndarray, "..."]:
    """Return distances from their squares, inside the limits of the published code."""
    return np.asarray(np.sqrt(np.clip(squares, FLOOR, CEILING)))


def distance_blocks(
    x: Float64[ndarray, "n d"], w: Float64[ndarray, "m d"]
) -> Iterator[Float64[ndarray, "b m"]]:
    """Yield the distances of rows of X, some at a time, to all rows of W."""
    rows = max(1, _BLOCK_NUMBERS // max(1, len(w)))
    for start in range(0, len(x), rows):
        # Differences, not products: rows that are close to each other keep their digits.
        yield clipped(cdist(x[start : start + rows], w, "sqeuclidean"))


def check_samples(n: int, m: int, k: int, least: int) -> None:
    """Raise ValueError unless X has more than k rows and W `least`."""
    if n <= k:
        raise ValueError(
            f"the k={k} nearest neighbours inside a target set of {n} rows: give more rows than k, "
            "or a smaller k"
        )
    if m < least:
        raise ValueError(f"a start of {m} rows where the estimate needs {least}; give more rows")
