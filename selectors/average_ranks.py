"""Average ranks of more keys than memory holds, in the order in which the keys came.

Keys are dealt into buckets of neighbouring values, each bucket is ranked by itself, and the ranks
are dealt back to blocks of consecutive rows. Memory: BLOCK_ROWS keys with their places (about 60
bytes each); disk: up to 36 bytes a row while ranking, 8 afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, UInt32
from numpy import ndarray

from curate.selectors.ranks import append_records
from curate.selectors.score_keys import UNSCORED

BLOCK_ROWS = 1 << 21

_KEYED = np.dtype([("at", "<i8"), ("key", "<u4")])
_RANKED = np.dtype([("at", "<i8"), ("rank", "<f8")])


@dataclass(frozen=True)
class RankFile:
    """Ranks in a file, one double for each row."""

    path: Path

    def read(self) -> Callable[[int], Float64[ndarray, " n"]]:
        """Return a function that gives the ranks of the next rows, from the first one on."""
        at = 0

        def following(rows: int) -> Float64[ndarray, " n"]:
            nonlocal at
            found = np.fromfile(self.path, "<f8", count=rows, offset=at * 8)
            at += rows
            return found

        return following


def write_average_ranks(folder: Path) -> RankFile:
    """Rank the keys of `folder/keys` (uint32, in row order) and return the file of their ranks.

    A rank is the mean place of the rows with this key, from 1, over the number of keys; NaN for
    UNSCORED, which is not counted.
    """
    total = (folder / "keys").stat().st_size // 4
    counts = np.zeros(1 << 16, dtype=np.int64)
    scored = 0
    for start in range(0, total, BLOCK_ROWS):
        keys = _read_keys(folder, start)
        scored += int((keys != UNSCORED).sum())
        counts += np.bincount(keys >> 16, minlength=1 << 16)
    if total <= BLOCK_ROWS:
        ranks, _ = _ranked(_read_keys(folder, 0), 0)
        (ranks / max(1, scored)).astype("<f8").tofile(folder / "ranks")
        return RankFile(folder / "ranks")
    bucket_of = _buckets(counts)
    for start in range(0, total, BLOCK_ROWS):
        keys = _read_keys(folder, start)
        records = np.empty(len(keys), dtype=_KEYED)
        records["at"], records["key"] = np.arange(start, start + len(keys)), keys
        append_records(folder, "bucket", bucket_of[keys >> 16], records)
    below = 0
    for bucket in range(int(bucket_of[-1]) + 1):
        below = _rank_bucket(folder, bucket, below)
    with (folder / "ranks").open("wb") as file:
        for block in range(-(-total // BLOCK_ROWS)):
            path = folder / f"block-{block}"
            records = np.fromfile(path, dtype=_RANKED)
            ranks = np.empty(len(records))
            ranks[records["at"] - block * BLOCK_ROWS] = records["rank"]
            (ranks / max(1, scored)).astype("<f8").tofile(file)
            path.unlink()
    return RankFile(folder / "ranks")


def _ranked(keys: UInt32[ndarray, " n"], below: int) -> tuple[Float64[ndarray, " n"], int]:
    """Return the average rank of each key, with `below` smaller ones elsewhere, and how many."""
    _, where, counts = np.unique(keys, return_inverse=True, return_counts=True)
    last = below + np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[where]
    return np.where(keys == UNSCORED, np.nan, ranks), below + len(keys)


def _buckets(counts: Int64[ndarray, " b"]) -> Int64[ndarray, " b"]:
    """Return the bucket of each bin: neighbours together up to BLOCK_ROWS, larger bins alone."""
    bucket_of = np.zeros(len(counts), dtype=np.int64)
    bucket = held = 0
    for i, count in enumerate(counts.tolist()):
        if held and held + count > BLOCK_ROWS:
            bucket, held = bucket + 1, 0
        bucket_of[i] = bucket
        held += count
    return bucket_of


def _rank_bucket(folder: Path, bucket: int, below: int) -> int:
    """Deal the ranks of a bucket's rows to their blocks; return how many keys are done."""
    path = folder / f"bucket-{bucket}"
    if not path.exists():
        return below
    rows = path.stat().st_size // _KEYED.itemsize
    if rows <= BLOCK_ROWS:
        records = np.fromfile(path, dtype=_KEYED)
        ranks, following = _ranked(records["key"], below)
        _hand_out(folder, records["at"], ranks)
    else:  # one bin of upper bits with many rows: count by the lower bits, reading twice
        counts = np.zeros(1 << 16, dtype=np.int64)
        for start in range(0, rows, BLOCK_ROWS):
            counts += np.bincount(_records(path, start)["key"] & 0xFFFF, minlength=1 << 16)
        rank_of = below + np.cumsum(counts) - (counts - 1) / 2
        for start in range(0, rows, BLOCK_ROWS):
            records = _records(path, start)
            ranks = np.where(records["key"] == UNSCORED, np.nan, rank_of[records["key"] & 0xFFFF])
            _hand_out(folder, records["at"], ranks)
        following = below + rows
    path.unlink()
    return following


def _hand_out(folder: Path, at: Int64[ndarray, " n"], ranks: Float64[ndarray, " n"]) -> None:
    records = np.empty(len(at), dtype=_RANKED)
    records["at"], records["rank"] = at, ranks
    append_records(folder, "block", at // BLOCK_ROWS, records)


def _read_keys(folder: Path, start: int) -> UInt32[ndarray, " n"]:
    return np.fromfile(folder / "keys", "<u4", count=BLOCK_ROWS, offset=start * 4)


def _records(path: Path, start: int) -> ndarray:
    return np.fromfile(path, _KEYED, count=BLOCK_ROWS, offset=start * _KEYED.itemsize)
