"""The run lock: one holder at a time, the dead are taken over."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from curate.pipeline.storing.commit import TMP, guarded
from curate.pipeline.storing.lock import LOCK, RunLock, process_start
from curate.pipeline.storing.storage import Folder
from curate.pipeline.storing.vacate import vacate


def write_lock(folder: Path, **changes: object) -> None:
    with RunLock(Folder(folder)):
        entry = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(entry | {"token": "other"} | changes))


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with RunLock(Folder(tmp_path)):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} .* is writing"):
            RunLock(Folder(tmp_path)).__enter__()
    with RunLock(Folder(tmp_path)):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_dead_holder_is_taken_over_at_once(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=dead_process())
    started = time.monotonic()
    with RunLock(Folder(tmp_path)) as lock:
        assert json.loads((tmp_path / LOCK).read_text())["token"] == lock.token
    assert time.monotonic() - started < 2


def test_a_process_id_in_use_again_does_not_hold_the_lock(tmp_path: Path) -> None:
    write_lock(tmp_path, start="1")  # our own id, but the holder started at another time
    with RunLock(Folder(tmp_path)):
        pass


def test_an_unreadable_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    with RunLock(Folder(tmp_path)):
        pass


def test_a_holder_elsewhere_lives_while_it_beats(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", beat=time.time(), beat_s=10.0)
    with pytest.raises(RuntimeError, match="on elsewhere"):
        RunLock(Folder(tmp_path)).__enter__()


def test_a_silent_holder_elsewhere_is_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", beat=time.time() - 10, beat_s=0.1)
    with RunLock(Folder(tmp_path)):
        pass


def test_a_holder_with_another_clock_that_still_beats_lives(tmp_path: Path) -> None:
    write_lock(tmp_path, host="elsewhere", beat=time.time() - 3600, beat_s=0.5)

    def beat() -> None:
        time.sleep(0.2)
        write_lock_again()

    def write_lock_again() -> None:
        entry = json.loads((tmp_path / LOCK).read_text())
        Folder(tmp_path).replace(LOCK, json.dumps(entry | {"beat": entry["beat"] + 1}).encode())

    threading.Thread(target=beat).start()
    with pytest.raises(RuntimeError, match="on elsewhere"):
        RunLock(Folder(tmp_path)).__enter__()


def test_the_heartbeat_beats_and_notices_that_the_lock_is_lost(tmp_path: Path) -> None:
    with RunLock(Folder(tmp_path), beat_s=0.05) as lock:
        first = json.loads((tmp_path / LOCK).read_text())["beat"]
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["beat"] > first
        lock.check()
        (tmp_path / LOCK).write_text(json.dumps({"token": "thief"}))
        time.sleep(0.3)
        with pytest.raises(RuntimeError, match=r"took .* over"):
            lock.check()
    assert (tmp_path / LOCK).exists()  # the thief's, left alone


def test_of_many_at_once_one_takes_the_dead_holders_place(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=dead_process())
    code = (
        "import sys, time\n"
        "from curate.pipeline.storing.lock import RunLock\n"
        "from curate.pipeline.storing.storage import Folder\n"
        "try:\n"
        "    with RunLock(Folder(sys.argv[1])):\n"
        "        print('won', flush=True)\n"
        "        time.sleep(3)\n"
        "except RuntimeError:\n"
        "    print('lost', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = sorted(run.communicate()[0].strip() for run in runs)
    assert said == ["lost", "lost", "lost", "won"]


def test_a_process_is_known_by_its_start(tmp_path: Path) -> None:
    assert process_start(os.getpid()) is not None
    assert process_start(dead_process()) is None


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with (
        pytest.raises(ValueError, match=r"thesis\.txt is in the way; choose another output folder"),
        RunLock(Folder(tmp_path / "thesis.txt")),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_guard_that_somebody_locks_is_not_taken_away(tmp_path: Path) -> None:
    guard = tmp_path / "run" / TMP / "run-lock"
    made = [guard.parent, tmp_path / "run"]
    with guarded(guard):
        vacate(Folder(tmp_path / "run"), made)
        assert guard.exists()
    vacate(Folder(tmp_path / "run"), made)
    assert not (tmp_path / "run").exists()


def test_who_waited_for_a_guard_that_went_takes_the_next_one(tmp_path: Path) -> None:
    guard, waits, goes_on = tmp_path / TMP / "run-lock", threading.Event(), threading.Event()

    def wait() -> None:
        with guarded(guard):
            waits.set()
            goes_on.wait(20)

    thread = threading.Thread(target=wait)
    with guarded(guard):
        thread.start()
        assert not waits.wait(0.2)
        guard.unlink()  # as a failing run does that holds it
        guard.parent.rmdir()
    assert waits.wait(20)
    with guard.open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    goes_on.set()
    thread.join()
