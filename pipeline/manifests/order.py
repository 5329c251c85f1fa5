"""The order in which an epoch visits a selection: a keyed permutation, blocked for I/O locality.

Positions 0..k-1 are cut into blocks of consecutive positions (rows that lie together on disk).
The blocks are permuted; windows of WINDOW_BLOCKS permuted blocks are then shuffled row by row. A
reader therefore touches at most one window of blocks at a time. When everything fits into one
window (k <= 262 144 with the default block) the result is a uniform permutation.

Any slice can be asked for, in any order, by any process: it depends on (k, seed, epoch, block).
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.keyed import keyed64, stream_key

WINDOW_BLOCKS = 64
_BLOCKS, _ROWS = 1, 2  # which permutation a key is for


def order(
    k: int, seed: int, epoch: int, start: int, stop: int, block: int = 4096
) -> Int64[ndarray, " n"]:
    """Return the positions that places [start, stop) of this epoch visit.

    Memory is a few windows (2 MB each) and 8 bytes per block.
    """
    assert 0 <= start <= stop <= k, f"slice [{start}, {stop}) outside [0, {k})"
    if start == stop:
        return np.empty(0, dtype=np.int64)
    _, starts = _layout(k, seed, epoch, block)
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    pieces = []
    for window in range(first, last + 1):
        base = int(starts[window])
        rows = _window(k, seed, epoch, block, window)
        pieces.append(rows[max(0, start - base) : stop - base])
    return np.concatenate(pieces)


@lru_cache(maxsize=8)
def _layout(
    k: int, seed: int, epoch: int, block: int
) -> tuple[Int64[ndarray, " b"], Int64[ndarray, " w"]]:
    """Return the permuted blocks and the place at which each window begins."""
    blocks = _shuffled(np.arange(-(-k // block), dtype=np.int64), stream_key(seed, epoch, _BLOCKS))
    sizes = np.minimum(block, k - blocks * block)  # only the last block is short
    begins = np.cumsum(sizes) - sizes
    return blocks, begins[::WINDOW_BLOCKS]


@lru_cache(maxsize=8)
def _window(k: int, seed: int, epoch: int, block: int, window: int) -> Int64[ndarray, " n"]:
    blocks, _ = _layout(k, seed, epoch, block)
    chosen = blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
    rows = (chosen[:, None] * block + np.arange(block)).ravel()
    return _shuffled(rows[rows < k], stream_key(seed, epoch, _ROWS))


def _shuffled(ids: Int64[ndarray, " n"], key: int) -> Int64[ndarray, " n"]:
    # keyed64 is a bijection, so there are no ties and the input order does not matter.
    shuffled = ids[np.argsort(keyed64(key, ids))]
    shuffled.flags.writeable = False  # it is cached
    return shuffled
