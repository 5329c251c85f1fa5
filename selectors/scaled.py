"""Vectors times a power of two, so that float32 has room for squares of their distances.

Shapes: D dimensions, B rows of a block, K rows taken.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from curate.selectors.vectors import Vectors


class ScaledVectors:
    """Other vectors times 2^exponent: exact but for numbers that then are below float32's."""

    def __init__(self, whole: Vectors, exponent: int) -> None:
        self._whole = whole
        # In two steps: 2^exponent may be no float32 where the vectors are below its normal ones.
        self._steps = [np.float32(2.0**e) for e in (exponent // 2, exponent - exponent // 2)]

    @property
    def rows(self) -> int:
        return self._whole.rows

    @property
    def dimension(self) -> int:
        return self._whole.dimension

    def blocks(self) -> Iterator[Float32[ndarray, "b d"]]:
        return (self._times(block) for block in self._whole.blocks())

    def take(self, numbers: Int64[ndarray, " k"]) -> Float32[ndarray, "k d"]:
        return self._times(self._whole.take(numbers))

    def _times(self, block: Float32[ndarray, "b d"]) -> Float32[ndarray, "b d"]:
        found = block * self._steps[0]
        found *= self._steps[1]
        return np.asarray(found)


def exponent_of(*several: Vectors | None) -> int:
    """Return e with 2^e times the largest absolute number of all vectors in [1/2, 1); one pass.

    0 where all are 0. They must be finite.
    """
    blocks = (block for vectors in several if vectors is not None for block in vectors.blocks())
    largest = max((float(max(b.max(initial=0), -b.min(initial=0))) for b in blocks), default=0.0)
    return -math.frexp(largest)[1] if largest else 0
