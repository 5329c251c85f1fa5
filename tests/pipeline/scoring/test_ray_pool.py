"""Scoring on Ray: the same bytes as in one process, through deaths, hangs and slow workers."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curate.pipeline.scoring.attempts import read_attempts
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.storing.storage import Folder

Make = Callable[..., str]
CHOKES, EXITS = 662.0, 663.0

pytestmark = pytest.mark.usefixtures("ray_session", "kept_ledger")


@pytest.fixture
def settings(make_points: Make, points_checkpoints: Make, tmp_path: Path) -> dict[str, Any]:
    return {
        "corpus": make_points([150, 40, 40, 70], first={120: CHOKES}),
        "checkpoints": points_checkpoints(seeds=2, steps=(1, 2)),
        "scorers": "loss,el2n,grand",
        "batch_rows": 16,
        "unit_rows": 50,
        "progress": False,
    }


def results(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_two_workers_and_one_process_give_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    score(**settings, engine="local", out=tmp_path / "local")
    score(**settings, engine="ray", workers=2, out=tmp_path / "two")
    assert results(tmp_path / "two") == results(tmp_path / "local")
    pids = {
        record.pid
        for unit, tries in read_attempts(Folder(tmp_path / "two")).items()
        for record in tries
        if unit >= 0
    }
    assert os.getpid() not in pids and 1 <= len(pids) <= 2
    again = score(**settings, engine="ray", workers=1, out=tmp_path / "one")
    assert again.success["bad_rows"] == 1
    assert results(tmp_path / "one") == results(tmp_path / "local")


@pytest.mark.slow
def test_a_row_that_kills_its_workers_is_isolated_and_the_rest_goes_on(
    make_points: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["corpus"] = make_points([150, 40], first={171: EXITS}, name="lethal")
    table = score(**settings, engine="ray", workers=2, out=tmp_path / "s")
    assert isinstance(table, ScoreTable)
    (error,) = table.errors().to_pylist()
    assert (error["shard"], error["row"]) == (1, 21)
    assert error["error"] == "scoring this row ends the process (exit code 7)"
    assert table.success["quarantined"] == []
    tries = read_attempts(Folder(tmp_path / "s"))[3]
    assert [r.state for r in tries] == ["died", "died", "committed"]


def test_errors_of_workers_are_the_users_sentence(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="more than 0 rows cannot be scored"):
        score(**settings, engine="ray", workers=1, out=tmp_path / "s", max_bad_rows=0)
    with pytest.raises(ValueError, match="a worker asks for 3 GPUs, but the cluster has 0"):
        score(**settings, engine="ray", num_gpus=3, out=tmp_path / "t")


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_no_byte(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    score(**settings, engine="local", out=tmp_path / "whole")
    out = Folder(tmp_path / "s")
    killed: list[int] = []

    def kill_three() -> None:
        while len(killed) < 3:
            for tries in read_attempts(out).values():
                for r in tries:
                    if r.unit >= 0 and r.state == "running" and r.pid not in killed:
                        killed.append(r.pid)
                        os.kill(r.pid, signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=kill_three, daemon=True)
    thread.start()
    score(**settings, engine="ray", workers=2, out=tmp_path / "s")
    assert len(killed) >= 1
    assert results(tmp_path / "s") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_unit_past_its_deadline_loses_its_worker_and_is_quarantined_at_last(
    make_points: Make,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from curate.pipeline.scoring.ray_pool import Pool

    monkeypatch.setattr(Pool, "deadline_s", 4.0)
    monkeypatch.setattr(Pool, "copy_after_s", 1e9)
    settings["corpus"] = make_points([60, 50], first={70: 665.0}, name="hangs")
    table = score(**settings, engine="ray", workers=2, out=tmp_path / "s")
    assert isinstance(table, ScoreTable)
    (unit,) = table.success["quarantined"]
    assert unit["unit"] == 2
    reasons = [r.reason for r in read_attempts(Folder(tmp_path / "s"))[2] if r.state == "died"]
    assert reasons == ["past its deadline"] * 3
    assert unit["reason"].startswith("it killed its process 3 times at batch:0.")
    assert table.success["bad_rows"] == 0 and len(table.errors()) == 50


@pytest.mark.slow
def test_a_slow_unit_gets_a_second_worker_and_the_first_commit_wins(
    make_points: Make,
    settings: dict[str, Any],
    points_code: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from curate.pipeline.scoring.ray_pool import Pool

    monkeypatch.setattr(Pool, "copy_after_s", 1.0)
    settings["corpus"] = make_points([50, 50], first={70: 666.0}, name="slow")
    (points_code.parent / "slept").unlink(missing_ok=True)
    table = score(**settings, engine="ray", workers=2, out=tmp_path / "s")
    assert isinstance(table, ScoreTable)
    tries = read_attempts(Folder(tmp_path / "s"))
    slow = next(t for t in tries.values() if len(t) > 1)
    assert sorted(r.state for r in slow) == ["committed", "late"]
    assert table.success["rows"] == 100
