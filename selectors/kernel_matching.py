"""Kernel mean matching and its double-weighting form, as one convex program.

Shapes: n source points, t target points, d coordinates.
"""

from dataclasses import dataclass
from typing import Any

import clarabel
import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.sparse import csc_matrix, diags_array, hstack, vstack
from scipy.spatial.distance import cdist

NOTHING = 1e-6  # an interior point never reaches a bound; the mean weight is about 1


@dataclass(frozen=True)
class Matching:
    """Weights of source points (`beta`) and target points (`alpha`), and the distance they leave.

    `objective` is ||sum_i p_i beta_i phi(x_i) - sum_j q_j alpha_j phi(z_j)||² with the shares p, q
    of the points (1/n and 1/t where none are given).
    """

    beta: Float64[ndarray, " n"]
    alpha: Float64[ndarray, " t"]
    objective: float


def match(
    source: Float64[ndarray, "n d"],
    target: Float64[ndarray, "t d"],
    sigma: float | int,
    bound: float | int = 1000.0,
    double: float | int = 1.0,
    slack: float | int | None = None,
    source_shares: Float64[ndarray, " n"] | None = None,
    target_shares: Float64[ndarray, " t"] | None = None,
) -> Matching:
    """Return the weights under which two sets have the nearest means in a Gaussian kernel's space.

    Minimises the objective of `Matching` with phi of exp(-|x - z|² / (2 sigma²)), subject to
    0 <= beta <= bound / sqrt(D), |mean beta - mean alpha| <= slack, 0 <= alpha <= 1 and
    root mean (alpha - 1)² <= 1 - 1/sqrt(D), D = `double` (Segovia-Martín, Mazuelas and Liu 2023,
    "Double-weighting for covariate shift adaptation", ICML, equation 13; means are weighted by the
    shares). D = 1 leaves alpha = 1: kernel mean matching (Huang et al. 2007). `slack` is by default
    1 - 1/sqrt(n), as in both. Solved by Clarabel, an interior-point method, to about 1e-8.

    Time and memory (n + t)³ and (n + t)², without the t where D = 1.

    Raises:
        ValueError: sigma, bound, D or slack are out of their ranges, or leave no weights.
        RuntimeError: the solver gives up.
    """
    for name, value, least in (("sigma", sigma, 0), ("bound", bound, 0), ("D", double, 1)):
        if not (np.isfinite(value) and value >= least and value > 0):
            raise ValueError(f"{name} must be a number {from_least(least)}, not {value!r}")
    n, t = len(source), len(target)
    slack = 1 - 1 / np.sqrt(n) if slack is None else float(slack)
    if not slack >= 0:
        raise ValueError(f"slack must be at least 0, not {slack!r}")
    p = np.full(n, 1 / n) if source_shares is None else source_shares
    q = np.full(t, 1 / t) if target_shares is None else target_shares
    mass = np.concatenate([p, -q])
    form = mass[:, None] * gaussian_kernel(np.vstack([source, target]), sigma) * mass
    radius, most = 1 - 1 / np.sqrt(double), bound / np.sqrt(double)
    if most + slack < 1 - radius:  # mean beta is at most the one, mean alpha at least the other
        raise ValueError(
            f"no weights up to bound / sqrt(D) = {most:g} have a mean within slack = {slack:g} of "
            f"the target's, which is at least {1 - radius:g}; raise bound or slack"
        )
    if radius > 0:
        upper = np.concatenate([np.full(n, most), np.ones(t)])
        found = _solve(form, np.zeros(n + t), upper, mass, (-slack, slack), (radius, q))
        beta, alpha = found[:n], found[n:]
    else:
        pull = form[:n, n:].sum(axis=1)
        beta = _solve(form[:n, :n], pull, np.full(n, most), p, (1 - slack, 1 + slack), None)
        alpha = np.ones(t)
    weights = np.concatenate([beta, alpha])
    return Matching(beta, alpha, float(max(0.0, weights @ form @ weights)))


def from_least(least: int) -> str:
    """Say from where a setting's range starts: 0 itself is not in it, 1 is."""
    return f"of at least {least}" if least else "above 0"


def gaussian_kernel(points: Float64[ndarray, "m d"], sigma: float | int) -> Float64[ndarray, "m m"]:
    """Return exp(-|x - z|² / (2 sigma²)) of all pairs."""
    return np.asarray(np.exp(-cdist(points, points, "sqeuclidean") / (2 * sigma**2)))


def _solve(
    form: Float64[ndarray, "m m"],
    linear: Float64[ndarray, " m"],
    upper: Float64[ndarray, " m"],
    mass: Float64[ndarray, " m"],
    between: tuple[float, float],
    ball: tuple[float, Float64[ndarray, " t"]] | None,
) -> Float64[ndarray, " m"]:
    """Return x in [0, upper] with mass·x `between` for the least x'form x + 2 linear·x.

    With `ball` = (r, q) the last t of x also have sum q (x - 1)² <= r².
    """
    m = len(linear)
    rows: list[Any] = [diags_array(-np.ones(m)), diags_array(np.ones(m)), mass[None], -mass[None]]
    right = [np.zeros(m), upper, np.array([between[1], -between[0]])]
    cones = [clarabel.NonnegativeConeT(2 * m + 2)]
    if ball is not None:
        radius, shares = ball
        roots, t = np.sqrt(shares), len(shares)
        rows += [csc_matrix((1, m)), hstack([csc_matrix((t, m - t)), diags_array(-roots)])]
        right += [np.array([radius]), -roots]
        cones.append(clarabel.SecondOrderConeT(1 + t))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    # Entries of the form are of order 1/m²; the tolerances are for numbers of order 1.
    solver = clarabel.DefaultSolver(
        csc_matrix(np.triu(2 * m * form)),
        2 * m * linear,
        csc_matrix(vstack([csc_matrix(part) for part in rows])),
        np.concatenate(right),
        cones,
        settings,
    )
    solution = solver.solve()
    if str(solution.status) not in ("Solved", "AlmostSolved"):
        raise RuntimeError(f"kernel mean matching was not solved: Clarabel says {solution.status}")
    found = np.clip(np.array(solution.x), 0.0, upper)
    return np.asarray(np.where(found < NOTHING, 0.0, found))
