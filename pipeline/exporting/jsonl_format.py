"""JSON lines, packed as the corpus is."""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import zstandard

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.exporting.values import json_line, refuse_bytes
from curate.pipeline.storing.storage import Folder

PACKINGS = ("none", "gz", "zst")


@dataclass(frozen=True)
class JsonlFormat:
    """`part-00000.jsonl` …, one object a line with a field `weight`, all kinds of weights.

    `packing` is `gz`, `zst` or `none`; by default as the corpus's own JSON lines are packed. Times
    and decimals become text. Bytes and numbers that are not finite are refused.
    """

    source: Source
    packing: str | None = None
    refuses: dict[str, str] = field(default_factory=dict, init=False)
    reads_rows: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.packing is not None and self.packing not in PACKINGS:
            raise ValueError(
                f"JSON lines are packed by one of: {', '.join(PACKINGS)}; not {self.packing!r}"
            )
        refuse_bytes(self.source.schema, self.source.columns, "jsonl")

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        ending = "" if self._packing == "none" else f".{self._packing}"
        return [f"part-{unit:05d}.jsonl{ending}"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        names = [*self.source.columns, "weight"]
        lines = []
        for table in rows:
            identity = zip(table["__shard"].to_pylist(), table["__row"].to_pylist(), strict=True)
            for (shard, row), values in zip(identity, table.select(names).to_pylist(), strict=True):
                lines.append(json_line(values, f"row {row} of shard {shard}"))
        text = b"".join(lines)
        if self._packing == "gz":
            return [gzip.compress(text, mtime=0)]
        if self._packing == "zst":
            return [zstandard.ZstdCompressor(level=3).compress(text)]
        return [text]

    def count(self, files: Sequence[bytes]) -> int:
        data = files[0]
        if self._packing == "gz":
            data = gzip.decompress(data)
        elif self._packing == "zst":
            data = zstandard.ZstdDecompressor().decompress(data)
        return data.count(b"\n")

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        return {}

    @property
    def _packing(self) -> str:
        return self.packing or self.source.input_packing
