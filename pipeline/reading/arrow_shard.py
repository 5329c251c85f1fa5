"""Arrow IPC shards, files and streams: one block is a record batch, memory-mapped where local."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from jaxtyping import Int64
from pyarrow import ipc

from curate.pipeline.reading.fingerprint import open_file
from curate.pipeline.storing.storage import is_url

log = logging.getLogger("curate.corpus")

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class ArrowHint:
    """First rows of the batches, and where a stream's batches lie: [batches + 1] each."""

    starts: Int64[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " n"] | None = None


class ArrowReader:
    """An open Arrow IPC file or stream. See `ShardReader`."""

    def __init__(self, url: str, hint: object = None) -> None:
        if is_url(url):
            self._source = pa.PythonFile(open_file(url), mode="r")
        else:
            self._source = pa.memory_map(url)
        head = self._source.read(6)
        if head.startswith(b"FEA1"):
            raise pa.ArrowInvalid("it is a Feather file of version 1, rewrite it as version 2")
        self._is_file = head == b"ARROW1"
        self._reader = self._open()
        self.schema = self._reader.schema
        self._columns = self.schema.names
        if isinstance(hint, ArrowHint):
            self.hint = hint
        else:
            self.hint = self._count_file() if self._is_file else self._count_stream(url)
        self.starts = self.hint.starts
        self._next = -1  # the batch that the stream reader gives next; its place was moved

    def batches(self, block: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        whole = self._batch(block, columns)
        for start in range(0, whole.num_rows, batch_rows):
            yield whole.slice(start, batch_rows)

    def close(self) -> None:
        self._source.close()

    def _open(
        self, fields: list[int] | None = None
    ) -> ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader:
        """Return a reader from the start that loads only the columns at these places."""
        self._source.seek(0)
        options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        open_it = ipc.open_file if self._is_file else ipc.open_stream
        return open_it(self._source, options=options)

    def _batch(self, block: int, columns: list[str]) -> pa.RecordBatch:
        if not self._is_file and self.hint.offsets is not None:
            self._source.seek(int(self.hint.offsets[block]))
            return ipc.read_record_batch(ipc.read_message(self._source), self.schema)
        if columns != self._columns or (not self._is_file and self._next != block):
            fields = [self.schema.get_field_index(c) for c in columns]
            self._reader, self._columns, self._next = self._open(fields), columns, 0
        if self._is_file:
            return self._reader.get_batch(block)
        while self._next < block:  # dictionaries must be met in order
            self._reader.read_next_batch()
            self._next += 1
        self._next += 1
        return self._reader.read_next_batch()

    def _count_file(self) -> ArrowHint:
        reader = self._open(self._cheapest())
        rows = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        return ArrowHint(np.cumsum([0, *rows], dtype=np.int64))

    def _count_stream(self, url: str) -> ArrowHint:
        reader = self._open(self._cheapest())
        rows, offsets = [0], [self._source.tell()]
        while True:
            try:
                rows.append(reader.read_next_batch().num_rows)
            except StopIteration:
                break
            offsets.append(self._source.tell())
        self._source.seek(max(self._source.size() - 8, 0))
        if self._source.read(8) != END_OF_STREAM:
            log.warning("%s has no end mark: its writer may have been stopped early", url)
        starts = np.cumsum(rows, dtype=np.int64)
        if any(_has_dictionary(field.type) for field in self.schema):
            return ArrowHint(starts)
        return ArrowHint(starts, np.array(offsets, dtype=np.int64))

    def _cheapest(self) -> list[int] | None:
        """Return the place of the column that costs least to load, to count rows with."""
        bits = [_bits(field.type) for field in self.schema]
        return [bits.index(min(bits))] if bits else None


def _bits(kind: pa.DataType) -> int:
    try:
        return int(kind.bit_width)
    except ValueError:
        return 1 << 20


def _has_dictionary(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        return True
    return any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))
