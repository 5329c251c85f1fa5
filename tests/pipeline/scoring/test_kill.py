"""kill -9 anywhere, the same command again: nothing lost, nothing twice, the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from curate.pipeline.scoring.attempts import (
    Attempt,
    attempts_at,
    close_attempt,
    deaths,
    read_attempts,
)
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.storing.lock import LOCK
from curate.pipeline.storing.storage import Folder

Make = Callable[..., str]
EXITS, CRASHES = 663.0, 664.0
CODE = (
    "import json, logging, sys\n"
    "logging.basicConfig(level=logging.INFO)\n"
    "from curate.pipeline.scoring.score import score\n"
    "score(**json.loads(sys.argv[1]))\n"
)


class Command:
    """`score` in a process of its own, which can be killed."""

    def __init__(self, environment: dict[str, str], **settings: object) -> None:
        self.environment, self.settings = environment, settings

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CODE, json.dumps(self.settings)]
        return subprocess.Popen(
            command,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def here(self) -> ScoreTable:
        """Run it in this process: for what cannot die."""
        table = score(**self.settings, progress=False)  # type: ignore[call-overload]
        assert isinstance(table, ScoreTable)
        return table

    def finish(self) -> tuple[int, str]:
        process = self.start()
        _, said = process.communicate(timeout=300)
        return process.returncode, said


def results(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != LOCK
    }


@pytest.fixture
def command(
    make_points: Make,
    points_checkpoints: Make,
    curate_environment: dict[str, str],
    tmp_path: Path,
) -> Callable[..., Command]:
    corpus: list[str] = []
    checkpoints = points_checkpoints(seeds=2, steps=(1, 2))

    def make(out: str, first: dict[int, float] | None = None, **settings: object) -> Command:
        if not corpus:
            corpus.append(make_points([150, 40, 40, 70], first=first))
        return Command(
            curate_environment | {"POINTS_SLEEP_S": str(settings.pop("sleep_s", 0))},
            corpus=corpus[0],
            checkpoints=checkpoints,
            scorers="loss,el2n,grand",
            out=str(tmp_path / out),
            **{"batch_rows": 16, "unit_rows": 50, "engine": "local", **settings},
        )

    return make


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    assert command("whole").finish()[0] == 0
    rng = random.Random(7)
    kills = 0
    while kills < 8:
        process = command("killed", sleep_s=0.02).start()
        started = time.monotonic()
        while not (tmp_path / "killed" / "_meta.json").exists():  # past the imports
            time.sleep(0.01)
            assert time.monotonic() - started < 60
        time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    code, said = command("killed").finish()
    assert code == 0, said
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_kill_in_the_middle_of_a_unit_changes_no_byte(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    assert command("whole").finish()[0] == 0
    process = command("killed", sleep_s=0.03).start()
    while not (tmp_path / "killed" / "part-00001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    committed = {p.name: p.stat().st_ino for p in (tmp_path / "killed").glob("part-*")}
    assert 2 <= len(committed) < 7 and not (tmp_path / "killed" / "_SUCCESS.json").exists()
    code, said = command("killed").finish()
    assert code == 0, said
    assert f"{len(committed)} of 7 units are done already" in said
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    again = {n: (tmp_path / "killed" / n).stat().st_ino for n in committed}
    assert again == committed


@pytest.mark.slow
@pytest.mark.parametrize("spell", [EXITS, CRASHES], ids=["exit", "segfault"])
def test_a_row_that_kills_the_process_is_isolated_by_running_again(
    command: Callable[..., Command], tmp_path: Path, spell: float
) -> None:
    job = command("s", first={171: spell})
    ends = []
    for _ in range(3):
        code, said = job.finish()
        ends.append(code)
        if code == 0:
            break
    assert ends[:2] == [7 if spell == EXITS else -signal.SIGSEGV] * 2, said
    assert ends[2] == 0, said  # the third run tried the batch in a child first
    table = ScoreTable.open(tmp_path / "s")
    errors = table.errors().to_pylist()
    how = "ends the process (exit code 7)" if spell == EXITS else "kills the process (SIGSEGV)"
    assert errors == [{"shard": 1, "row": 21, "unit": 3, "error": f"scoring this row {how}"}]
    whole = pa.Table.from_batches(list(table.scan()))
    assert whole.num_rows == 300 and whole["loss"].null_count == 1
    assert table.success["quarantined"] == []


@pytest.mark.slow
def test_a_row_that_kills_among_the_very_first_does_not_stop_the_probe(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    job = command("s", first={2: EXITS})
    ends = [job.finish()[0] for _ in range(4)]
    assert ends == [7, 7, 7, 0]  # the probe once, then the batch twice
    assert ScoreTable.open(tmp_path / "s").success["bad_rows"] == 1


def test_a_unit_that_killed_three_times_is_quarantined_and_the_rest_goes_on(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    out = Folder(str(tmp_path / "s"))
    for number in range(3):
        attempt = Attempt(out, 2, number, "earlier")
        attempt.step("encode", "0")
    table = command("s").here()
    (unit,) = table.success["quarantined"]
    assert (unit["unit"], unit["name"]) == (2, "unit 2 (s0.parquet rows 100-149)")
    assert unit["reason"] == "it killed its process 3 times at encode:0"
    whole = pa.Table.from_batches(list(table.scan()))
    lost = whole.slice(100, 50)
    assert whole.num_rows == 300 and lost["loss"].null_count == 50
    assert whole["loss"].null_count == 50 and table.success["bad_rows"] == 0
    assert len(table.errors()) == 50


def test_two_deaths_at_a_batch_that_a_child_survives_change_no_byte(
    command: Callable[..., Command], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command("whole").here()
    out = Folder(str(tmp_path / "s"))
    for number in range(2):
        attempt = Attempt(out, 0, number, "earlier")
        attempt.step("batch", "0.1")
    command("s").here()
    assert "trying 16 suspect rows in a child" in caplog.text
    assert results(tmp_path / "s") == results(tmp_path / "whole")


def test_kills_from_outside_never_quarantine_rows_that_a_child_survives(
    command: Callable[..., Command], tmp_path: Path, kept_ledger: None
) -> None:
    command("whole").here()
    out = Folder(str(tmp_path / "s"))
    for number, key in enumerate(["0", "0", "0 on trial", "0 on trial", "0 on trial"]):
        Attempt(out, 0, number, "earlier").step("encode", key)
    for number in range(3):
        Attempt(out, -1, number, "earlier").step("probe", "0")
        (tmp_path / f"s/attempts/00001-00{number}.json").touch()
    command("s").here()
    assert results(tmp_path / "s") == results(tmp_path / "whole")
    assert read_attempts(out)[-1][3].steps == {"probe": "0"}  # units are planned from it


def test_a_finished_run_keeps_no_ledger(command: Callable[..., Command], tmp_path: Path) -> None:
    command("s").here()
    assert not (tmp_path / "s" / "attempts").exists()


def test_interrupts_leave_no_suspicion(command: Callable[..., Command], tmp_path: Path) -> None:
    process = command("s", sleep_s=0.05).start()
    while not (tmp_path / "s" / "part-00000.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not (tmp_path / "s" / LOCK).exists()
    records = [r for tries in read_attempts(Folder(str(tmp_path / "s"))).values() for r in tries]
    assert {r.state for r in records} <= {"committed", "interrupted"}


def test_the_ledger_counts_deaths_by_step(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for number, steps in enumerate([{"batch": "0.1"}, {"batch": "0.1", "encode": "1"}, {}]):
        attempt = Attempt(folder, 4, number, "s")
        for kind, key in steps.items():
            attempt.step(kind, key)
    calm = Attempt(folder, 4, 3, "s")
    calm.step("batch", "0.1")
    calm.end("interrupted")
    tries = read_attempts(folder)[4]
    assert tries == attempts_at(folder, 4, 9) and attempts_at(folder, 4, 1) == tries[:1]
    assert [r.state for r in tries] == ["running"] * 3 + ["interrupted"]
    for record in tries:
        close_attempt(folder, record, "died", "gone")
    found = deaths(read_attempts(folder)[4])
    assert found == {"batch:0.1": 2, "encode:1": 1}


def test_the_ledger_survives_a_kill_before_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "00007-001.json").touch()
    (record,) = read_attempts(Folder(str(tmp_path)))[7]
    assert (record.number, record.state) == (1, "interrupted")
