"""Parquet shards: one block is a row group, decoded page by page."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.pipeline.reading.fingerprint import open_file
from curate.pipeline.storing.storage import is_url

LOCAL_BUFFER = 1 << 20
REMOTE_PREFETCH = 1 << 29
"""A remote row group up to this size is fetched in few large requests, a larger one by pages."""


class ParquetReader:
    """An open Parquet file. See `ShardReader`."""

    hint = None  # the footer is found again quickly

    def __init__(self, url: str, hint: object = None) -> None:
        self._file = open_file(url) if is_url(url) else None
        self._parquet = self._open(url, None, fetch_whole=False)
        self.metadata = self._parquet.metadata
        sizes = [self.metadata.row_group(i) for i in range(self.metadata.num_row_groups)]
        if self._file and all(group.total_byte_size <= REMOTE_PREFETCH for group in sizes):
            self._parquet = self._open(url, self.metadata, fetch_whole=True)
        self.schema = self._parquet.schema_arrow
        self.starts = np.cumsum([0, *(group.num_rows for group in sizes)], dtype=np.int64)
        self._check_extent(url)

    def batches(self, block: int, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        return iter(self._parquet.iter_batches(batch_rows, row_groups=[block], columns=columns))

    def close(self) -> None:
        self._parquet.close(force=True)

    def _open(
        self, url: str, metadata: pq.FileMetaData | None, fetch_whole: bool
    ) -> pq.ParquetFile:
        # Without pre-buffering and with a buffer, a column chunk is read by pages, so that even
        # one giant row group needs little memory.
        return pq.ParquetFile(
            self._file or url,
            metadata=metadata,
            pre_buffer=fetch_whole,
            buffer_size=0 if fetch_whole else LOCAL_BUFFER,
            page_checksum_verification=True,
        )

    def _check_extent(self, url: str) -> None:
        """A footer glued to a shorter file must not pass for a whole one."""
        if not self.metadata.num_row_groups or not self.metadata.num_columns:
            return
        group = self.metadata.row_group(self.metadata.num_row_groups - 1)
        last = group.column(self.metadata.num_columns - 1)
        start = last.dictionary_page_offset or last.data_page_offset
        with open_file(url) as file:
            size = file.seek(0, 2)
        if min(start, last.data_page_offset) + last.total_compressed_size > size:
            raise pa.ArrowInvalid("its footer points past its end")
