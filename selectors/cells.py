"""Rows in cells of near ones, for methods that would otherwise compare all rows with all."""

from typing import Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.quantise import quantise
from curate.selectors.vectors import UnitVectors, Vectors


def cells_of(
    vectors: Vectors,
    count: int,
    metric: Literal["cosine", "euclidean"],
    seed: int,
    largest: int | None = None,
) -> list[Int64[ndarray, " _"]]:
    """Return the row numbers of each cluster of k-means, ascending; about `count`, none empty.

    For cosine the vectors are clustered at length 1. A cluster of more than `largest` rows is cut
    into equal parts.
    """
    seen = UnitVectors(vectors) if metric == "cosine" else vectors
    cluster = quantise(seen, count, seed).cluster
    order = np.argsort(cluster, kind="stable")
    cells = np.split(order, np.cumsum(np.bincount(cluster))[:-1])
    if largest is None:
        return cells
    return [part for cell in cells for part in np.array_split(cell, -(-len(cell) // largest))]
