"""`--overwrite` of every command: what is refused leaves the old result as it was, to the byte."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from curate import cli
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder

Run = Callable[[str], tuple[int, str]]


def digits(rows: slice) -> pa.Table:
    x, y = load_digits(return_X_y=True)
    pixels = (x[rows] / 16).astype(np.float32)
    image = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64)
    half = pa.array(np.where(np.arange(len(pixels)) % 2, 0.5, np.nan))
    return pa.table({"image": image, "label": pa.array(y[rows].astype(np.int64)), "half": half})


def files(folder: str) -> dict[str, bytes]:
    """Return every file that is a result, by its name."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and ".tmp" not in p.parts]
    assert paths, folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process; return the exit code and what went to stderr."""
    torch.set_num_threads(1)

    def command(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["curate", *line.split()])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return command


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two corpora, and in `run` a result of every command."""
    home = tmp_path_factory.mktemp("done")
    for name, rows in (("train", slice(0, 60)), ("other", slice(60, 90)), ("test", slice(90, 120))):
        pq.write_table(digits(rows), home / f"{name}.parquet")
    pq.write_table(digits(slice(0, 9)).drop_columns("label"), home / "bare.parquet")
    pq.write_table(pa.table({"text": [" ", " "]}), home / "wordless.parquet")
    lines = [
        "train train.parquet --model mlp --seeds 1 --epochs 1",
        "score train.parquet --scorer el2n --store embedding --keep label",
        "select --budget 0.5",
        "select --budget 20 --method random -o run/random",
        "manifest union run/manifest run/random -o run/union",
        "manifest schedule run/manifest --rule rs2 --param fraction=0.5 -o run/schedule",
        "export --to jsonl --columns label -o run/export",
        "index",
        "evaluate --test test.parquet --model mlp --seeds 1 --epochs 1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        torch.set_num_threads(1)
        for line in lines:
            patch.setattr(sys, "argv", ["curate", *line.split()])
            with contextlib.suppress(SystemExit):
                cli.main()
    return home


@pytest.fixture
def room(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `done` to work in; manifests and scores name the corpora of the original."""
    shutil.copytree(done, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


REFUSED = [
    ("run/scores", "score train.parquet --scorer grand(params=nosuch)", "matches no trainable"),
    ("run/scores", "score train.parquet --sketch 4096(params=nosuch)", "matches no trainable"),
    ("run/scores", "score train.parquet --scorer el2n --threads 0", "threads"),
    ("run/scores", "score train.parquet --scorer el2n --keep nosuch", "no column 'nosuch'"),
    (
        "run/scores",
        "score train.parquet --scorer grad_similarity --target bare.parquet",
        "column 'label'",
    ),
    (
        "run/scores",
        "score wordless.parquet --scorer dsir --target wordless.parquet --task-option inputs=text",
        "no words",
    ),
    (
        "run/manifest",
        "select --budget 9 --method random --schedule curriculum --epochs 3",
        "hard=first or hard=last",
    ),
    ("run/manifest", "select --budget 9 --clip-weights 3", "no weights"),
    ("run/union", "manifest union run/manifest nosuch -o run/union", "nosuch holds no manifest"),
    ("run/union", "manifest intersect run/union run/random -o run/union", "manifests to read"),
    ("run/union", "manifest sample run/random --budget 21 -o run/union", "21 rows"),
    (
        "run/schedule",
        "manifest schedule run/random --rule cooldown --epochs 4 --param by_group=image "
        "-o run/schedule",
        "holds lists",
    ),
    ("run/export", "export --to jsonl --columns nosuch -o run/export", "no column 'nosuch'"),
    ("run/export", "export --to jsonl --epoch 0 --seed -1 -o run/export", "seed"),
    ("run/scores", "index --kind flat --memory 0", "1 MiB"),
    ("run/scores", "index --store probs", "no store 'probs'"),
    (
        "run/evaluate",
        "evaluate --test bare.parquet --model mlp --seeds 1 --epochs 1",
        "bare.parquet is no test corpus",
    ),
    ("run/evaluate", "evaluate --test test.parquet --model mlp --seeds 0", "seeds"),
    ("run/checkpoints", "train train.parquet --model mlp --pack", "causal_lm"),
    ("run/checkpoints", "train train.parquet --model mlp --num-gpus -1", "num_gpus"),
]


def test_a_refusal_leaves_the_old_result(room: Path, run: Run) -> None:
    for folder, line, said in REFUSED:
        before = files(folder)
        code, err = run(f"{line} --overwrite")
        assert code == 2 and said in err, (line, code, err)
        assert files(folder) == before, line


def test_a_mixture_never_replaces_what_it_is_made_of(room: Path, run: Run) -> None:
    (room / "link").symlink_to("run/manifest")
    assert run("score other.parquet --scorer el2n -o run/others")[0] == 0
    assert run("select run/others --budget 0.5 -o run/theirs")[0] == 0
    before = files("run/manifest")
    for out in ("run/manifest", "link"):
        code, err = run(
            f"manifest mix run/manifest run/theirs --proportions 1,1 -o {out} --overwrite"
        )
        assert code == 2 and "one of the manifests to read" in err
        assert files("run/manifest") == before


def test_a_column_that_turns_out_unfit_leaves_the_old_manifest(
    room: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known only while the new manifest is being written: too many groups, say."""
    monkeypatch.setattr("curate.selectors.groups.MAX_GROUPS", 3)
    before = files("run/schedule")
    line = "manifest schedule run/manifest --rule cooldown --epochs 4 --param by_group=label"
    code, err = run(f"{line} -o run/schedule --overwrite")
    assert code == 2 and "more than 3 different values" in err
    assert files("run/schedule") == before


def test_what_replaces_a_result_is_what_a_fresh_folder_gets(room: Path, run: Run) -> None:
    for folder, line in (
        ("run/manifest", "select --budget 9"),
        ("run/union", "manifest intersect run/manifest run/schedule"),
        ("run/schedule", "manifest schedule run/random --rule rs2 --param fraction=0.2"),
        ("run/scores", "score train.parquet --scorer grand"),
    ):
        assert run(f"{line} -o {folder} --overwrite")[0] == 0
        assert run(f"{line} -o fresh/{folder}")[0] == 0
        assert files(folder) == files(f"fresh/{folder}")


def test_a_run_at_work_is_not_overwritten(room: Path, run: Run) -> None:
    for folder, line in (
        ("run/checkpoints", "train train.parquet --model mlp --seeds 1 --epochs 2"),
        ("run/evaluate", "evaluate --test test.parquet --model mlp --seeds 1 --epochs 2"),
        ("run/scores", "score train.parquet --scorer grand"),
    ):
        before = files(folder)
        with RunLock(Folder(folder)):
            code, err = run(f"{line} --overwrite")
        assert code == 1 and "another run" in err
        assert files(folder) == before


def test_a_cluster_that_does_not_answer_costs_nothing(
    room: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def silent(**options: object) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", silent)  # the real one waits for minutes
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    before = {name: files(f"run/{name}") for name in ("scores", "checkpoints", "export")}
    ray = "--engine ray --ray-address 127.0.0.1:9 --overwrite"
    for line in (
        "score train.parquet --scorer grand",
        "train train.parquet --model mlp --seeds 1 --epochs 2",
        "export --to parquet",
    ):
        code, err = run(f"{line} {ray}")
        assert code == 2 and "cannot join a Ray cluster" in err
    assert {name: files(f"run/{name}") for name in before} == before


def test_what_another_request_has_changed_is_said(room: Path, run: Run) -> None:
    schedule = "manifest schedule run/manifest --rule rs2"
    half = f"{schedule} --param fraction=0.5 -o run/schedule"
    assert run(f"{half} --overwrite")[0] == 0  # of the manifest in this room
    for line, said in (
        ("manifest intersect run/manifest run/random -o run/union", '"union", now "intersect"'),
        ("manifest union run/manifest run/schedule -o run/union", "(of other manifests)"),
        (f"{schedule} --param fraction=0.2 -o run/schedule", '{"fraction": 0.5}, now'),
        (f"{schedule} -o run/schedule", '{"fraction": 0.5}, now {}'),  # a default is a setting
        ("export --to parquet --columns label", "to: jsonl -> parquet"),
    ):
        code, err = run(line)
        assert code == 2 and said in err and "--overwrite" in err, (line, err)
    assert run(half)[0] == 0
