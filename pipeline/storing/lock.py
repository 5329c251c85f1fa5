"""The lock of a run: a lease with a heartbeat, so that two runs never write one folder.

A dead holder on this machine is taken over at once (its process id is gone, or belongs to a
process that started at another time); one on another machine when its heartbeat has stopped.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from curate.pipeline.storing.commit import TMP, guarded
from curate.pipeline.storing.storage import Folder
from curate.pipeline.storing.vacate import missing, vacate

LOCK = "_lock.json"
BEAT_S = 10.0
MISSED_BEATS = 6
"""A holder elsewhere that has not beaten for this many periods is taken for dead."""


class RunLock:
    """Holds a run's folder while the block runs; of a block that fails no empty folder stays.

    Raises on entry:
        RuntimeError: another run is at work in the folder.
    """

    def __init__(self, folder: Folder, beat_s: float = BEAT_S) -> None:
        self.folder, self.beat_s = folder, beat_s
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._lost = False
        self._made: list[Path] = []
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> "RunLock":
        self._made = missing(self.folder)
        try:
            with _one_at_a_time(self.folder):
                while not self.folder.create(LOCK, _bytes(self._entry())):
                    self._take_over()
        except BaseException:
            vacate(self.folder, self._made)
            raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError, ValueError):
            if self.folder.read_json(LOCK)["token"] == self.token:
                self.folder.delete(LOCK)
        if error is not None:
            vacate(self.folder, self._made)

    def check(self) -> None:
        """Raise RuntimeError when another run has taken the folder over."""
        if self._lost:
            raise RuntimeError(
                f"another run took {self.folder.uri} over while this one was not heard of; stopped"
            )

    def _take_over(self) -> None:
        """Remove the lock of a dead holder; a live one is the user's news."""
        try:
            holder = self.folder.read_json(LOCK)
        except FileNotFoundError:
            return
        except ValueError:
            holder = {}
        if self._is_alive(holder):
            raise RuntimeError(
                f"another run (process {holder['pid']} on {holder['host']}) is writing "
                f"{self.folder.uri}: wait for it or stop it, then run this again"
            )
        self.folder.delete(LOCK)

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if not holder:
            return False
        if holder["host"] == _host():
            return bool(process_start(holder["pid"]) == holder["start"])
        patience_s = MISSED_BEATS * holder["beat_s"]
        if time.time() - holder["beat"] < patience_s:
            return True
        # The clocks may differ: what counts is whether it beats.
        deadline = time.monotonic() + 2 * holder["beat_s"]
        while time.monotonic() < deadline:
            time.sleep(min(1.0, holder["beat_s"]))
            try:
                if self.folder.read_json(LOCK) != holder:
                    return True
            except FileNotFoundError:
                return False
        return False

    def _entry(self) -> dict[str, Any]:
        return {
            "host": _host(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "token": self.token,
            "beat": time.time(),
            "beat_s": self.beat_s,
        }

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            try:
                held = self.folder.read_json(LOCK)["token"] == self.token
            except (FileNotFoundError, ValueError):
                held = False
            except OSError:
                continue  # a passing fault of the storage: the next beat will tell
            if not held:
                self._lost = True
                return
            with contextlib.suppress(OSError):
                self.folder.replace(LOCK, _bytes(self._entry()))


def process_start(pid: int) -> str | None:
    """Return when the process started, in the kernel's ticks; None when there is no such process.

    With the process id it names a process for good, though ids are used again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _start_without_proc(pid)
    return None if fields[0] in "ZX" else fields[19]


def _start_without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _host() -> str:
    """Name the set of processes that this one can look up: a machine, or a container on it."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _bytes(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode()


@contextlib.contextmanager
def _one_at_a_time(folder: Folder) -> Iterator[None]:
    """Let one process of this machine look at the lock at a time; the kernel frees it at death."""
    path = folder.local_path(f"{TMP}/run-lock")
    if path is None:
        yield
        return
    with guarded(path):
        yield
