"""`ray job submit` against a local cluster: nodes get the package as a wheel, nothing else."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from curate.pipeline.scoring.score import score
from curate.pipeline.wheel import write_wheel

Make = Callable[..., str]


@dataclass
class LocalCluster:
    """A Ray head of its own, on ports of its own."""

    gcs: str
    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Started with `ray start --head --block` in a process group, which is all that is stopped."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        command = [str(scripts / "ray"), "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        command += ["--include-dashboard=true", f"--dashboard-agent-listen-port={free_port()}"]
        head = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            yield LocalCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            _stop_those_in(folder)


def _stop_those_in(folder: str) -> None:
    """Stop what this cluster started outside of its process group: our folder is in its name."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if folder.encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_job_scores_with_the_package_as_a_wheel(
    cluster: LocalCluster,
    make_points: Make,
    points_checkpoints: Make,
    tmp_path: Path,
) -> None:
    settings = {
        "corpus": make_points([60, 40]),
        "checkpoints": points_checkpoints(seeds=2, steps=(1,)),
        "scorers": "loss,el2n",
        "unit_rows": 40,
        "engine": "ray",
        "workers": 2,
        "progress": False,
    }
    job = tmp_path / "job"
    job.mkdir()
    (job / "settings.json").write_text(json.dumps({**settings, "out": str(tmp_path / "scores")}))
    (job / "main.py").write_text(
        "import json\n"
        "import curate\n"
        "from curate.pipeline.scoring.score import score\n"
        "print('curate is', curate.__file__)\n"
        "try:\n"
        "    score(**{**json.load(open('settings.json')), 'out': 'scores'})\n"
        "except ValueError as error:\n"
        "    print('refused:', error)\n"
        "score(**json.load(open('settings.json')))\n"
    )
    wheel = write_wheel(tmp_path)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit"),
        *("--address", cluster.dashboard, "--working-dir", str(job)),
        *("--runtime-env-json", json.dumps({"py_modules": [str(wheel)]})),
        *("--", sys.executable, "main.py"),
    ]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
        if done.returncode == 0 or "Failed to connect" not in done.stdout + done.stderr:
            break
        assert time.monotonic() < deadline, done.stderr
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "py_modules_files" in done.stdout.split("curate is ")[1].splitlines()[0]
    assert "refused: scores is relative to a folder that Ray deletes" in done.stdout
    joined = {**settings, "out": str(tmp_path / "joined"), "ray_address": cluster.gcs}
    code = (
        "import json, sys\n"
        "from curate.pipeline.scoring.score import score\n"
        "score(**json.loads(sys.argv[1]))\n"
    )
    driver = [sys.executable, "-c", code, json.dumps(joined)]
    done = subprocess.run(driver, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = score(**{**settings, "engine": "local", "workers": None}, out=tmp_path / "local")  # type: ignore[call-overload]
    assert results(tmp_path / "scores") == results(Path(local.path))
    assert results(tmp_path / "joined") == results(Path(local.path))


def results(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
