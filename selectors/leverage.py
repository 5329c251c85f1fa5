"""Rows drawn by how much they alone decide of a linear fit: leverage, root leverage, Lewis weights.

Shapes: n rows, d coordinates, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.added_column import AddedColumn
from curate.selectors.draws import Draw
from curate.selectors.importance import importance_rates
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable, part_of

COLUMN = "leverage (computed)"
NOISE = 1e-12  # squares of singular values below this share of the largest are rounding of float32
STILL = 1e-9
KINDS = ("leverage", "root_leverage", "lewis")


@dataclass(frozen=True)
class Leverage(Draw):
    """Rows drawn in proportion to a bound on max_x |a_i·x|^p / sum_j |a_j·x|^p over their vectors.

    - `kind="leverage"`, p = 2: sigma_i = a_i'(A'A)⁺a_i, which is that maximum. Adds up to the rank.
    - `kind="root_leverage"`, 1 <= p < 2: the square root of sigma_i (Woodruff and Yasuda 2023,
      "Sharper bounds for lp sensitivity sampling", ICML, section 1.2).
    - `kind="lewis"`, 1 <= p < 4: the weights with w_i^(2/p) = a_i'(A'W^(1-2/p)A)⁺a_i, found by the
      contraction of Cohen and Peng 2015 (arXiv:1412.0588, section 3), with relaxation. Adds up to
      the rank.

    Drawn without replacement as `importance` draws, so that the budget is met exactly: a row's
    chance is 1 - exp(-T sigma_i), nearly proportional to sigma_i where small and never above 1, as
    min(1, alpha sigma_i) of the sources is. The loss weight 1 / chance
    keeps sums of |a·x|^p unbiased; it is the p-th power of q^(-1/p), by which the sources scale a
    row. Rows of zeros are never drawn. `unbiased=False` writes no weights. Rank 0 was drawn first.

    Time n·d² for each pass: one for the Gram matrix and one for sigma; Lewis weights take some 40.
    Memory: d² and 24 bytes a row.
    """

    kind: str = "leverage"
    p: float | int | None = None
    unbiased: bool = field(default=True, kw_only=True)
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        least, below = {"leverage": (2, 2), "root_leverage": (1, 2), "lewis": (1, 4)}[self.kind]
        if self.p is None and self.kind == "lewis":
            raise ValueError("Lewis weights belong to an exponent: give p in [1, 4)")
        if self.p is None:
            return
        is_number = isinstance(self.p, int | float) and not isinstance(self.p, bool)
        if not is_number or not (least <= self.p < below or self.p == least):
            allowed = "2" if least == below else f"in [{least}, {below})"
            raise ValueError(f"kind {self.kind} has p {allowed}, not {self.p!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        places = candidates(table).places
        vectors = part_of(table.vectors, places)
        values = np.full(table.rows, np.nan)
        if self.kind == "lewis":
            assert self.p is not None, "checked above"
            values[places] = lewis_weights(vectors, float(self.p))
        else:
            found = leverage(vectors)
            values[places] = found if self.kind == "leverage" else np.sqrt(found)
        added = AddedColumn(table, COLUMN, values)
        selection = self.draw(added, budget, rng, importance_rates(added, COLUMN, mix=0.0))
        selection.params["total"] = float(np.nansum(values))
        return selection


def leverage(vectors: Vectors) -> Float64[ndarray, " n"]:
    """Return a_i'(A'A)⁺a_i of every row, in [0, 1]; two passes.

    Directions in which all rows together are less than 1e-6 of the longest direction are taken as
    rounding of float32.

    Raises:
        ValueError: all vectors are 0.
    """
    found = _quadratic(vectors, _root_inverse(_gram(vectors, None)))
    return np.asarray(np.minimum(found, 1.0))


def lewis_weights(vectors: Vectors, p: float | int, most: int = 200) -> Float64[ndarray, " n"]:
    """Return the lp Lewis weights of every row: w^(2/p) = a'(A'W^(1-2/p)A)⁺a, w = 0 for a = 0.

    Each step takes two passes. The plain step has derivatives between 0 and 1 - p/2 in log w; going
    2 / (1 + p/2) of it brings log w nearer by |1 - p/2| / (1 + p/2), also for p near 4.

    Raises:
        ValueError: all vectors are 0, or it does not settle in `most` steps.
    """
    weights, stride = np.ones(vectors.rows), 2 / (1 + p / 2)
    for _ in range(most):
        base = np.where(weights > 0, weights, 1.0)
        form = _quadratic(vectors, _root_inverse(_gram(vectors, base ** (1 - 2 / p))))
        following = base ** (1 - stride) * form ** (stride * p / 2)
        moved = np.abs(following - weights).max()
        weights = following
        if moved <= STILL:
            return weights
    raise ValueError(
        f"the Lewis weights for p={p:g} do not settle in {most} steps; choose p nearer 2"
    )


def _gram(vectors: Vectors, scale: Float64[ndarray, " n"] | None) -> Float64[ndarray, "d d"]:
    """Return the sum of scale_i a_i a_i'."""
    gram = np.zeros((vectors.dimension, vectors.dimension))
    for at, block in _wide(vectors):
        left = block if scale is None else block * scale[at : at + len(block), None]
        gram += left.T @ block
    return gram


def _root_inverse(gram: Float64[ndarray, "d d"]) -> Float64[ndarray, "d r"]:
    """Return R with R R' = gram⁺."""
    values, directions = np.linalg.eigh(gram)
    if not values[-1] > 0:
        raise ValueError("all vectors are 0, so no row has leverage")
    large = values > NOISE * values[-1]
    return np.asarray(directions[:, large] / np.sqrt(values[large]))


def _quadratic(vectors: Vectors, root: Float64[ndarray, "d r"]) -> Float64[ndarray, " n"]:
    """Return |a_i' root|² of every row."""
    parts = [np.square(block @ root).sum(axis=1) for _, block in _wide(vectors)]
    return np.concatenate(parts)


def _wide(vectors: Vectors) -> Iterator[tuple[int, Float64[ndarray, "b d"]]]:
    """Yield blocks in float64 and the number of their first row."""
    at = 0
    for block in vectors.blocks():
        yield at, block.astype(np.float64)
        at += len(block)
