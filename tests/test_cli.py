"""The command line on real data: the main job, and every kind of bad input in one sentence."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from curate import cli


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def curate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run a command line in this process."""
    torch.set_num_threads(1)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


def digits(rows: slice) -> pa.Table:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[rows]
    pixels = (x[order] / 16).astype(np.float32)
    image = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 64)
    ids = pa.array([f"digit-{i}" for i in order])
    return pa.table({"id": ids, "image": image, "label": pa.array(y[order].astype(np.int64))})


def places(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a digits corpus in three shards, a test set, and two seeds of checkpoints."""
    root = tmp_path_factory.mktemp("cli")
    (root / "train").mkdir()
    for shard in range(3):
        pq.write_table(
            digits(slice(shard * 200, shard * 200 + 200)), root / f"train/{shard}.parquet"
        )
    pq.write_table(digits(slice(1300, None)), root / "test.parquet")
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "curate.cli"]
    subprocess.run(
        [*command, "train", "train", "--model", "mlp", "--seeds", "2", "--epochs", "3"],
        cwd=root,
        check=True,
    )
    return root


@pytest.fixture
def room(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of `trained` as the working folder."""
    shutil.copytree(trained, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def test_the_short_form_of_the_main_job_works(room: Path, curate: Callable[..., Answer]) -> None:
    assert curate("score", "train", "--scorer", "el2n").code == 0
    assert curate("select", "--budget", "0.5").code == 0
    parts = pq.read_table(sorted((room / "run/manifest").glob("part-*.parquet")))
    assert parts.num_rows == 300
    kept_places = places(parts)
    scores = pq.read_table(sorted((room / "run/scores").glob("part-*.parquet")))
    dropped = dict(zip(places(scores), scores["el2n"].to_pylist(), strict=True))
    kept = [dropped.pop(place) for place in kept_places]
    assert min(kept) >= max(dropped.values()), "keep by el2n keeps the hardest half"
    answer = curate("evaluate", "train", "--test", "test.parquet", "--model", "mlp",
                    "--seeds", 2, "--epochs", 3, "--json")  # fmt: skip
    assert answer.code == 0
    names = [row["name"] for row in json.loads(answer.out)["rows"]]
    assert len(names) == 3, "the subset, a random one of its size, and all rows"
    assert curate("report").code == 0
    assert curate("verify", "run").code == 0
    assert json.loads(curate("status", "--json").out)


def test_json_is_all_that_reaches_stdout(room: Path, curate: Callable[..., Answer]) -> None:
    answer = curate("score", "train", "--scorer", "el2n,margin", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)
    for path in ("train", "run", "run/scores", "run/checkpoints"):
        assert json.loads(curate("inspect", path, "--json").out)


def test_a_dry_run_writes_nothing(room: Path, curate: Callable[..., Answer]) -> None:
    before = sorted(room.rglob("*"))
    for command in (["plan", "train"], ["score", "train", "--dry-run"]):
        answer = curate(*command, "--scorer", "grand", "--json")
        assert answer.code == 0
        assert json.loads(answer.out)["rows"] == 600
    assert sorted(room.rglob("*")) == before


def test_a_guessed_task_is_said_aloud(room: Path, curate: Callable[..., Answer]) -> None:
    answer = curate("train", "train", "--model", "mlp", "--epochs", 1, "--seeds", 1, "-o", "one")
    assert answer.code == 0 and "task: image_classification, guessed" in answer.err


def test_checkpoints_may_be_listed_behind_one_flag(
    room: Path, curate: Callable[..., Answer]
) -> None:
    one, two = sorted((room / "run/checkpoints").glob("seed*-epoch003"))
    assert curate("score", "train", "--checkpoints", one, two, "--scorer", "el2n").code == 0
    assert "el2n_std" in pq.read_schema(room / "run/scores/part-00000.parquet").names


def test_a_recipe_runs_the_stages_and_resumes(room: Path, curate: Callable[..., Answer]) -> None:
    (room / "recipe.yaml").write_text(
        "corpus: train\nrun: again\n"
        "train: {model: mlp, seeds: 1, epochs: 2, lr: 1e-2}\n"
        "score: {scorers: [el2n, aum]}\n"
        "select: {by: aum, budget: 0.25}\n"
    )
    assert curate("run", "recipe.yaml").code == 0
    before = {p: p.stat().st_mtime_ns for p in room.glob("again/*/*.parquet")}
    assert curate("run", "recipe.yaml").code == 0
    assert before == {p: p.stat().st_mtime_ns for p in room.glob("again/*/*.parquet")}
    (room / "recipe.yaml").write_text("corpus: train\nscore: {scorer: el2n}\n")
    answer = curate("run", "recipe.yaml")
    assert answer.code == 2 and "score has no parameter 'scorer'" in answer.sentence


OWN_TASK = """
import numpy as np, torch
from torch import nn
from curate import Batch, Outputs, Task
from curate.pipeline.tasks.task import Columns

def make():
    return nn.Linear(2, 1)

class Regression(Task):
    kind = "regression"
    def columns(self, schema):
        return Columns(("a", "b"), "y")
    def collate(self, rows):
        a, b, y = (torch.from_numpy(rows[c].to_numpy().astype(np.float32)) for c in "aby")
        return Batch({"x": torch.stack([a, b], 1)}, y, rows.num_rows)
    def outputs(self, model, batch):
        return Outputs((model(batch.inputs["x"])[:, 0] - batch.targets) ** 2)
    def describe(self):
        return {"kind": self.kind, "columns": {"inputs": ["a", "b"], "label": "y"}, "classes": None}
"""


def test_a_task_of_ones_own_without_classes(room: Path, curate: Callable[..., Answer]) -> None:
    (room / "own.py").write_text(OWN_TASK)
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 90))
    pq.write_table(pa.table({"a": a, "b": b, "y": a - 2 * b}), room / "line.parquet")
    own = ["line.parquet", "--model", "own.py:make", "--task", "own.py:Regression", "--seeds", 2]
    assert curate("train", *own, "--epochs", 2, "-o", "own/checkpoints").code == 0
    scores = ["score", "line.parquet", "--checkpoints", "own/checkpoints", "-o", "own/scores"]
    answer = curate(*scores, "--scorer", "el2n")
    assert answer.code == 2 and "statistics" in answer.sentence
    assert curate(*scores, "--scorer", "loss,grand").code == 0
    part = pq.read_table(room / "own/scores/part-00000.parquet")
    assert part["grand"].null_count == 0
    one = sorted((room / "own/checkpoints").glob("seed0-*"))[-1]
    answer = curate("score", "line.parquet", "--checkpoints", one, "--scorer", "loss,grand",
                    "-o", "own/one")  # fmt: skip
    assert answer.code == 0
    part = pq.read_table(room / "own/one/part-00000.parquet")
    # Squared error e^2 of one linear layer with a bias: the gradient is 2 e (a, b, 1).
    expected = 2 * np.sqrt(part["loss"].to_numpy() * (a**2 + b**2 + 1))
    np.testing.assert_allclose(part["grand"].to_numpy(), expected, rtol=1e-4)
    assert curate("select", "own/scores", "--by", "grand", "--budget", 0.5, "-o", "own/m").code == 0
    answer = curate("evaluate", *own, "--manifest", "own/m", "--test", "line.parquet",
                    "--epochs", 1, "-o", "own/evaluate")  # fmt: skip
    assert answer.code == 0
    assert "loss ±" in answer.out and "perplexity" not in answer.out


