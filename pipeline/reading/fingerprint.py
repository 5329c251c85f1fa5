"""Fingerprints: whether a file still holds the data that was scored.

Three kinds, the kind being the part before the colon:

- `etag:` on object stores that give one: no byte is read.
- `sha256:` of all bytes: local corpora up to WHOLE_BYTES, and JSON lines, which are read once
  anyway to count their rows.
- `blocks:` for larger corpora: size, first and last block, the whole Parquet footer (offsets,
  sizes, statistics) and SAMPLES blocks spread evenly. It misses an edit in place that moves no
  byte outside those blocks; `curate verify` compares the sha256 kept in the receipts.

None depends on a file's time or place, so a copied corpus stays valid. Times only save work
within one run: a file whose `stamp` has not moved since its fingerprint was taken is not read
again.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from fsspec.implementations.arrow import ArrowFSWrapper

from curate.pipeline.storing.storage import filesystem, is_url, open_binary

WHOLE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 16
SAMPLES = 16


@dataclass(frozen=True)
class FileState:
    """A file's size and a stamp that moves with every write; `etag` is empty if there is none."""

    size: int
    stamp: str
    etag: str = ""


def file_state(url: str) -> FileState:
    """Return the state of a file now. FileNotFoundError if there is none."""
    if not is_url(url):
        stat = os.stat(url)
        return FileState(stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}")
    fs, path = filesystem(url)
    fs.invalidate_cache()  # a listing kept since the last look would hide a change
    entry = fs.info(path)
    if isinstance(fs, ArrowFSWrapper):
        with fs.fs.open_input_stream(path) as stream:  # its listings leave the ETag out
            entry["ETag"] = (stream.metadata() or {}).get("ETag", b"").decode()
    return state_of_entry(entry)


def state_of_entry(entry: dict[str, Any]) -> FileState:
    """Return the state that a remote directory entry tells of."""
    etag = str(entry.get("ETag") or entry.get("etag") or "").strip('"')
    times = (entry.get(key) for key in ("LastModified", "created", "mtime", "last_modified"))
    when = etag or next((str(time) for time in times if time is not None), "")
    return FileState(int(entry["size"] or 0), f"{entry['size']}-{when}", etag)


def open_file(url: str) -> BinaryIO:
    """Return the file opened for reading, seekable."""
    if not is_url(url):
        return open(url, "rb")
    return open_binary(*filesystem(url))


def kind_for(state: FileState, is_small: bool) -> str:
    """Return the kind of fingerprint for a file of a corpus that is small, or not."""
    if state.etag:
        return "etag"
    return "sha256" if is_small else "blocks"


def fingerprint(url: str, state: FileState, kind: str) -> str:
    """Return the fingerprint of that kind."""
    if kind == "etag":
        return f"etag:{state.size}-{state.etag}"
    if kind == "sha256":
        return f"sha256:{sha256(url)}"
    return f"blocks:{_blocks_hash(url, state.size)}"


def sha256(url: str) -> str:
    """Return the sha256 of the file's content, hexadecimal; memory is one block."""
    digest = hashlib.sha256()
    with open_file(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pool() -> ThreadPoolExecutor:
    """Return threads for looking at many files: hashing and I/O release the interpreter."""
    return ThreadPoolExecutor(max_workers=8, thread_name_prefix="curate-open")


def _blocks_hash(url: str, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    last = max(size - BLOCK_BYTES, 0)
    with open_file(url) as file:
        for i in range(SAMPLES + 2):
            file.seek(last * i // (SAMPLES + 1))
            digest.update(block := file.read(BLOCK_BYTES))
        if block.endswith(b"PAR1"):
            footer = int.from_bytes(block[-8:-4], "little") + 8
            file.seek(max(size - footer, 0))
            digest.update(file.read(footer))
    return digest.hexdigest()
