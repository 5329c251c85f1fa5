"""Parquet files of a folder, opened so that Arrow's threads outlive nobody's Python file."""

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from curate.pipeline.storing.storage import Folder


@contextlib.contextmanager
def open_parquet(folder: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """Give the file opened for reading.

    Local files are opened by Arrow itself: its threads may still hold a Python file when the
    interpreter ends, which then aborts ("terminate called without an active exception").

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: it is no Parquet file, or not a whole one.
    """
    path = folder.local_path(name)
    source = pa.PythonFile(folder.open(name), "r") if path is None else pa.OSFile(str(path))
    with source, pq.ParquetFile(source) as file:
        yield file
