"""Output folders: first commit wins, nothing half-written is ever visible, whatever is killed."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from curate.pipeline.storing import commit
from curate.pipeline.storing.storage import Folder, NoSpaceError, absolute, canonical_json, join

CLEAN = multiprocessing.get_context("forkserver")  # children without this process's threads
CLEAN.set_forkserver_preload(["curate.pipeline.storing.storage"])


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder(tmp_path / "out" / "deep")
    return Folder(f"memory://{uuid.uuid4().hex}/out")


def tmp_files(root: Path) -> list[str]:
    return [f.name for f in (root / ".tmp").iterdir()] if (root / ".tmp").exists() else []


def test_first_commit_wins(folder: Folder) -> None:
    assert not folder.exists("part")
    assert folder.create("part", b"first")
    assert not folder.create("part", b"second")
    assert folder.read("part") == b"first"
    with folder.open("part") as file:
        assert file.seek(2) == 2
        assert file.read() == b"rst"


@pytest.mark.parametrize("size", [0, 1, commit.BLOCK_BYTES - 1, 2 * commit.BLOCK_BYTES + 17])
def test_content_survives(folder: Folder, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert folder.create("data", data)
    assert folder.read("data") == data


def test_replace_changes_the_whole_file(folder: Folder) -> None:
    folder.replace("state.json", b"a long first version")
    folder.replace("state.json", b"short")
    assert folder.read("state.json") == b"short"


def test_names_are_sorted_and_leave_out_folders_and_leftovers(folder: Folder) -> None:
    for name in ("part-00002", "part-00000", "_meta.json", "store/unit-1", "store/other"):
        folder.create(name, b"x")
    assert folder.names() == ["_meta.json", "part-00000", "part-00002"]
    assert folder.names("part-") == ["part-00000", "part-00002"]
    assert folder.names("store/unit") == ["store/unit-1"]
    assert folder.folders() == ["store"]
    assert folder.child("store").names() == ["other", "unit-1"]
    assert folder.child("nothing").names() == []
    folder.delete("part-00000")
    folder.delete("part-00000")
    assert folder.names("part-") == ["part-00002"]


def test_json_is_canonical_and_broken_json_is_named(folder: Folder) -> None:
    folder.write_json("m.json", {"b": 1, "a": ["ä"]})
    assert folder.read("m.json") == canonical_json({"a": ["ä"], "b": 1})
    assert folder.read_json("m.json") == {"a": ["ä"], "b": 1}
    folder.replace("m.json", b'{"a":')
    with pytest.raises(ValueError, match=r"m\.json is not valid JSON"):
        folder.read_json("m.json")
    with pytest.raises(FileNotFoundError):
        folder.read_json("none.json")


def test_a_folder_travels_to_other_processes(folder: Folder) -> None:
    folder.create("x", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("x") == b"1"
    assert len(pickle.dumps(folder)) < 500


def test_local_paths_are_absolute_and_remote_ones_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder("run").local_path("a") == tmp_path / "run" / "a"
    assert Folder(f"file://{tmp_path}/run").uri == str(tmp_path / "run")
    assert Folder("memory://x/").local_path("a") is None
    assert absolute("memory://x/") == "memory://x"


def test_options_and_chained_urls_stay_last() -> None:
    assert join("s3://b/k?endpoint_override=h:1", "x") == "s3://b/k/x?endpoint_override=h:1"
    assert join("zip://in::s3://b/a.zip", "x") == "zip://in/x::s3://b/a.zip"
    assert join("/a", "x") == "/a/x"


@pytest.mark.parametrize("links", [True, False])
def test_of_many_threads_one_wins(
    folder: Folder, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(commit.os, "link", refuse(errno.EPERM))
    with ThreadPoolExecutor(8) as threads:
        for name in ("a", "b", "c"):
            writers = [f"{name}{i}".encode() * 1000 for i in range(8)]
            won = list(threads.map(folder.create, [name] * 8, writers))
            assert sum(won) == 1
            assert folder.read(name) == writers[won.index(True)]


def test_of_many_processes_one_wins(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    jobs = [(folder, f"part-{i % 40}", str(i).encode() * 5000) for i in range(160)]
    with CLEAN.Pool(4) as processes:
        won = processes.starmap(Folder.create, jobs, chunksize=1)
    winners = {name: data for (_, name, data), first in zip(jobs, won, strict=True) if first}
    assert sum(won) == 40
    assert {name: folder.read(name) for name in folder.names()} == winners
    assert tmp_files(tmp_path) == []


def test_a_killed_writer_leaves_no_half_file_and_its_leftovers_go(tmp_path: Path) -> None:
    folder, rng, killed = Folder(tmp_path), random.Random(0), 0
    data = rng.randbytes(16 << 20)
    for i in range(25):
        writer = CLEAN.Process(target=folder.create, args=(f"part-{i}", data))
        writer.start()
        begun = time.monotonic()
        while not tmp_files(tmp_path) and time.monotonic() - begun < 10 and writer.is_alive():
            pass  # until it is at work
        time.sleep(rng.random() * 0.03)
        writer.kill()
        writer.join()
        killed += writer.exitcode != 0
        for name in folder.names():
            assert hashlib.sha256(folder.read(name)).digest() == hashlib.sha256(data).digest()
        assert len(tmp_files(tmp_path)) <= killed
        for name in folder.names():
            folder.delete(name)
    assert killed > 5, "no writer was killed at work"
    folder.clean_tmp()
    assert tmp_files(tmp_path) == []
    assert folder.create("part-0", data)


def test_cleaning_spares_living_writers_and_strangers(tmp_path: Path) -> None:
    tmp = tmp_path / ".tmp"
    tmp.mkdir()
    mine = tmp / commit.tmp_name("mine")
    stranger = tmp / mine.name.replace("mine~", "stranger~another.host", 1)
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = tmp / commit.tmp_name("dead").replace(f"~{os.getpid()}~", f"~{gone.pid}~")
    for file in (mine, stranger, dead):
        file.write_bytes(b"half")
    assert Folder(tmp_path).clean_tmp() == 1
    assert not dead.exists()
    assert mine.exists() and stranger.exists()
    os.utime(stranger, (0, 0))
    assert Folder(tmp_path).clean_tmp() == 1
    assert mine.exists() and not stranger.exists()


def test_a_cleaned_temporary_file_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, calls = os.link, []

    def clean_first(tmp: Path, final: Path) -> None:
        if not calls:
            tmp.unlink()
        calls.append(tmp)
        link(tmp, final)

    monkeypatch.setattr(commit.os, "link", clean_first)
    assert Folder(tmp_path).create("part", b"data")
    assert len(calls) == 2
    assert (tmp_path / "part").read_bytes() == b"data"


def test_a_really_full_disk_is_said_and_leaves_nothing(tiny_disk: Path) -> None:
    folder = Folder(tiny_disk / "out")
    assert folder.create("small", b"x" * 1000)
    for write in (folder.create, folder.replace):
        with pytest.raises(NoSpaceError, match=r"no space left on the device for .*out/big"):
            write("big", b"x" * (1 << 20))
    assert folder.names() == ["small"]
    assert tmp_files(tiny_disk / "out") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_at_the_sync_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = Folder(tmp_path)
    folder.create("before", b"1")
    monkeypatch.setattr(commit.os, "fsync", refuse(code))
    with pytest.raises(NoSpaceError, match="no space left") as caught:
        folder.create("part", b"data")
    assert pickle.loads(pickle.dumps(caught.value)).errno == code
    assert folder.names() == ["before"]
    assert tmp_files(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ValueError, match=r"run is in the way; choose another output folder"):
        Folder(tmp_path / "run" / "scores").create("part", b"1")


def test_other_failures_pass_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit.os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError) as caught:
        Folder(tmp_path).create("part", b"1")
    assert caught.value.errno == errno.EIO


def test_an_unknown_kind_of_place_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot open nosuch://x"):
        Folder("nosuch://x").names()


@pytest.mark.slow
def test_object_store_commits(object_store: str) -> None:
    folder = Folder(f"{object_store}/run/scores")
    assert folder.create("part", b"first")
    with ThreadPoolExecutor(4) as threads:
        won = list(threads.map(folder.create, ["raced"] * 8, [bytes([i]) for i in range(8)]))
    assert sum(won) == 1
    assert folder.read("raced") == bytes([won.index(True)])
    assert not folder.create("part", b"second")
    folder.write_json("meta.json", {"a": 1})
    folder.child("store").create("u", b"1")
    assert folder.names() == ["meta.json", "part", "raced"]
    assert folder.folders() == ["store"]
    assert json.loads(folder.read("meta.json")) == {"a": 1}
    with folder.open("part") as file:
        file.seek(2)
        assert file.read() == b"rst"
    folder.delete("part")
    assert not folder.exists("part")
    assert folder.clean_tmp() == 0


@pytest.mark.slow
def test_object_store_commits_through_pyarrow(object_store: str, store_endpoint: str) -> None:
    query = f"endpoint_override={store_endpoint.removeprefix('http://')}&scheme=http"
    folder = Folder(f"{object_store}/arrow?{query}")
    assert folder.create("part", b"first")
    assert not folder.create("part", b"second")
    assert folder.child("store").create("u", b"1")
    assert folder.names() == ["part"]
    assert folder.read("part") == b"first"
    assert folder.folders() == ["store"]


def refuse(code: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail
