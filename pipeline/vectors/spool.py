"""A temporary memory-mapped matrix that is written row by row and goes away with its reader."""

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from curate.selectors.vectors import ArrayVectors


def spooled(blocks: Iterable[Float[ndarray, "b d"]]) -> ArrayVectors:
    """Return the rows of all blocks as one memory-mapped matrix in the temporary folder.

    Float16 blocks stay float16, all others become float32. Disk: N·D·2 or 4 bytes, freed when the
    result is; memory: one block. There must be at least one block.
    """
    folder = tempfile.TemporaryDirectory(prefix="curate-vectors-")
    path = Path(folder.name, "vectors")
    rows = dimension = 0
    kind = np.dtype(np.float32)
    with path.open("wb") as file:
        for block in blocks:
            if not dimension:
                dimension = block.shape[1]
                kind = block.dtype if block.dtype == np.float16 else kind
            with np.errstate(over="ignore"):
                np.ascontiguousarray(block, dtype=kind).tofile(file)
            rows += len(block)
    assert rows and dimension, "nothing was spooled"
    vectors = ArrayVectors(np.memmap(path, dtype=kind, mode="r", shape=(rows, dimension)))
    weakref.finalize(vectors, folder.cleanup)
    return vectors