class TestBadInput:
    """Each answered by one sentence that names the culprit, with exit code 2 (3: done, but rows
    were left out), and with nothing written."""

    def test_missing_path(self, room: Path, curate: Callable[..., Answer]) -> None:
        for command in (
            ["train", "nowhere", "--model", "mlp"],
            ["score", "nowhere", "--scorer", "el2n"],
            ["inspect", "nowhere"],
        ):
            answer = curate(*command)
            assert answer.code == 2 and "nowhere" in answer.sentence

    def test_empty_corpus(self, room: Path, curate: Callable[..., Answer]) -> None:
        (room / "empty").mkdir()
        pq.write_table(digits(slice(0, 0)), room / "none.parquet")
        for corpus in ("empty", "none.parquet"):
            answer = curate("score", corpus, "--scorer", "el2n")
            assert answer.code == 2 and corpus in answer.sentence

    def test_shard_truncated_in_the_middle(self, room: Path, curate: Callable[..., Answer]) -> None:
        shard = room / "train/1.parquet"
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        answer = curate("score", "train", "--scorer", "el2n")
        assert answer.code == 2 and "1.parquet" in answer.sentence

    def test_shards_with_different_schemas(self, room: Path, curate: Callable[..., Answer]) -> None:
        other = digits(slice(0, 9)).rename_columns(["id", "image", "digit"])
        pq.write_table(other, room / "train/1.parquet")
        answer = curate("score", "train", "--scorer", "el2n")
        assert answer.code == 2 and "1.parquet" in answer.sentence
        assert "label" in answer.sentence or "digit" in answer.sentence

    def test_no_label_column(self, room: Path, curate: Callable[..., Answer]) -> None:
        pq.write_table(digits(slice(0, 9)).drop_columns("label"), room / "bare.parquet")
        answer = curate("score", "bare.parquet", "--scorer", "el2n")
        assert answer.code == 2 and "label" in answer.sentence

    @pytest.mark.parametrize(
        ("column", "value", "reason"),
        [("label", None, "label"), ("label", 77, "77"), ("image", [float("nan")] * 64, "pixel")],
    )
    def test_a_bad_row_is_named_and_the_rest_is_scored(
        self, room: Path, curate: Callable[..., Answer], column: str, value: object, reason: str
    ) -> None:
        table = digits(slice(0, 50))
        values = table[column].to_pylist()
        values[17] = value
        spot = table.schema.get_field_index(column)
        array = pa.array(values, type=table.schema.field(column).type)
        pq.write_table(table.set_column(spot, column, array), room / "bad.parquet")
        answer = curate("score", "bad.parquet", "--scorer", "el2n,grand")
        assert answer.code == 3
        part = pq.read_table(room / "run/scores/part-00000.parquet").to_pylist()
        assert [r["row"] for r in part if r["error"]] == [17]
        assert reason in part[17]["error"]
        assert part[17]["el2n"] is None and part[17]["grand"] is None
        assert all(r["el2n"] is not None for r in part if r["row"] != 17)
        errors = pq.read_table(room / "run/scores/errors.parquet").to_pylist()
        assert [(r["shard"], r["row"]) for r in errors] == [(0, 17)]
        assert curate("score", "bad.parquet", "--scorer", "el2n,grand").code == 3  # asked again
        recipe = {"corpus": "bad.parquet", "score": {"scorers": ["el2n", "grand"]}}
        (room / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        assert curate("run", "recipe.yaml").code == 3
        assert curate("select", "--by", "el2n", "--budget", "49").code == 0
        kept = pq.read_table(sorted((room / "run/manifest").glob("part-*.parquet")))
        assert 17 not in kept["row"].to_pylist()

    def test_too_many_bad_rows_stop_the_run(
        self, room: Path, curate: Callable[..., Answer]
    ) -> None:
        table = digits(slice(0, 50))
        labels = pa.array([None] * 20 + table["label"].to_pylist()[20:], type=pa.int64())
        pq.write_table(table.set_column(2, "label", labels), room / "bad.parquet")
        answer = curate("score", "bad.parquet", "--scorer", "el2n")
        assert answer.code == 1 and "--max-bad-rows" in answer.sentence
        assert curate("score", "bad.parquet", "--scorer", "el2n", "--max-bad-rows", 20).code == 3

    def test_a_checkpoint_of_another_task(self, room: Path, curate: Callable[..., Answer]) -> None:
        answer = curate("score", "train", "--scorer", "el2n", "--task", "causal_lm")
        assert answer.code == 2 and "causal_lm" in answer.sentence

    def test_scores_that_need_what_is_not_there(
        self, room: Path, curate: Callable[..., Answer]
    ) -> None:
        answer = curate("score", "train", "--scorer", "el2m")
        assert answer.code == 2 and "el2n" in answer.sentence
        (room / "run/checkpoints/records.parquet").unlink()
        answer = curate("score", "train", "--scorer", "aum")
        assert answer.code == 2 and "records" in answer.sentence

    def test_budgets(self, room: Path, curate: Callable[..., Answer]) -> None:
        assert curate("score", "train", "--scorer", "el2n").code == 0
        for budget in ("0", "601", "1.5", "-3", "half", "1e3tok", "150%"):
            answer = curate("select", "--budget", budget)
            assert answer.code == 2, budget
            assert answer.sentence
        assert not (room / "run/manifest").exists()

    def test_changed_corpus(self, room: Path, curate: Callable[..., Answer]) -> None:
        assert curate("score", "train", "--scorer", "el2n").code == 0
        assert curate("select", "--budget", "0.5").code == 0
        pq.write_table(digits(slice(5, 205)), room / "train/0.parquet")
        answer = curate(
            "train", "train", "--model", "mlp", "--manifest", "run/manifest", "-o", "run/final"
        )
        assert answer.code == 2 and "0.parquet" in answer.sentence
        answer = curate("score", "train", "--scorer", "el2n")
        assert answer.code == 2
        assert curate("verify", "run").code == 1

    def test_another_configuration_is_refused_with_the_difference(
        self, room: Path, curate: Callable[..., Answer]
    ) -> None:
        assert curate("score", "train", "--scorer", "el2n").code == 0
        answer = curate("score", "train", "--scorer", "grand")
        assert answer.code == 2
        assert "el2n" in answer.sentence and "grand" in answer.sentence
        assert "--overwrite" in answer.sentence
        assert curate("score", "train", "--scorer", "grand", "--overwrite").code == 0
        answer = curate("train", "train", "--model", "mlp", "--epochs", 4)
        assert answer.code == 2 and "epochs" in answer.sentence

    def test_a_folder_that_holds_something_else_is_left_alone(
        self, room: Path, curate: Callable[..., Answer]
    ) -> None:
        assert curate("score", "train", "--scorer", "el2n").code == 0
        (room / "thesis").mkdir()
        (room / "thesis/chapter1.tex").write_text("dear diary")
        for command in (
            ["score", "train", "--scorer", "el2n"],
            ["select", "--budget", "0.5"],
            ["train", "train", "--model", "mlp"],
        ):
            for overwrite in ([], ["--overwrite"]):
                answer = curate(*command, "-o", "thesis", *overwrite)
                assert answer.code == 2 and "thesis" in answer.sentence
        assert [p.name for p in (room / "thesis").iterdir()] == ["chapter1.tex"]

    def test_flags(self, room: Path, curate: Callable[..., Answer]) -> None:
        for command, word in (
            (["train", "train"], "--model"),
            (["train", "train", "--model", "mpl"], "mpl"),
            (["train", "train", "--model", "mlp", "--save-epochs", "1;2"], "--save-epochs"),
            (["train", "train", "--model", "mlp", "--epochs", "0"], "epochs"),
            (["train", "train", "--model", "mlp", "--task-option", "label"], "--task-option"),
            (["train", "train", "--model", "mlp", "--task", "vision"], "vision"),
            (["score", "train"], "--scorer"),
            (["select", "nowhere", "--budget", "0.5"], "nowhere"),
            (["evaluate", "train", "--model", "mlp"], "--test"),
            (["evaluate", "--split", "s", "--test", "test", "--model", "mlp"], "--split"),
        ):
            answer = curate(*command)
            assert answer.code == 2 and word in answer.sentence, command


def test_values_are_yaml_in_which_1e_3_is_a_number() -> None:
    items = ["a=1e-3", "b={de: 1E2}", "c=.5e1", "d=e3", "e=[1, 2e0]", 'f="1e3"', "g=1e"]
    assert cli._pairs(items, "--param") == {
        "a": 0.001, "b": {"de": 100.0}, "c": 5.0, "d": "e3", "e": [1, 2.0], "f": "1e3", "g": "1e"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"--param 'a=\{b': cannot read '\{b'"):
        cli._pairs(["a={b"], "--param")


def test_amounts_are_counts_or_shares_to_the_digit() -> None:
    said = ["3", "0.25", "10%", "0.7 %", "0"]
    assert [cli._number(text, "--offset") for text in said] == [3, 0.25, 0.1, 0.007, 0]
    for text in ("%", "x%", "half", "1/2"):
        with pytest.raises(ValueError, match=rf"--offset '{text}' is neither a count nor a share"):
            cli._number(text, "--offset")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_command_in_one_sentence_and_gives_the_lock_back(
    room: Path, curate_environment: dict[str, str], number: int, code: int
) -> None:
    out = room / "run" / "stopped"
    command = [sys.executable, "-m", "curate.cli", "train", str(room / "train"), "--model", "mlp"]
    process = subprocess.Popen(
        [*command, "--epochs", "2000", "--threads", "1", "-o", str(out)],
        env=curate_environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "train.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert said.splitlines()[-1] == "error: interrupted; the same command goes on from here"
    assert "Traceback" not in said and not (out / "_lock.json").exists()
