"""Ranks of chosen rows that come in corpus order.

The rows wait in a temporary folder (12 bytes each and what they carry) until all keys are known.
Up to MEMORY_ROWS keys are sorted in memory (about 24 bytes each); more go through an external
bucket sort on disk (another 28 bytes a row) with blocks of BLOCK_ROWS in memory.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, UInt32
from numpy import ndarray

MEMORY_ROWS = 1 << 24
BLOCK_ROWS = 1 << 22

_KEYED = np.dtype([("at", "<i8"), ("key", "<u4")])
_RANKED = np.dtype([("at", "<i8"), ("rank", "<i4")])


def with_ranks(
    chosen: Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]],
) -> Iterator[pa.RecordBatch]:
    """Yield the batches with a column `rank`: 0 has the lowest key, equal keys in corpus order.

    Raises:
        ValueError: more rows than an int32 rank can number.
    """
    with tempfile.TemporaryDirectory(prefix="curate-ranks-") as name:
        folder = Path(name)
        total = _spool(folder, chosen)
        if total > np.iinfo(np.int32).max:
            raise ValueError(f"{total} rows are too many to rank; select with ranked=false")
        if not total:
            return
        ranks = _in_memory(folder) if total <= MEMORY_ROWS else _on_disk(folder, total)
        held = np.empty(0, dtype=np.int32)
        with pa.OSFile(str(folder / "rows"), "rb") as file:
            for batch in pa.ipc.open_stream(file):
                while len(held) < batch.num_rows:
                    held = np.concatenate([held, next(ranks)])
                yield batch.append_column("rank", pa.array(held[: batch.num_rows]))
                held = held[batch.num_rows :]


def _spool(folder: Path, chosen: Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]]) -> int:
    """Write the rows and, apart, their keys; return how many there are."""
    total, writer = 0, None
    with pa.OSFile(str(folder / "rows"), "wb") as rows, (folder / "keys").open("wb") as keys:
        for batch, key in chosen:
            if writer is None:
                writer = pa.ipc.new_stream(rows, batch.schema)
            writer.write_batch(batch)
            key.astype("<u4").tofile(keys)
            total += len(key)
        if writer is not None:
            writer.close()
    return total


def _in_memory(folder: Path) -> Iterator[Int32[ndarray, " n"]]:
    yield _ranks_of(np.fromfile(folder / "keys", dtype="<u4"))


def _ranks_of(keys: UInt32[ndarray, " n"]) -> Int32[ndarray, " n"]:
    ranks = np.empty(len(keys), dtype=np.int32)
    ranks[np.argsort(keys, kind="stable")] = np.arange(len(keys), dtype=np.int32)
    return ranks


def _on_disk(folder: Path, total: int) -> Iterator[Int32[ndarray, " n"]]:
    """Sort key buckets one by one, hand the ranks to blocks of rows, read these in order."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for keys in _blocks(folder / "keys", np.dtype("<u4")):
        counts += np.bincount(keys >> 16, minlength=1 << 16)
    bucket_of = _buckets(counts)
    at = 0
    for keys in _blocks(folder / "keys", np.dtype("<u4")):
        records = np.empty(len(keys), dtype=_KEYED)
        records["at"], records["key"] = np.arange(at, at + len(keys)), keys
        append_records(folder, "bucket", bucket_of[keys >> 16], records)
        at += len(keys)
    base = 0
    for bucket in range(int(bucket_of[-1]) + 1):
        path = folder / f"bucket-{bucket}"
        if path.exists():
            base = _rank_bucket(folder, path, base)
            path.unlink()
    for block in range(-(-total // BLOCK_ROWS)):
        records = np.fromfile(folder / f"block-{block}", dtype=_RANKED)
        ranks = np.empty(len(records), dtype=np.int32)
        ranks[records["at"] - block * BLOCK_ROWS] = records["rank"]
        yield ranks


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


def _rank_bucket(folder: Path, path: Path, base: int) -> int:
    """Number the records of a bucket from `base`; return the next number."""
    rows = path.stat().st_size // _KEYED.itemsize
    if rows <= BLOCK_ROWS:
        records = np.fromfile(path, dtype=_KEYED)
        _hand_out(folder, records["at"], base + _ranks_of(records["key"]).astype(np.int64))
        return base + rows
    # One bin of upper bits with many rows: a counting sort by the lower bits, streamed twice.
    counts = np.zeros(1 << 16, dtype=np.int64)
    for records in _blocks(path, _KEYED):
        counts += np.bincount(records["key"] & 0xFFFF, minlength=1 << 16)
    following = base + np.cumsum(counts) - counts
    for records in _blocks(path, _KEYED):
        low = (records["key"] & 0xFFFF).astype(np.int64)
        order = np.argsort(low, kind="stable")
        begins = np.flatnonzero(np.diff(low[order], prepend=-1))
        sizes = np.diff([*begins, len(low)])
        ranks = np.empty(len(low), dtype=np.int64)
        ranks[order] = following[low[order]] + np.arange(len(low)) - np.repeat(begins, sizes)
        following[low[order][begins]] += sizes
        _hand_out(folder, records["at"], ranks)
    return base + rows


def _hand_out(folder: Path, at: Int64[ndarray, " n"], ranks: Int64[ndarray, " n"]) -> None:
    records = np.empty(len(at), dtype=_RANKED)
    records["at"], records["rank"] = at, ranks
    append_records(folder, "block", at // BLOCK_ROWS, records)


def append_records(folder: Path, name: str, target: Int64[ndarray, " n"], records: ndarray) -> None:
    """Append each record to the file of its target, keeping their order."""
    order = np.argsort(target, kind="stable")
    target, records = target[order], records[order]
    begins = np.flatnonzero(np.diff(target, prepend=-1))
    for piece, index in zip(np.split(records, begins[1:]), target[begins], strict=True):
        with (folder / f"{name}-{index}").open("ab") as file:
            piece.tofile(file)


def _blocks(path: Path, dtype: np.dtype) -> Iterator[ndarray]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype=dtype, count=BLOCK_ROWS)):
            yield block
