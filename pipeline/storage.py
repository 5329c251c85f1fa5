"""Output folders, local or remote, and the commit protocol that makes their files crash-proof.

A file appears under its final name whole or not at all, whatever is killed when: it is written to
`.tmp/`, read back, fsynced, and only then linked to its name. `create` is also a race with one
winner: several writers may try, the first commit stays, the others are told so.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

TMP = ".tmp"
BLOCK_BYTES = 1 << 20
ATOMIC_PUTS = {"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"}
"""Protocols where an upload becomes visible whole, and `create` is refused when the name exists."""

_memory_lock = threading.Lock()  # memory:// checks and creates in two steps


class NoSpaceError(OSError):
    """The disk is full; nothing was left under the final name."""

    def __str__(self) -> str:
        return str(self.strerror)


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

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "is_remote": self.is_remote}  # file systems are found again

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

        Raises:
            NoSpaceError: the disk is full.
            ValueError: the folder cannot be written.
        """
        if self.is_remote:
            return self._create_remote(name, data)
        if self.exists(name):
            return False
        with self._explained(name):
            for _ in range(3):  # another process may have cleaned our temporary file away
                with contextlib.suppress(FileNotFoundError), self._written(name, data) as tmp:
                    return _link(tmp, self._path(name))
            raise OSError(errno.EIO, f"temporary files vanish from {self._path(TMP)}")

    def replace(self, name: str, data: bytes) -> None:
        """Write the file whole or leave what was there; raises as `create`."""
        if self.is_remote:
            self._replace_remote(name, data)
            return
        with self._explained(name), self._written(name, data) as tmp:
            final = self._path(name)
            os.replace(tmp, final)
            _sync_folder(final.parent)

    def write_json(self, name: str, content: object) -> None:
        """Replace the file by `content` as canonical JSON."""
        self.replace(name, canonical_json(content))

    def delete(self, name: str) -> None:
        """Remove the file; no error when there is none."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_remote:
                self._fs.rm_file(self._remote(name))
            else:
                self._path(name).unlink()
                _sync_folder(self._path(name).parent)

    def clean_tmp(self, older_than_s: float = 24 * 3600) -> int:
        """Remove leftovers of dead writers, and any older than that; return how many.

        A writer is known to be dead only on its own machine; others' leftovers wait for their age.
        """
        if self.is_remote:
            return self._clean_remote(older_than_s)
        removed = 0
        tmp = self._path(TMP)
        for leftover in tmp.iterdir() if tmp.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if leftover.name != "lock" and _is_leftover(leftover, older_than_s):
                    leftover.unlink()
                    removed += 1
        return removed

    def full_name(self, name: str = "") -> str:
        """Return the file's path or URL as a user would write it."""
        return join(self.uri, name)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return filesystem(self.uri)

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

    @contextlib.contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[Path]:
        """Give a verified, durable temporary file with `data`; it is gone afterwards."""
        _make_folders(self._path(name).parent)
        _make_folders(self._path(TMP))
        tmp = self._path(f"{TMP}/{_tmp_name(name)}")
        try:
            _write(tmp, data)
            yield tmp
        finally:
            with contextlib.suppress(FileNotFoundError):
                tmp.unlink()

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what the operating system says into one sentence with the file's name."""
        try:
            yield
        except OSError as failed:
            where = self.full_name(name)
            if failed.errno in (errno.ENOSPC, errno.EDQUOT):
                said = f"no space left on the device for {where}; free some and run this again"
                raise NoSpaceError(failed.errno, said) from None
            if failed.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise ValueError(f"cannot write {where}: {failed.strerror}") from None
            if failed.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
                taken = failed.filename2 or failed.filename
                raise ValueError(
                    f"cannot write {where}: {taken} is in the way; choose another output folder"
                ) from None
            raise

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
            tmp = self._remote(f"{TMP}/{_tmp_name(name)}")
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


def _owner() -> str:
    """Name the set of processes whose ids this process can look up."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers may share a host name and a disk
    except OSError:
        space = ""
    return re.sub(r"[^\w.-]", "", f"{socket.gethostname()}.{space}")


def _tmp_name(name: str) -> str:
    base = name.rsplit("/", 1)[-1][:100]
    return f"{base}~{_owner()}~{os.getpid()}~{uuid.uuid4().hex}~{time.time():.0f}"


def _is_leftover(path: Path, older_than_s: float) -> bool:
    parts = path.name.split("~")
    if len(parts) >= 5 and parts[-4] == _owner() and not _is_alive(int(parts[-3])):
        return True
    return time.time() - path.stat().st_mtime > older_than_s


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _make_folders(path: Path) -> None:
    """Make the folder and its missing parents, durably."""
    if path.is_dir():
        return
    _make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
    _sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    """Write, fsync and read back a new file."""
    with path.open("x+b", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
        file.seek(0)
        for start in range(0, len(data), BLOCK_BYTES):
            block = memoryview(data)[start : start + BLOCK_BYTES]
            if file.read(len(block)) != block:
                raise OSError(errno.EIO, f"{path} does not hold what was written to it")


def _link(tmp: Path, final: Path) -> bool:
    """Give a durable file its name unless that is taken."""
    try:
        os.link(tmp, final)
    except FileExistsError:
        return False
    except OSError as failed:
        if failed.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        return _rename_under_lock(tmp, final)
    _sync_folder(final.parent)
    return True


def _rename_under_lock(tmp: Path, final: Path) -> bool:
    """As `_link`, on file systems without hard links (FAT, some network mounts)."""
    with (tmp.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it when the holder dies
        if final.exists():
            return False
        os.rename(tmp, final)
        _sync_folder(final.parent)
        return True


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
