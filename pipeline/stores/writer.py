"""A unit's file of vectors, written a window at a time and committed whole.

Shapes: N rows of a window, K checkpoints, L layers, W numbers of a vector at one checkpoint.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int

from curate.pipeline.stores.layout import RECEIPT, Layout
from curate.pipeline.storing import commit
from curate.pipeline.storing.storage import Folder

BLOCK_BYTES = 1 << 20


class StoreFile:
    """Vectors of a unit's rows in order, on their way to `name` in the folder.

    Memory is one window's. Until `commit` the numbers lie in `.tmp/`, where a dead writer's
    leftovers are cleared away; on an object store, in a file of this machine, and in memory once
    while they are uploaded.
    """

    def __init__(
        self, folder: Folder, name: str, layout: Layout, receipt: Mapping[str, Any]
    ) -> None:
        self.folder, self.name, self.layout = folder, name, layout
        said = json.dumps(receipt, sort_keys=True, separators=(",", ":")).encode()
        self._run = receipt["run"]
        schema = layout.schema()
        self.schema = schema.with_metadata(schema.metadata | {RECEIPT: said})
        local = folder.local_path()
        if local is not None:
            self._path = commit.scratch(local, name)
        else:
            handle, path = tempfile.mkstemp(prefix="curate-store-")
            os.close(handle)
            self._path = Path(path)
        with self._explained():
            self._sink = _Hashing(self._path.open("w+b", buffering=0))
            self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), self.schema)

    def write(
        self,
        shard: Int[np.ndarray, " n"],
        row: Int[np.ndarray, " n"],
        vectors: Float[np.ndarray, "n k w"],
        norms: Float32[np.ndarray, "n k l"] | None,
        absent: np.ndarray,
    ) -> None:
        """Append rows; those that are `absent` (bool [N]) have no vector."""
        vectors[absent] = 0  # the same bytes, whatever was there
        mask = pa.array(absent)
        columns = [
            pa.array(shard, pa.int32()),
            pa.array(row, pa.int64()),
            _lists(vectors, mask),
        ]
        if norms is not None:
            norms[absent] = 0
            columns.append(_lists(norms, mask))
        batch = pa.record_batch(columns, schema=self.schema)
        with self._explained():
            self._writer.write_batch(batch)

    def commit(self) -> str:
        """Give the file its name unless that is taken; return the sha256 of what lies there.

        Raises:
            ValueError: what lies there already belongs to another run.
            OSError: the disk does not hold what was written.
        """
        with self._explained():
            self._writer.close()
            self._sink.end()  # before it has a name: nothing may be added to it after
            digest = sha256(self._path)
            if digest != self._sink.digest:
                raise OSError(errno.EIO, f"{self._path} does not hold what was written to it")
            local = self.folder.local_path()
            if local is not None:
                is_ours = commit.adopt(local, self.name, self._path)
            else:
                is_ours = self.folder.create(self.name, self._path.read_bytes())
        return digest if is_ours else self._digest_there()

    def close(self) -> None:
        """Let go of what was not committed."""
        self._sink.file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _digest_there(self) -> str:
        full = self.folder.full_name(self.name)
        try:
            with self.folder.open(self.name) as file, pa.ipc.open_file(file) as reader:
                receipt = json.loads((reader.schema.metadata or {}).get(RECEIPT, b"{}"))
        except pa.ArrowInvalid:
            receipt = {}
        if receipt.get("run") != self._run:
            raise ValueError(
                f"{full} is damaged or belongs to another run: delete it and run the same command"
            )
        return sha256_in(self.folder, self.name)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        local = self.folder.local_path()
        if local is None:
            yield
        else:
            with commit.explained(local / self.name):
                yield


class _Hashing:
    """A file being written, and the digest of what was to be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._digest, self.closed = file, hashlib.sha256(), False

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        self._digest.update(left)
        size = len(left)
        while left:
            left = left[self.file.write(left) :]
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Arrow is done; the file stays open until it is durable."""

    def tell(self) -> int:
        return self.file.tell()

    def end(self) -> None:
        """Make what was written durable, and take no more."""
        os.fsync(self.file.fileno())
        self.file.close()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_in(folder: Folder, name: str) -> str:
    """Return the digest of the bytes of a folder's file, local or remote."""
    digest = hashlib.sha256()
    with folder.open(name) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _lists(values: np.ndarray, mask: pa.Array) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    size = int(np.prod(values.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(flat, size, mask=mask)
