"""MDS, the shards of MosaicML Streaming, written as its version 2 defines them.

The library wants an older set of packages than ours, so its format is written here: a shard is
uint32 samples, uint32 offsets [samples + 1] from the file's start, the columns as JSON, then the
samples; a sample is uint32 sizes of its columns of varying size, then the values, columns in
alphabetical order. `index.json` lists the shards. Read back by the library in the tests.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.exporting.tar_format import NO_RATES
from curate.pipeline.exporting.values import holds_bytes, json_line
from curate.pipeline.storing.storage import Folder

Encode = Callable[[Any], bytes]


@dataclass(frozen=True)
class Column:
    """A column's encoding by the library's name, its fixed size if any, and the encoder."""

    name: str
    encoding: str
    size: int | None
    encode: Encode


@dataclass(frozen=True)
class MdsFormat:
    """`shard.00000.mds` … and `index.json`, with a column `weight` (float32).

    Numbers keep their type (booleans as uint8), texts and bytes are `str` and `bytes`, lists of
    numbers `ndarray`, everything else `json`. A `datasets` image becomes its `bytes`. There is no
    null: a row with one is refused.
    """

    source: Source
    refuses: dict[str, str] = field(default_factory=lambda: {"sampling": NO_RATES}, init=False)
    reads_rows: bool = field(default=True, init=False)
    columns: tuple[Column, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = sorted([*self.source.columns, "weight"])
        found = tuple(_column(name, self.source.schema.field(name).type) for name in names)
        object.__setattr__(self, "columns", found)

    def __reduce__(self) -> tuple[object, ...]:
        return (MdsFormat, (self.source,))  # encoders are functions made here

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        return [f"shard.{unit:05d}.mds"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        samples = [self._sample(row) for table in rows for row in table.to_pylist()]
        config = json.dumps(self._config(), sort_keys=True).encode()
        head = 4 + 4 * (len(samples) + 1) + len(config)
        ends = np.cumsum([0, *map(len, samples)], dtype=np.int64) + head
        if ends[-1] >= 1 << 32:
            raise ValueError("an MDS shard holds at most 4 GiB; lower --unit-rows")
        count = np.uint32(len(samples)).tobytes()
        return [b"".join([count, ends.astype(np.uint32).tobytes(), config, *samples])]

    def count(self, files: Sequence[bytes]) -> int:
        data = files[0]
        samples = int(np.frombuffer(data[:4], np.uint32)[0])
        last = int(np.frombuffer(data[4 * (samples + 1) : 4 * (samples + 2)], np.uint32)[0])
        assert last == len(data), "the last sample does not end with the file"
        return samples

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        return {"index.json": self.index(units)}

    def index(self, units: Sequence[Written]) -> bytes:
        """Return `index.json` over these shards."""
        shards = [
            {
                **self._config(),
                "raw_data": {
                    "basename": unit.files[0].rsplit("/", 1)[-1],
                    "bytes": unit.bytes,
                    "hashes": {},
                },
                "samples": unit.rows,
                "zip_data": None,
            }
            for unit in units
        ]
        return json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode()

    def _config(self) -> dict[str, Any]:
        return {
            "column_encodings": [c.encoding for c in self.columns],
            "column_names": [c.name for c in self.columns],
            "column_sizes": [c.size for c in self.columns],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": None,
            "version": 2,
        }

    def _sample(self, row: dict[str, Any]) -> bytes:
        sizes, values = [], []
        for column in self.columns:
            value = row[column.name]
            if value is None and column.encoding != "json":
                raise ValueError(
                    f"row {row['__row']} of shard {row['__shard']}, column {column.name!r}: MDS "
                    "has no null; leave the column out with --columns"
                )
            try:
                data = column.encode(value)
            except ValueError as wrong:
                raise ValueError(
                    f"row {row['__row']} of shard {row['__shard']}, column {column.name!r}: {wrong}"
                ) from None
            if column.size is None:
                sizes.append(len(data))
            values.append(data)
        return np.array(sizes, np.uint32).tobytes() + b"".join(values)


def _column(name: str, kind: pa.DataType) -> Column:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    if pt.is_boolean(kind):
        return Column(name, "uint8", 1, lambda v: np.uint8(v).tobytes())
    if (dtype := _dtype(kind)) is not None:
        return Column(name, dtype.name, dtype.itemsize, lambda v: dtype.type(v).tobytes())
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
        return Column(name, "str", None, lambda v: bytes(v.encode()))
    if pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind):
        return Column(name, "bytes", None, bytes)
    if pt.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"}:
        return Column(name, "bytes", None, _image_bytes)
    if holds_bytes(kind):
        raise ValueError(
            f"column {name!r} has bytes inside a {kind}, which MDS cannot carry; leave it out with "
            "--columns"
        )
    shape: list[int] = []
    leaf = kind
    while pt.is_fixed_size_list(leaf):
        shape.append(leaf.list_size)
        leaf = leaf.value_type
    if shape and 0 not in shape and (inner := _dtype(leaf)) is not None:
        encoding = f"ndarray:{inner.name}:{','.join(map(str, shape))}"
        size = int(np.prod(shape)) * inner.itemsize
        return Column(name, encoding, size, _array_encoder(inner))
    is_list = pt.is_list(kind) or pt.is_large_list(kind)
    if is_list and (inner := _dtype(kind.value_type)) is not None:
        return Column(name, f"ndarray:{inner.name}", None, _row_encoder(inner))
    return Column(name, "json", None, lambda v: json_line({"v": v}, "it")[5:-2])


def _dtype(kind: pa.DataType) -> "np.dtype[Any] | None":
    if pt.is_integer(kind) or pt.is_floating(kind):
        dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return dtype
    return None


def _array_encoder(dtype: "np.dtype[Any]") -> Encode:
    return lambda value: _array(value, dtype).tobytes()


def _row_encoder(dtype: "np.dtype[Any]") -> Encode:
    return lambda value: _row(_array(value, dtype))


def _array(value: list[Any], dtype: "np.dtype[Any]") -> "np.ndarray[Any, Any]":
    array = np.array(value, dtype=object)
    if any(v is None for v in array.ravel()):
        raise ValueError("MDS has no null inside lists; leave the column out with --columns")
    return array.astype(dtype)


def _row(array: "np.ndarray[Any, Any]") -> bytes:
    """Return a one-dimensional array with its length before it, as small as it can be."""
    code = 0 if len(array) < 1 << 8 else 1 if len(array) < 1 << 16 else 2
    length = np.array([len(array)], [np.uint8, np.uint16, np.uint32][code])
    return bytes([1 << 2 | code]) + length.tobytes() + array.tobytes()


def _image_bytes(value: dict[str, Any]) -> bytes:
    if value["bytes"] is None:
        raise ValueError("the image is a path without bytes; load the bytes first")
    return bytes(value["bytes"])
