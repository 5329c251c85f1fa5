"""kill -9 at any moment, the same export again: nothing lost, nothing twice, the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curate.pipeline.exporting.export import export, verify_export

CODE = """
import json, sys, time
from curate.pipeline.exporting import export as module
original = module.export_unit

def slow(*arguments):
    time.sleep(0.03)
    return original(*arguments)

module.export_unit = slow
module.export(**json.loads(sys.argv[1]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".tmp" not in p.parts and p.name != "_lock.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", ["parquet", "mds", "webdataset", "datasets", "megatron"])
def test_kills_at_random_moments_change_no_byte(make_selection, curate_environment, tmp_path, to):
    manifest, out = make_selection("loss"), tmp_path / "killed"
    settings = dict(manifest=manifest.path, to=to, unit_rows=12, engine="local")
    export(**settings, out=tmp_path / "whole")
    rng, kills = random.Random(to), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps({**settings, "out": str(out)})],
            env=curate_environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        started = time.monotonic()
        while not (out / ".curate" / "plan.json").exists():  # past the imports
            time.sleep(0.01)
            assert time.monotonic() - started < 120
        while not (out / ".curate" / "_lock.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 1:
            assert not (out / "_SUCCESS").exists()
        for path in out.glob("part-*"):  # whatever has its name is whole
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert kills >= 2
    export(**settings, out=out)
    assert contents(out) == contents(tmp_path / "whole")
    assert not verify_export(out)
