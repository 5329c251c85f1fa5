"""Plain Parquet: the corpus columns and `weight`."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.storing.storage import Folder

GROUP_ROWS = 8192
"""Rows of a row group: small enough to be read for a few rows, as our own loader does."""


@dataclass(frozen=True)
class ParquetFormat:
    """`part-00000.parquet` …, zstd, all kinds of weights in the column `weight`."""

    source: Source
    refuses: dict[str, str] = field(default_factory=dict, init=False)
    reads_rows: bool = field(default=True, init=False)

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        return [f"part-{unit:05d}.parquet"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        sink, schema = io.BytesIO(), described(self.source)
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for table in regrouped(rows, GROUP_ROWS):
                writer.write_table(table.select(schema.names).cast(schema))
        return [sink.getvalue()]

    def count(self, files: Sequence[bytes]) -> int:
        return int(pq.ParquetFile(pa.BufferReader(files[0])).metadata.num_rows)

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        return {}


def described(source: Source) -> pa.Schema:
    """Return the exported columns, with what `datasets` knows of them and of `weight`."""
    names = [*source.columns, "weight"]
    schema = pa.schema([source.schema.field(name) for name in names])
    known = (source.schema.metadata or {}).get(b"huggingface")
    if known is None:
        return schema
    features = json.loads(known).get("info", {}).get("features") or {}
    chosen = {n: features[n] for n in source.columns if n in features}
    if len(chosen) < len(source.columns):
        return schema
    chosen["weight"] = {"dtype": "float32", "_type": "Value"}
    info = json.dumps({"info": {"features": chosen}})
    return schema.with_metadata({b"huggingface": info.encode()})


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows in tables of `rows` rows, the last one smaller."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= rows:
            whole = pa.concat_tables(held)
            stop = whole.num_rows // rows * rows
            for start in range(0, stop, rows):
                yield whole.slice(start, rows)
            held = [whole.slice(stop)]
    if held and (last := pa.concat_tables(held)).num_rows:
        yield last
