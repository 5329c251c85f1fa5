"""JSON lines shards, plain or compressed: one block is a run of whole lines of about 8 MiB.

The file is parsed once when the corpus is opened: rows are counted, every line is checked, and
the narrowest types that hold all of its values are found. Later reads parse only the blocks and
columns they need. Texts stay texts, also where they look like dates.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.types as pt
from jaxtyping import Int64

from curate.pipeline.reading.fingerprint import open_file
from curate.pipeline.reading.schemas import cast_batch, unify_schemas
from curate.pipeline.storing.storage import is_url

BLOCK_BYTES = 8 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonHint:
    """What the first reading found: types, and first row, byte (unpacked) and line of each block.

    `starts` and `offsets` are [blocks + 1], `lines` [blocks], counted from 1.
    """

    schema: pa.Schema
    starts: Int64[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"]
    lines: Int64[np.ndarray, " b"]


class JsonReader:
    """An open JSON lines file. See `ShardReader`."""

    def __init__(self, url: str, hint: object = None) -> None:
        self._text = _Text(url)
        self._url = url
        self.hint = hint if isinstance(hint, JsonHint) else scan(url)
        self.schema = self.hint.schema
        self.starts = self.hint.starts

    def batches(self, block: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        start, end = (int(o) for o in self.hint.offsets[block : block + 2])
        text = self._text.read(start, end - start)
        here = [c for c in columns if self.schema.get_field_index(c) >= 0]
        wanted = pa.schema([self.schema.field(c) for c in here or self.schema.names[:1]])
        table = _parse(text, self._url, int(self.hint.lines[block]), wanted)
        expected = int(self.starts[block + 1] - self.starts[block])
        if table.num_rows != expected:
            raise pa.ArrowInvalid(f"{expected} rows were counted, {table.num_rows} are there now")
        for batch in table.to_batches(max_chunksize=batch_rows):
            yield cast_batch(batch, wanted)

    def close(self) -> None:
        self._text.close()


def scan(url: str) -> JsonHint:
    """Read the whole file and return its types and blocks; memory is one block.

    Raises:
        ValueError: a line is no JSON object, or a column changes type; the line is named.
    """
    schema: pa.Schema | None = None
    rows, offsets, lines, line = [0], [0], [], 1
    text = _Text(url)
    for block in text.blocks():
        if block.strip():
            table = _parse(block, url, line)
            found = _without_dates(table.schema)
            pair = [(f"{url} line 1", schema or found), (f"{url} line {line}", found)]
            schema = unify_schemas(pair, loose=True)
            rows.append(table.num_rows)
        else:
            rows.append(0)
        offsets.append(offsets[-1] + len(block))
        lines.append(line)
        line += block.count(b"\n")
    text.close()
    arrays = (np.array(a, dtype=np.int64) for a in (np.cumsum(rows), offsets, lines))
    return JsonHint(schema or pa.schema([]), *arrays)


class _Text:
    """The unpacked bytes of a file, by position; going back in a packed file starts it again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open()

    def _open(self) -> None:
        url = self._url
        file = pa.PythonFile(open_file(url), mode="r") if is_url(url) else pa.OSFile(url)
        ending = url.rsplit(".", 1)[-1].lower()
        packing = {"gz": "gzip", "zst": "zstd", "zstd": "zstd"}.get(ending)
        self._file = pa.CompressedInputStream(file, packing) if packing else file
        self._is_packed = packing is not None
        self._at = 0

    def close(self) -> None:
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """Yield the text in runs of whole lines; a line longer than a block comes whole."""
        pieces: list[bytes] = []
        while piece := self._file.read(BLOCK_BYTES):
            cut = piece.rfind(b"\n") + 1
            if cut:
                yield b"".join([*pieces, piece[:cut]])
                pieces = []
            pieces.append(piece[cut:])
        if rest := b"".join(pieces):
            yield rest

    def read(self, start: int, size: int) -> bytes:
        if not self._is_packed:
            self._file.seek(start)
            return bytes(self._file.read(size))
        if start < self._at:
            self.close()
            self._open()
        while self._at < start:
            self._at += len(self._some(min(start - self._at, BLOCK_BYTES)))
        pieces = []
        while size:
            pieces.append(self._some(size))
            size -= len(pieces[-1])
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def _some(self, size: int) -> bytes:
        piece = bytes(self._file.read(size))
        if not piece:
            raise pa.ArrowInvalid("it ends early")
        return piece


def _parse(text: bytes, url: str, line: int, schema: pa.Schema | None = None) -> pa.Table:
    """Return the rows of a block that begins on that line."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        if schema is None:
            text.decode()  # Arrow does not look whether texts are UTF-8
        return pj.read_json(
            pa.BufferReader(text),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=schema,
                unexpected_field_behavior="ignore" if schema else "infer",
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(_explain(text, url, line, error)) from None


def _explain(text: bytes, url: str, line: int, error: Exception) -> str:
    """Return one sentence with the number of the line at fault."""
    if line == 1 and text.lstrip().startswith(b"["):
        return (
            f"{url} holds one JSON array, not one object per line; "
            "rewrite it, for example with: jq -c '.[]'"
        )
    filled = [(line + i, raw) for i, raw in enumerate(text.split(b"\n")) if raw.strip()]
    for number, raw in filled:
        try:
            parsed: Any = json.loads(raw)
        except ValueError as fault:
            said = fault.msg if isinstance(fault, json.JSONDecodeError) else str(fault)
            return f"{url} line {number} is not valid JSON ({said}); correct or remove it"
        if not isinstance(parsed, dict):
            return f"{url} line {number} is not a JSON object; write one object per line"
    said = " ".join(str(error).split())
    what, _, row = said.removeprefix("JSON parse error: ").partition(" in row ")
    where = f" line {filled[int(row)][0]}" if row.isdigit() and int(row) < len(filled) else ""
    return f"{url}{where}: {what}; give every line the same columns and types"


def _without_dates(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_undated(field.type)) for field in schema])


def _undated(kind: pa.DataType) -> pa.DataType:
    if pt.is_timestamp(kind):
        return pa.string()
    if pt.is_list(kind):
        return pa.list_(_undated(kind.value_type))
    if pt.is_struct(kind):
        return pa.struct([field.with_type(_undated(field.type)) for field in kind])
    return kind
