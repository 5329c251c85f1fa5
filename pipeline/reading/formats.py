"""The file formats a shard may have, told apart by name or by the first bytes."""

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.reading.fingerprint import open_file

READERS = {
    "parquet": "curate.pipeline.reading.parquet_shard:ParquetReader",
    "arrow": "curate.pipeline.reading.arrow_shard:ArrowReader",
    "json": "curate.pipeline.reading.json_shard:JsonReader",
}
ENDINGS = {
    "parquet": (".parquet", ".pq", ".parq"),
    "arrow": (".arrow", ".arrows", ".feather", ".ipc"),
    "json": tuple(
        name + packed
        for name in (".jsonl", ".json", ".ndjson")
        for packed in ("", ".gz", ".zst", ".zstd")
    ),
}
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""JSON files that `datasets` puts beside the data."""


@runtime_checkable
class ShardReader(Protocol):
    """An open shard, as blocks of rows that are read one at a time.

    A block is what must be decoded together: a Parquet row group, an Arrow record batch, a run of
    JSON lines. `starts` [blocks + 1] are their first rows, then the shard's rows.
    """

    schema: pa.Schema
    starts: Int64[ndarray, " n"]
    hint: object  # what to give the class, beside the URL, to open the same shard faster

    def batches(self, block: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the block's rows in order, at most `batch_rows` at once; memory is the block."""
        ...

    def close(self) -> None: ...


def format_of(name: str) -> str | None:
    """Return the format that the file's name tells, None if it tells none."""
    base = name.rsplit("/", 1)[-1].lower()
    if base in NOT_DATA:
        return None
    return next((form for form, ends in ENDINGS.items() if base.endswith(ends)), None)


def sniff_format(url: str) -> str | None:
    """Return the format that the file's first bytes tell."""
    with open_file(url) as file:
        head = file.read(8)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")):
        return "arrow"
    return "json" if head.lstrip().startswith(b"{") else None


def open_shard(form: str, url: str, hint: object = None) -> ShardReader:
    """Return a reader of the shard; `hint` is that of an earlier reader of the same bytes."""
    module, _, name = READERS[form].partition(":")
    return cast(ShardReader, getattr(import_module(module), name)(url, hint))
