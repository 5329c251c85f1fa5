"""Weights of a few rows spread to all: each row takes those of its nearest weighted rows.

Shapes: n rows, m rows with weights, k neighbours.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.budget import need_score
from curate.selectors.clustered import median_distance
from curate.selectors.neighbors import Neighbors
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import score_column
from curate.selectors.vectors import Vectors, VectorTable, part_of
from curate.selectors.weighing import Weighing


@dataclass(frozen=True)
class Propagate(Weighing):
    """Weights w_i = sum_j K_ij w_j / sum_j K_ij over the `neighbors` nearest rows j with a weight.

    Our reading of the last step of "The power of few" (coreset, weights on it, all rows), of
    which only an abstract was found: choose a coreset (`--method moderate`), learn weights on it,
    spread them. The weights are a manifest's (`manifest`, its folder) or a column's (`column` of
    the table, null where a row has none). K_ij = exp(-d² / (2 sigma²)) of Euclidean distances d of
    the vectors; `sigma` is by default the median distance between weighted rows (up to 1000). Where
    all kernels vanish the nearest row's weight is taken. Rows with a weight keep it, unless
    `smooth`.

    Time n·m·d (FAISS); memory the vectors of the m rows and 24 bytes a row.
    """

    column: str | None = None
    manifest: str | None = None
    neighbors: int = 10
    sigma: float | int | None = None
    smooth: bool = False
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.column is None) == (self.manifest is None):
            raise ValueError(
                "give the weights to spread by one of manifest=FOLDER or column=COLUMN"
            )
        if isinstance(self.neighbors, bool) or self.neighbors < 1:
            raise ValueError(f"neighbors must be a whole number from 1, not {self.neighbors!r}")
        if self.sigma is not None and not 0 < self.sigma < np.inf:
            raise ValueError(f"sigma must be a number above 0, not {self.sigma!r}")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({self.column} if self.column is not None else set())

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        rows = candidates(table)
        known = self._known(table)[rows.places]
        weighted = np.flatnonzero(~np.isnan(known))
        if not len(weighted):
            raise ValueError(
                f"no row that may be chosen has a weight in {self.column or self.manifest}"
            )
        weights = known[weighted]
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(
                f"weights in {self.column or self.manifest} must be finite and not negative"
            )
        vectors = part_of(table.vectors, rows.places)
        near = part_of(vectors, weighted)
        found, sigma = spread(vectors, near, weights, self.neighbors, self.sigma)
        if not self.smooth:
            found[weighted] = weights
        values = np.full(table.rows, np.nan)
        values[rows.places] = found
        params: dict[str, object] = {"weighted_rows": len(weighted), "kernel_width": sigma}
        return self.weighed(table, values, budget, rng, params)

    def _known(self, table: Table) -> Float64[ndarray, " n"]:
        """Return the weight of each row of the table, NaN where it has none."""
        if self.column is not None:
            need_score(table, self.column)
            parts = [score_column(batch, self.column) for batch in table.scan([self.column])]
            return np.concatenate(parts).astype(np.float64)
        read = getattr(table, "manifest_weights", None)
        if read is None:
            raise ValueError("the table knows no manifest; give its weights as a column")
        return np.asarray(read())


def spread(
    vectors: Vectors,
    weighted: Vectors,
    weights: Float64[ndarray, " m"],
    neighbors: int,
    sigma: float | int | None = None,
) -> tuple[Float64[ndarray, " n"], float]:
    """Return each row's mean weight of its nearest weighted rows, and the kernel's width."""
    index = Neighbors(vectors.dimension, "euclidean")
    for block in weighted.blocks():
        index.add(block)
    if sigma is None:
        some = np.arange(0, weighted.rows, max(1, -(-weighted.rows // 1000)))
        points = weighted.take(some).astype(np.float64)
        sigma = median_distance(points[::2], points[1::2])
    parts = []
    for block in vectors.blocks():
        distance, number = index.search(block, min(neighbors, weighted.rows))
        power = -np.square(distance.astype(np.float64)) / (2 * sigma**2)
        # Relative to the nearest: the ratio is the same, and never 0 / 0.
        kernel = np.exp(power - power.max(axis=1, keepdims=True))
        parts.append((kernel * weights[number]).sum(axis=1) / kernel.sum(axis=1))
    return np.concatenate(parts), float(sigma)
