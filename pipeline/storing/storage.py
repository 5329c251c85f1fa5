"""Places, local or remote, and output folders whose files appear whole or not at all.

`Folder.create` is a race with one winner: several writers may try, the first commit stays, the
others are told so. Locally `commit.py` sees to that; object stores by a conditional upload.
"""

import contextlib
import errno
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

from curate.pipeline.storing import commit
from curate.pipeline.storing.commit import TMP
from curate.pipeline.storing.commit import NoSpaceError as NoSpaceError

ATOMIC_PUTS = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"}
"""Protocols where an upload becomes visible whole, and `create` is refused when the name exists."""

_memory_lock = threading.Lock()  # memory:// checks and creates in two steps


def is_url(uri: str) -> bool:
    """True for `scheme://…` (and chained `a::b://…`) other than file://."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", uri)) and not uri.startswith("file://")


def absolute(uri: str | os.PathLike[str]) -> str:
    """Return the place in one spelling: an absolute path if local, else the URL, no last slash."""
    text = os.fspath(uri)
    if is_url(text):
        return text if text.endswith("://") else text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text.removeprefix("file://")))


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `uri` and the path on it.

    fsspec comes first; schemes that only pyarrow knows here (s3 without s3fs, or options in the
    URL as in `s3://bucket/key?endpoint_override=host:9000`) go through `pyarrow.fs`.

    Raises:
        ValueError: neither fsspec nor pyarrow can open this kind of URL.
    """
    if not is_url(uri):
        return fsspec.filesystem("file"), absolute(uri)
    try:
        if re.match(r"(s3|gs|gcs|hdfs|viewfs|abfss?)://[^?]*\?\w+=", uri):
            raise ImportError("options in the URL are pyarrow's")
        fs, path = fsspec.core.url_to_fs(uri)
        return fs, str(path)
    except ImportError as no_fsspec:
        reason = str(no_fsspec)
    except ValueError as unknown:
        reason = str(unknown)
    from pyarrow import fs as arrow_fs

    try:
        fs, path = arrow_fs.FileSystem.from_uri(uri)
    except Exception as failed:
        raise ValueError(f"cannot open {uri}: {reason}; pyarrow: {failed}") from None
    return ArrowFSWrapper(fs), path


def join(uri: str, name: str) -> str:
    """Return the place called `name` below `uri`; a URL's options and chained part stay last."""
    if not is_url(uri):
        return os.path.join(uri, name)
    body, tail = split_url(uri)
    return f"{body.rstrip('/')}/{name}{tail}"


def split_url(uri: str) -> tuple[str, str]:
    """Split off what follows the path in a URL: pyarrow's options or fsspec's chained URL."""
    match = re.fullmatch(r"(\w[\w+.-]*://.*?)(\?\w+=.*|::.*)?", uri)
    return (match[1], match[2] or "") if match else (uri, "")


def canonical_json(content: object) -> bytes:
    """Return the one spelling of `content` as JSON: sorted keys, two spaces, UTF-8, newline."""
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


