"""Inner products of all rows with a few directions, a block of rows at a time."""

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray

from curate.selectors.vectors import PartOfVectors, Vectors


def inner_products(vectors: Vectors, direction: Float64[ndarray, " d"]) -> Float64[ndarray, " n"]:
    """Return <v_i, direction> of every row; products in float32, one pass.

    The direction is scaled first, so that products of tiny gradients do not vanish. Equal rows have
    equal products wherever they are, and threads change none: BLAS rounds the last rows of a
    matrix, or of a thread's share of it, in another way than the others. The pass takes as long as
    reading the vectors; most rows of others are not copied out of them first.
    """
    scale = float(np.abs(direction).max(initial=0)) or 1.0
    narrow = (direction / scale).astype(np.float32)
    if isinstance(vectors, PartOfVectors) and 2 * vectors.rows >= vectors.whole.rows:
        return np.asarray(_products(vectors.whole, narrow)[vectors.places] * scale)
    return _products(vectors, narrow) * scale


def _products(vectors: Vectors, narrow: Float32[ndarray, " d"]) -> Float64[ndarray, " n"]:
    found = np.empty(vectors.rows)
    at = 0
    for block in vectors.blocks():
        found[at : at + len(block)] = np.einsum("nd,d->n", block, narrow)
        at += len(block)
    return found


def row_sum(vectors: Vectors) -> Float64[ndarray, " d"]:
    """Return the sum of all rows in float64; one pass."""
    total = np.zeros(vectors.dimension)
    for block in vectors.blocks():
        total += block.sum(axis=0, dtype=np.float64)
    return total


def mean_of(vectors: Vectors) -> Float64[ndarray, " d"]:
    """Return the mean vector, summed in float64; one pass."""
    return row_sum(vectors) / vectors.rows


def one_row(vectors: Vectors, number: int) -> Float64[ndarray, " d"]:
    """Return one row in float64."""
    return np.asarray(vectors.take(np.array([number]))[0], dtype=np.float64)


def target_mean(target: Vectors | None, dimension: int) -> Float64[ndarray, " d"]:
    """Return the mean of a target's finite vectors.

    Raises:
        ValueError: there is no target, it is of another dimension, or has no finite vector.
    """
    if target is None:
        raise ValueError("the method compares rows with a target: give --target-vectors")
    if target.dimension != dimension:
        raise ValueError(
            f"the target's vectors have {target.dimension} dimensions, the corpus's {dimension}; "
            "both must come from the same source"
        )
    total, rows = np.zeros(dimension), 0
    for block in target.blocks():
        usable = block[np.isfinite(block).all(axis=1)]
        total += usable.sum(axis=0, dtype=np.float64)
        rows += len(usable)
    if not rows:
        raise ValueError("no row of the target has a vector")
    return np.asarray(total / rows)
