"""What a path is, how far a run has come, and whether everything still is as recorded."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.manifests.select import select
from curate.pipeline.reporting.inspect import format_text, inspect, status, verify
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.training.train import train

ROWS = 90


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/` (two shards of 8 x 8 arrays) and `run/` (scores in three units)."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    labels = np.arange(ROWS) % 3
    images = rng.integers(0, 80, (ROWS, 64)) + 80 * labels[:, None]
    table = pa.table({
        "id": [f"r{i}" for i in range(ROWS)],
        "image": pa.FixedSizeListArray.from_arrays(pa.array(images.ravel(), pa.uint8()), 64),
        "label": labels,
    })  # fmt: skip
    (home / "data").mkdir()
    pq.write_table(table.slice(0, 60), home / "data" / "a.parquet")
    pq.write_table(table.slice(60), home / "data" / "b.parquet")
    corpus, run = str(home / "data"), home / "run"
    train(corpus, model="mlp", seeds=2, epochs=1, save_epochs=[1], out=run / "checkpoints",
          progress=False)  # fmt: skip
    score(corpus, checkpoints=str(run / "checkpoints"), scorers="el2n,grand,aum", engine="local",
          unit_rows=30, out=run / "scores", progress=False)  # fmt: skip
    select(run / "scores", by="el2n", budget=0.5, out=run / "manifest")
    return home


@pytest.fixture
def home(whole_run: Path) -> Iterator[Path]:
    """The same for tests that damage something. Recorded paths are absolute: undone in place."""
    kept = whole_run.parent / "kept"
    shutil.copytree(whole_run, kept)
    yield whole_run
    shutil.rmtree(whole_run)
    shutil.move(kept, whole_run)


def test_a_corpus_shows_rows_columns_and_task(whole_run: Path) -> None:
    found = inspect(whole_run / "data")
    assert (found["kind"], found["rows"], found["shard_count"]) == ("corpus", ROWS, 2)
    assert found["columns"]["image"] == "fixed_size_list<element: uint8>[64]"
    assert [s["rows"] for s in found["shards"]] == [60, 30]


def test_a_run_of_checkpoints_and_a_single_one(whole_run: Path) -> None:
    found = inspect(whole_run / "run" / "checkpoints")
    assert [c["seed"] for c in found["checkpoints"]] == [0, 1]
    assert "parameters" not in found
    one = inspect(whole_run / "run" / "checkpoints" / "seed1-epoch001")
    assert one["parameter_count"] == sum(
        int(np.prod(p["shape"])) for p in one["parameters"].values()
    )
    assert {p["gradient"] for p in one["parameters"].values()} == {"analytic: linear"}


def test_parameters_are_shown_where_the_corpus_is_gone(home: Path) -> None:
    shutil.rmtree(home / "data")
    one = inspect(home / "run" / "checkpoints" / "seed0-epoch001")
    assert one["gradients"].startswith("unknown: ") and len(one["parameters"]) == 6


def test_a_score_table_shows_what_numpy_computes(whole_run: Path) -> None:
    found = inspect(whole_run / "run" / "scores")
    table = ScoreTable.open(whole_run / "run" / "scores")
    for name in ("el2n", "grand", "aum"):
        parts = [b.column(0).to_numpy() for b in table.scan([name])]
        scores = np.concatenate(parts).astype(np.float64)
        said = found["scores"][name]
        assert said["mean"] == pytest.approx(scores.mean(), rel=1e-9)
        assert said["median"] == pytest.approx(np.median(scores), rel=1e-9)
        assert (said["min"], said["max"]) == (scores.min(), scores.max())
    assert found["directions"]["el2n"]["keep"] == "high"


def test_a_manifest_and_a_run(whole_run: Path) -> None:
    manifest = inspect(whole_run / "run" / "manifest")
    assert (manifest["rows"], manifest["of"], manifest["share"]) == (45, 90, 0.5)
    assert sum(g["kept"] for g in manifest["groups"].values()) == 45
    run = inspect(whole_run / "run")
    assert (run["kind"], run["checkpoints"], run["rows"]) == ("run", 2, ROWS)
    assert [m["name"] for m in run["manifests"]] == ["manifest"]


def test_every_answer_is_json_and_text(whole_run: Path) -> None:
    run = whole_run / "run"
    answers = [inspect(p) for p in (whole_run / "data", run, *run.iterdir()) if p.is_dir()]
    for answer in [*answers, status(run), verify(run)]:
        json.dumps(answer, allow_nan=False)
        assert format_text(answer).startswith(f"{answer['kind']} {answer['path']}")


def test_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    for ask in (inspect, verify, status):
        with pytest.raises(ValueError) as error:
            ask(tmp_path / "nothing")
        assert "nothing" in str(error.value) and "\n" not in str(error.value)


def test_status_counts_units_while_a_run_is_half_done(home: Path) -> None:
    scores = home / "run" / "scores"
    assert (status(scores)["scores"][0]["finished"], verify(scores)["problems"]) == (True, [])
    (scores / "_SUCCESS.json").unlink()
    (scores / "part-00001.parquet").unlink()
    (line,) = status(home / "run")["scores"]
    assert not line["finished"] and line["running"] is None
    assert (line["units"], line["units_done"], line["rows"], line["rows_done"]) == (3, 2, 90, 60)
    assert inspect(scores)["kind"] == "unfinished score table"


def test_status_names_the_holder_of_the_lock_while_it_beats(home: Path) -> None:
    lock = {"host": "elsewhere/pid:[1]", "pid": 7, "beat": time.time(), "beat_s": 10.0}
    path = home / "run" / "scores" / "_lock.json"
    path.write_text(json.dumps(lock))
    assert status(home / "run")["scores"][0]["running"] == "process 7 on elsewhere"
    path.write_text(json.dumps({**lock, "beat": time.time() - 3600}))
    assert status(home / "run")["scores"][0]["running"] is None


def test_status_sees_training(whole_run: Path) -> None:
    (line,) = status(whole_run / "run")["checkpoints"]
    assert (line["checkpoints"], line["seeds"], line["seeds_under_way"]) == (2, 2, 0)


def test_everything_is_as_recorded(whole_run: Path) -> None:
    found = verify(whole_run / "run")
    assert found["problems"] == []
    checked = " ".join(found["checked"])
    for what in ("part-00002.parquet", "a.parquet sha256", "b.parquet sha256", "seed1-epoch001",
                 "manifest parts"):  # fmt: skip
        assert what in checked


def flip(path: Path) -> None:
    """Change one byte in the middle, leave the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "run/scores/part-00001.parquet",
        "run/manifest/part-00000.parquet",
        "run/checkpoints/seed0-epoch001/model.safetensors",
        "data/b.parquet",
    ],
)
def test_any_damage_is_found_and_named(
    home: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(home / name)
    problems = verify(home / "run")["problems"]
    where = "seed0-epoch001" if "seed0" in name else name.rsplit("/", 1)[-1]
    assert any(where in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    assert "differences found" in format_text(verify(home / "run"))
