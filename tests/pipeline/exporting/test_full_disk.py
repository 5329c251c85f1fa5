"""Export onto a disk that is really full, at every page: said, nothing half-written, goes on.

The disk gets a page of room at a time, so that the plan, each file, each receipt, the index and
`_SUCCESS` is once the one that does not fit.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.exporting.export import verify_export
from curate.pipeline.storing.commit import GUARDS

CASES = {
    "parquet": ["--to", "parquet"],
    "jsonl": ["--to", "jsonl"],
    "datasets": ["--to", "datasets"],
    "mds": ["--to", "mds"],
    "streams": ["--to", "mds", "--repeats", "streams"],
    "webdataset": ["--to", "webdataset"],
    "megatron": ["--to", "megatron"],
}
UNITS = 3
PAGE = 4096
Said = tuple[int, str, str]  # exit code, stdout, stderr


@dataclass(frozen=True)
class Case:
    """An export onto the small disk, and what it must come to."""

    run: Callable[..., Said]
    command: list[object]
    disk: Path
    whole: dict[str, bytes]

    @property
    def out(self) -> Path:
        return self.disk / "out"

    @property
    def filler(self) -> Path:
        return self.disk / "filler"

    def export(self, *more: object) -> Said:
        return self.run(*self.command, "-o", self.out, *more)

    def leave(self, pages: int) -> None:
        """Fill the disk up, but for so many pages."""
        self.filler.unlink(missing_ok=True)
        free = os.statvfs(self.disk).f_bavail
        self.filler.write_bytes(bytes(PAGE * (free - pages)))
        assert os.statvfs(self.disk).f_bavail == pages

    def free_a_page(self) -> None:
        os.truncate(self.filler, self.filler.stat().st_size - PAGE)

    def check_refusal(self, said: Said) -> None:
        """One sentence, and under each name the whole file."""
        code, out, err = said
        assert (code, out) == (1, "")
        *logged, last = err.strip().splitlines()
        place = re.escape(str(self.out))
        assert re.fullmatch(
            rf"error: no space left on the device for {place}/\S+; free some and run this again",
            last,
        )
        assert not any("error" in line or "Traceback" in line for line in logged)
        there = contents(self.out)
        assert "_SUCCESS" not in there
        assert there.items() <= self.whole.items()

    def check_whole(self, said: Said) -> None:
        assert said[0] == 0, said
        assert contents(self.out) == self.whole
        assert not verify_export(self.out)


@pytest.fixture(params=CASES)
def case(request, run, make_selection, tiny_disk, tmp_path) -> Case:
    """Files of two pages and more of texts that do not compress."""
    rows, letters = (3000, 1) if request.param == "megatron" else (60, 600)
    rng, folder = np.random.default_rng(0), tmp_path / "texts"
    folder.mkdir()
    texts = [rng.bytes(letters).hex()[:letters] for _ in range(rows)]
    pq.write_table(pa.table({"x": range(rows), "text": texts}), folder / "a.parquet")
    kind = "repeat" if request.param == "streams" else "loss"
    weights = {"weights": 1 + np.arange(rows) % 2} if kind == "repeat" else {}
    manifest = make_selection(kind, kept=rows, data="texts", shards=[rows], **weights)
    unit_rows = rows if kind == "repeat" else rows // UNITS
    command = ["export", manifest.path, *CASES[request.param], "--unit-rows", unit_rows]
    assert run(*command, "-o", tmp_path / "whole")[0] == 0
    return Case(run, command, tiny_disk, contents(tmp_path / "whole"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under its name; of the writers' own, only the guards, which are empty."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    data = {n: p.read_bytes() for n, p in found.items() if ".tmp" not in p.parts}
    assert all(p.name in GUARDS for n, p in found.items() if n not in data)
    return data


def units(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which files and receipts of units are there, and when they were written."""
    files = [p for p in folder.rglob("*") if p.is_file() and ".tmp" not in p.parts]
    found = [p for p in files if p.suffix != ".json" or p.name.startswith("unit-")]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def test_an_export_goes_on_page_by_page(case: Case) -> None:
    case.leave(0)
    said, before, refused = case.export(), dict[Path, tuple[int, int]](), 0
    assert not case.out.exists()
    case.out.mkdir()  # by the user, say: it stays as it is
    case.check_refusal(case.export())
    assert not list(case.out.iterdir())
    while said[0]:
        case.check_refusal(said)
        assert before.items() <= units(case.out).items()  # what is finished stays
        before, refused = units(case.out), refused + 1
        done = len(list(case.out.glob(".curate/unit-*")))
        case.free_a_page()
        said = case.export()
        assert not done or f"{done} of" in said[2]
    assert refused > 2 * UNITS
    case.check_whole(said)


@pytest.mark.slow
def test_a_first_try_that_fails_at_any_page_goes_on(case: Case) -> None:
    pages, refused = 0, True
    while refused:
        case.leave(pages)
        said = case.export()
        if refused := said[0] != 0:
            case.check_refusal(said)
            case.filler.write_bytes(b"")
            said = case.export()
        case.check_whole(said)
        shutil.rmtree(case.out)
        pages += 1
    assert pages > 3 * UNITS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["parquet"], indirect=True)
def test_units_on_ray_are_stopped_by_a_full_disk_and_go_on(case: Case, ray_session: None) -> None:
    ray = ("--engine", "ray", "--workers", 2)
    case.leave(12)
    case.check_refusal(case.export(*ray))
    assert list(case.out.glob("part-*"))
    before = units(case.out)
    case.filler.write_bytes(b"")
    case.check_whole(case.export(*ray))
    assert before.items() <= units(case.out).items()


def test_a_ray_that_finds_no_room_for_its_own_files_is_said(
    run: Callable[..., Said], make_selection, tmp_path, monkeypatch
) -> None:
    def refuse(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    command = ["export", make_selection().path, "--to", "parquet", "-o", tmp_path / "out"]
    code, _, err = run(*command, "--engine", "ray")
    assert code == 1 and "internal" not in err
    assert f"see that {tmp_path} has room for its files, or take --engine local (The" in err
