"""Random numbers that are a function of (seed, ids) alone.

Never of worker count, order or time, and written out here rather than taken from a library, so
that a stored seed means the same rows for ever.
"""

import numpy as np
from jaxtyping import Float64, Int, UInt32, UInt64
from numpy import ndarray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(x: UInt64[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """Return the splitmix64 finaliser of each value: a bijection of the 64-bit integers.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 3 (the
    variant 13 constants of Stafford).
    """
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def stream_key(*words: int) -> int:
    """Return a 64-bit key that depends on every word and on their order."""
    state = 0
    for word in words:
        value = np.array([(state + word * 2 + 1) * _GOLDEN & _MASK], dtype=np.uint64)
        state = int(mix64(value)[0])
    return state


def keyed64(key: int, ids: Int[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """Return 64 random bits per id; distinct ids give distinct numbers under one key."""
    return mix64(ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def row_bits(
    key: int, shards: Int[ndarray, " n"], rows: Int[ndarray, " n"]
) -> UInt64[ndarray, " n"]:
    """Return 64 random bits per (shard, row)."""
    by_shard = keyed64(key, shards)
    return mix64(by_shard + rows.astype(np.uint64) * np.uint64(_GOLDEN))


def row_keys(
    key: int, shards: Int[ndarray, " n"], rows: Int[ndarray, " n"]
) -> UInt32[ndarray, " n"]:
    """Return 32 random bits per (shard, row)."""
    return (row_bits(key, shards, rows) >> np.uint64(32)).astype(np.uint32)


def exponentials(bits: UInt64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Return exponentially distributed numbers of mean 1, never 0, one for each 64 random bits."""
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log1p(-uniform))
