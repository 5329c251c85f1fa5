"""The local commit protocol: a file appears under its name whole and durable, or not at all.

Data goes to `.tmp/` beside it, is fsynced and read back, and is then linked (a new name, one
winner) or renamed (a replacement). Whatever is killed when, only `.tmp/` may hold half files.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

TMP = ".tmp"
GUARDS = ("run-lock", "lock")
"""Empty files in `.tmp` that processes lock; they may go, the next one makes them anew."""
BLOCK_BYTES = 1 << 20
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class NoSpaceError(OSError):
    """The disk is full; nothing was left under the final name."""

    def __str__(self) -> str:
        return str(self.strerror)


def create(root: Path, name: str, data: bytes) -> bool:
    """Commit `data` as a new file below `root`; False, with nothing changed, if the name is taken.

    Raises:
        NoSpaceError: the disk is full.
        ValueError: the folder cannot be written.
    """
    with explained(root / name):
        if (root / name).exists():
            return False
        return _commit(root, name, data, _link)


def replace(root: Path, name: str, data: bytes) -> None:
    """Write the file whole or leave what was there; raises as `create`."""
    with explained(root / name):
        _commit(root, name, data, _rename)


def adopt(root: Path, name: str, made: Path) -> bool:
    """Give a durable file below `root/.tmp` its name; False where that is taken. As `create`."""
    with explained(root / name):
        make_folders((root / name).parent)
        return False if (root / name).exists() else _link(made, root / name)


def scratch(root: Path, name: str) -> Path:
    """Return where a file may be written piece by piece before `adopt`; its folder is there."""
    with explained(root / name):
        make_folders(root / TMP)
    return root / TMP / tmp_name(name)


def clean(root: Path, older_than_s: float) -> int:
    """Remove temporary files of dead writers, and any older than that; return how many."""
    removed = 0
    for leftover in (root / TMP).iterdir() if (root / TMP).is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            if leftover.name not in GUARDS and _is_leftover(leftover, older_than_s):
                leftover.unlink()
                removed += 1
    return removed


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tmp_name(name: str) -> str:
    """Return a new name for a temporary file that tells its owner and the time."""
    base = name.rsplit("/", 1)[-1][:100]
    return f"{base}~{_owner()}~{os.getpid()}~{uuid.uuid4().hex}~{time.time():.0f}"


def _commit(root: Path, name: str, data: bytes, finish: Callable[[Path, Path], bool]) -> bool:
    final = root / name
    for _ in range(3):
        make_folders(final.parent)
        make_folders(root / TMP)
        tmp = root / TMP / tmp_name(name)
        try:
            _write(tmp, data)
            return finish(tmp, final)
        except FileNotFoundError:
            continue  # somebody cleaned it away, or the folder
        finally:
            with contextlib.suppress(FileNotFoundError):
                tmp.unlink()
    raise OSError(errno.EIO, f"temporary files vanish from {root / TMP}")


@contextlib.contextmanager
def explained(final: Path) -> Iterator[None]:
    """Turn what the operating system says into one sentence with the file's name.

    Raises:
        NoSpaceError: the disk is full.
        ValueError: the folder cannot be written.
    """
    try:
        yield
    except OSError as failed:
        if failed.errno in (errno.ENOSPC, errno.EDQUOT):
            said = f"no space left on the device for {final}; free some and run this again"
            raise NoSpaceError(failed.errno, said) from None
        if failed.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(f"cannot write {final}: {failed.strerror}") from None
        if failed.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            taken = failed.filename2 or failed.filename
            raise ValueError(
                f"cannot write {final}: {taken} is in the way; choose another output folder"
            ) from None
        raise


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
        if failed.errno not in NO_LINKS:
            raise
        return _rename_under_lock(tmp, final)
    sync_folder(final.parent)
    return True


def _rename_under_lock(tmp: Path, final: Path) -> bool:
    """As `_link`, on file systems without hard links (FAT, some network mounts)."""
    with guarded(tmp.parent / "lock"):
        if final.exists():
            return False
        os.rename(tmp, final)
        sync_folder(final.parent)
        return True


@contextlib.contextmanager
def guarded(guard: Path) -> Iterator[None]:
    """Let one process of this machine in at a time; the kernel frees the guard at its death.

    Whoever locks a guard may remove it: those who waited for it take the next one.
    """
    with explained(guard):
        while (file := _locked(guard)) is None:
            pass
    with file:
        yield


def _locked(guard: Path) -> IO[str] | None:
    """Return the guard, locked; None where it or its folder went meanwhile."""
    with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
        make_folders(guard.parent)
        file = opened.enter_context(guard.open("w"))
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(file.fileno()), guard.stat()):
            opened.pop_all()
            return file
    return None


def _rename(tmp: Path, final: Path) -> bool:
    os.replace(tmp, final)
    sync_folder(final.parent)
    return True


def make_folders(path: Path) -> None:
    """Make the folder and its missing parents, durably."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
    sync_folder(path.parent)


def _owner() -> str:
    """Name the set of processes whose ids this process can look up."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # containers may share a host name and a disk
    except OSError:
        space = ""
    return re.sub(r"[^\w.-]", "", f"{socket.gethostname()}.{space}")


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
