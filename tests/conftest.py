"""Fixtures that every room's tests may use: one Ray session, tiny corpora, tiny checkpoints."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

# Triton decides at import whether kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

POINTS = '''
"""A user's own task and model: points with four numbers and one of three labels.

The first number may be a spell: it makes encode or the model fail, or kills the process.
"""
import os
import pathlib
import signal
import time

import torch
from torch import nn

from curate import Batch, Outputs, Task
from curate.pipeline.tasks.task import Columns

REFUSED, CHOKES, EXITS, CRASHES, HANGS, NAPS_ONCE = range(661, 667)


class Points(Task):
    kind = "points"
    classes = (0, 1, 2)

    def columns(self, schema):
        return Columns(("x",), "label")

    def encode(self, rows):
        if any(x[0] == REFUSED for x in rows["x"].to_pylist()):
            raise ValueError("x is refused")
        return rows.select(["x", "label"])

    def collate(self, encoded):
        y = torch.tensor(encoded["label"].to_pylist())
        if int(y.max()) > 2:
            raise ValueError(f"label {int(y.max())} is none of the 3 classes")
        return Batch({"x": torch.tensor(encoded["x"].to_pylist())}, y, len(y))

    def outputs(self, model, batch):
        time.sleep(float(os.environ.get("POINTS_SLEEP_S", "0")))
        first = batch.inputs["x"][:, 0]
        if (first == CHOKES).any():
            raise RuntimeError("the model chokes")
        if (first == EXITS).any():
            os._exit(7)
        if (first == CRASHES).any():
            os.kill(os.getpid(), signal.SIGSEGV)
        if (first == HANGS).any():
            time.sleep(10_000)
        if (first == NAPS_ONCE).any():
            slept = pathlib.Path(__file__).with_name("slept")
            if not slept.exists():
                slept.touch()
                time.sleep(20)
        logits = model(batch.inputs["x"])
        loss = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        return Outputs(loss, batch.targets, logits)

    def describe(self):
        columns = {"inputs": ["x"], "label": "label", "id": None}
        return {"kind": "points", "columns": columns, "classes": [0, 1, 2], "row_loss": "mean"}


def factory(num_classes, **_):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, num_classes))
'''

MakePoints = Callable[..., str]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray on two logical CPUs for the whole test session."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def points_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with `Points`, a task, and `factory`, its model."""
    path = tmp_path_factory.mktemp("user") / "points.py"
    path.write_text(POINTS)
    return path


@pytest.fixture
def make_points(tmp_path: Path) -> MakePoints:
    """A factory of corpora: `make_points([30, 20], first={3: 661.0}, labels={4: 7})` -> folder.

    `first` sets the first number of rows, `labels` their label; rows count through all shards.
    """

    def make(
        shards: Sequence[int],
        first: Mapping[int, float] | None = None,
        labels: Mapping[int, int] | None = None,
        name: str = "points",
        extra: Mapping[str, Sequence[object]] | None = None,
    ) -> str:
        rng = np.random.default_rng(0)
        total = sum(shards)
        x = rng.normal(size=(total, 4)).astype(np.float32)
        y = rng.integers(0, 3, size=total)
        for row, value in (first or {}).items():
            x[row, 0] = value
        for row, label in (labels or {}).items():
            y[row] = label
        table = pa.table({"x": pa.array(list(x)), "label": y, **(extra or {})})
        folder = tmp_path / name
        folder.mkdir()
        start = 0
        for i, rows in enumerate(shards):
            pq.write_table(table.slice(start, rows), folder / f"s{i}.parquet", row_group_size=16)
            start += rows
        return str(folder)

    return make


@pytest.fixture
def points_checkpoints(tmp_path: Path, points_code: Path) -> Callable[..., str]:
    """A factory of checkpoints with random weights: `points_checkpoints(seeds=2, steps=(0, 5))`."""

    def make(seeds: int = 1, steps: Sequence[int] = (1,), name: str = "checkpoints") -> str:
        from curate.pipeline.models.checkpoint import checkpoint_name, save_checkpoint
        from curate.pipeline.models.models import make_model

        described = {
            "kind": "points",
            "columns": {"inputs": ["x"], "label": "label", "id": None},
            "classes": [0, 1, 2],
            "row_loss": "mean",
            "path": f"{points_code}:Points",
            "options": {},
        }
        spec = f"{points_code}:factory"
        for seed in range(seeds):
            for step in steps:
                torch.manual_seed(1000 * seed + step)
                save_checkpoint(
                    tmp_path / name / checkpoint_name(seed, step=step),
                    make_model(spec, num_classes=3),
                    spec=spec,
                    model_args={"num_classes": 3},
                    task=described,
                    seed=seed,
                    step=step,
                    lr=0.1 / (1 + step),
                )
        return str(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def curate_environment() -> dict[str, str]:
    """The environment of a child process that runs `python -m curate...` as this one would."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
