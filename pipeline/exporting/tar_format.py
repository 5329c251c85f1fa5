"""WebDataset: tar files whose members with one stem are one sample."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.exporting.values import holds_bytes, json_line
from curate.pipeline.storing.storage import Folder

NO_RATES = (
    "it is read as a stream, every sample once, and cannot draw by rates; write what one epoch "
    "draws with --epoch 0, or export to parquet, datasets or megatron"
)
HEADS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
}


@dataclass(frozen=True)
class TarFormat:
    """`part-00000.tar` …: a sample is `KEY.json` and one member for each column of bytes.

    KEY is shard and row of the corpus, and a number behind it where the row repeats. The JSON holds
    the columns without bytes and `weight`; bytes are in `KEY.COLUMN.jpg` (`png`, … as their first
    bytes say, else `bin`), also those of a `datasets` image. Null bytes have no member.
    """

    source: Source
    refuses: dict[str, str] = field(default_factory=lambda: {"sampling": NO_RATES}, init=False)
    reads_rows: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        lower = Counter(name.lower() for name in self._binary)
        for name in self._binary:
            kind = self.source.schema.field(name).type
            if not (_is_bytes(kind) or _is_image(kind)):
                raise ValueError(
                    f"column {name!r} has bytes inside a {kind}, which webdataset cannot carry; "
                    "leave it out with --columns"
                )
            if "." in name or "/" in name or lower[name.lower()] > 1:
                raise ValueError(
                    f"column {name!r} cannot name a file in a tar (dots, slashes and letter case "
                    "do not count there); leave it out with --columns"
                )

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        return [f"part-{unit:05d}.tar"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        sink = io.BytesIO()
        seen: Counter[tuple[int, int]] = Counter()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for table in rows:
                for row in table.to_pylist():
                    identity = (row["__shard"], row["__row"])
                    key = f"{identity[0]:05d}-{identity[1]:09d}"
                    if copy := seen[identity]:
                        key += f"-{copy}"
                    seen[identity] += 1
                    for ending, data in self._members(row):
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return [sink.getvalue()]

    def count(self, files: Sequence[bytes]) -> int:
        with tarfile.open(fileobj=io.BytesIO(files[0])) as tar:
            return len({name.partition(".")[0] for name in tar.getnames()})

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        return {}

    @property
    def _binary(self) -> list[str]:
        schema = self.source.schema
        return [name for name in self.source.columns if holds_bytes(schema.field(name).type)]

    def _members(self, row: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        binary = self._binary
        where = f"row {row['__row']} of shard {row['__shard']}"
        plain = {n: row[n] for n in (*self.source.columns, "weight") if n not in binary}
        for name in binary:
            data = row[name]["bytes"] if isinstance(row[name], dict) else row[name]
            if data is not None:
                yield f"{name}.{_ending(data)}", data
            elif isinstance(row[name], dict) and row[name].get("path"):
                raise ValueError(
                    f"{where}: the image in column {name!r} is a path without bytes; export to "
                    "parquet or datasets, or load the bytes first"
                )
        yield "json", json_line(plain, where)


def _ending(data: bytes) -> str:
    return next((ending for head, ending in HEADS.items() if data.startswith(head)), "bin")


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind))


def _is_image(kind: pa.DataType) -> bool:
    return pt.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}