class Folder:
    """A folder of named files, local or on any fsspec filesystem. Names may hold slashes."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = absolute(uri)
        self.is_remote = is_url(self.uri)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def child(self, name: str) -> "Folder":
        """Return the folder of that name inside this one; it need not exist."""
        return Folder(join(self.uri, name))

    def local_path(self, name: str = "") -> Path | None:
        """Return where the file lies on this machine's file system, None if it is remote."""
        return None if self.is_remote else self._path(name)

    def exists(self, name: str = "") -> bool:
        """True when there is a file or folder of that name."""
        if self.is_remote:
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._remote(name)))
        return self._path(name).exists()

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names of files that start with `prefix`.

        Only files right in this folder, or in the one that `prefix` ends up in:
        `names("store/unit-")` gives `store/unit-00000.arrow`.
        """
        return self._entries(prefix, folders=False)

    def folders(self, prefix: str = "") -> list[str]:
        """Return the sorted names of folders that start with `prefix`, `.tmp` left out."""
        return [n for n in self._entries(prefix, folders=True) if n.rsplit("/", 1)[-1] != TMP]

    def read(self, name: str) -> bytes:
        """Return the file's bytes. FileNotFoundError if there is none."""
        if self.is_remote:
            return bytes(self._fs.cat_file(self._remote(name)))
        return self._path(name).read_bytes()

    def read_json(self, name: str) -> Any:
        """Return the file's JSON.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON; the file is named.
        """
        try:
            return json.loads(self.read(name))
        except (json.JSONDecodeError, UnicodeDecodeError) as broken:
            raise ValueError(f"{self.full_name(name)} is not valid JSON ({broken})") from None

    def open(self, name: str) -> BinaryIO:
        """Return the file opened for reading, seekable; the caller closes it."""
        if not self.is_remote:
            return self._path(name).open("rb")
        return open_binary(self._fs, self._remote(name))

    def create(self, name: str, data: bytes) -> bool:
        """Commit `data` under a new name; False, with nothing changed, when the name is taken.

        Stores without a conditional upload (anything but local, memory, S3, GCS, Azure) look first
        and write then: there, two writers in the same instant both win and the later one stays.

        Raises:
            NoSpaceError: the disk is full.
            ValueError: the folder cannot be written.
        """
        if self.is_remote:
            return self._create_remote(name, data)
        return commit.create(Path(self.uri), name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write the file whole or leave what was there; raises as `create`."""
        if self.is_remote:
            self._replace_remote(name, data)
        else:
            commit.replace(Path(self.uri), name, data)

    def write_json(self, name: str, content: object) -> None:
        """Replace the file by `content` as canonical JSON."""
        self.replace(name, canonical_json(content))

    def delete(self, name: str) -> None:
        """Remove the file; no error when there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.is_remote:
                self._fs.rm_file(self._remote(name))
            else:
                self._path(name).unlink()
                commit.sync_folder(self._path(name).parent)

    def clean_tmp(self, older_than_s: float = 24 * 3600) -> int:
        """Remove leftovers of dead writers, and any older than that; return how many.

        A writer is known to be dead only on its own machine; others' leftovers wait for their age.
        """
        if self.is_remote:
            return self._clean_remote(older_than_s)
        return commit.clean(Path(self.uri), older_than_s)

    def full_name(self, name: str = "") -> str:
        """Return the file's path or URL as a user would write it."""
        return join(self.uri, name)

    @property
    def _place(self) -> tuple[Any, str]:
        return filesystem(self.uri)  # fsspec keeps one for each process: they survive no fork

    @property
    def _fs(self) -> Any:
        return self._place[0]

    def _path(self, name: str) -> Path:
        return Path(self.uri, name)

    def _remote(self, name: str) -> str:
        base = self._place[1].rstrip("/")
        return f"{base}/{name}" if name else base

    def _entries(self, prefix: str, folders: bool) -> list[str]:
        parent, _, stem = prefix.rpartition("/")
        lead = f"{parent}/" if parent else ""
        try:
            if self.is_remote:
                self._fs.invalidate_cache()
                kind = "directory" if folders else "file"
                found = self._fs.ls(self._remote(parent), detail=True)
                names = [
                    e["name"].rstrip("/").rsplit("/", 1)[-1] for e in found if e["type"] == kind
                ]
            else:
                with os.scandir(self._path(parent)) as scan:
                    names = [e.name for e in scan if (e.is_dir() if folders else e.is_file())]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(lead + n for n in names if n.startswith(stem))

    @property
    def _puts_are_atomic(self) -> bool:
        protocols = self._fs.protocol
        if isinstance(self._fs, ArrowFSWrapper):  # it has no exclusive create
            return False
        return not ATOMIC_PUTS.isdisjoint([protocols] if isinstance(protocols, str) else protocols)

    def _create_remote(self, name: str, data: bytes) -> bool:
        target = self._remote(name)
        if not self._puts_are_atomic:
            if self.exists(name):
                return False
            self._replace_remote(name, data)
            return True
        guard = _memory_lock if "memory" in self._fs.protocol else contextlib.nullcontext()
        try:
            with guard:
                self._fs.pipe_file(target, data, mode="create")
        except FileExistsError:
            return False
        self._check_remote(name, len(data))
        return True

    def _replace_remote(self, name: str, data: bytes) -> None:
        if self._puts_are_atomic:
            self._fs.pipe_file(self._remote(name), data)
        else:
            tmp = self._remote(f"{TMP}/{commit.tmp_name(name)}")
            for folder in (tmp, self._remote(name)):
                self._fs.makedirs(folder.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(tmp, data)
            self._fs.mv(tmp, self._remote(name))
        self._check_remote(name, len(data))

    def _check_remote(self, name: str, size: int) -> None:
        self._fs.invalidate_cache()
        stored = self._fs.info(self._remote(name))["size"]
        if stored != size:
            raise OSError(
                errno.EIO, f"{self.full_name(name)} holds {stored} bytes after {size} were written"
            )

    def _clean_remote(self, older_than_s: float) -> int:
        removed = 0
        for name in self.names(f"{TMP}/"):
            if (age := time.time() - float(name.rsplit("~", 1)[-1])) > older_than_s and age > 0:
                self.delete(name)
                removed += 1
        return removed


def open_binary(fs: Any, path: str) -> BinaryIO:
    """Return the remote file opened for reading with a position of its own."""
    if "memory" in fs.protocol:  # fsspec hands every reader the same object, position and all
        return io.BytesIO(fs.cat_file(path))
    return cast(BinaryIO, fs.open(path, "rb"))
