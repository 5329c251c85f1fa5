"""Bad input is answered in one sentence, before anything runs, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_folder import differences
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder

Make = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def points(make_points: Make, points_checkpoints: Make, tmp_path: Path) -> dict[str, Any]:
    return {
        "corpus": make_points([20, 10]),
        "checkpoints": points_checkpoints(seeds=2, steps=(1,)),
        "scorers": "loss,el2n",
        "out": str(tmp_path / "scores"),
        "progress": False,
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corpus": "nowhere"}, "nowhere"),
        ({"checkpoints": "nowhere"}, "no checkpoint at nowhere"),
        ({"scorers": "el2m"}, "unknown scorer 'el2m'"),
        ({"scorers": []}, "no scorer is named"),
        ({"scorers": "label=loss"}, "'label' cannot be kept under its own name"),
        ({"scorers": "shard=loss"}, "cannot be called 'shard'"),
        ({"scorers": "loss,loss_std=el2n"}, "cannot be called 'loss_std'"),
        ({"keep": ["colour"]}, "no column 'colour' to keep; the corpus has: x, label"),
        ({"task": "image_classification"}, "was trained for points, not for image_classification"),
        ({"task_options": {"row_loss": "sum"}}, "row_loss"),
        ({"engine": "spark"}, "unknown engine 'spark'; choose one of: auto, local, ray"),
        ({"engine": "local", "workers": 2}, "for --engine ray"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"num_gpus": -1}, "num_gpus must not be negative"),
        ({"unit_rows": 0}, "unit_rows must be at least 1"),
        ({"batch_rows": 0}, "batch_rows must be at least 1"),
        ({"max_bad_rows": -1}, "max_bad_rows must not be negative"),
        ({"target": "corpus"}, "none of the scorers compares rows with a target"),
        ({"scorers": "forgetting"}, "no records.parquet beside"),
        ({"model": "mlp"}, "mlp"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input_is_one_sentence(
    points: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        score(**{**points, **changes})
    assert "\n" not in str(caught.value)
    parts = Path(points["out"])
    assert not list(parts.glob("part-*"))


def test_missing_columns_are_named(points: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"y": [1.0, 2.0]}), tmp_path / "other" / "a.parquet")
    with pytest.raises(ValueError, match=r"label|x"):
        score(**{**points, "corpus": str(tmp_path / "other")})


def test_another_configuration_is_refused_with_the_difference(points: dict[str, Any]) -> None:
    score(**points)
    with pytest.raises(ValueError, match=r"another configuration \(scorers.grand: nothing -> "):
        score(**{**points, "scorers": "loss,el2n,grand"})
    with pytest.raises(ValueError, match=r"batches.batch_rows: 256 -> 16"):
        score(**{**points, "batch_rows": 16})
    one = f"{points['checkpoints']}/seed0-step000001"
    with pytest.raises(ValueError, match=r"\(checkpoints: "):
        score(**{**points, "checkpoints": one})
    table = score(**{**points, "scorers": "grand", "overwrite": True})
    assert list(table.scorers) == ["grand"]


def test_settings_that_change_no_value_do_not_stop_a_resume(points: dict[str, Any]) -> None:
    first = score(**points)
    again = score(**{**points, "max_bad_rows": 7, "threads": 2, "workers": 1})
    assert again.success == first.success


def test_a_changed_corpus_is_refused_and_the_shard_named(
    points: dict[str, Any], tmp_path: Path
) -> None:
    score(**points)
    shard = Path(points["corpus"]) / "s1.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.set_column(1, "label", pa.array([0] * 10)), shard)
    with pytest.raises(ValueError, match=r"is of other data: shard s1\.parquet changed"):
        score(**points)


def test_a_corpus_that_grew_since_a_killed_run_is_refused(points: dict[str, Any]) -> None:
    score(**points)
    (Path(points["out"]) / "_SUCCESS.json").unlink()
    first = pq.read_table(Path(points["corpus"]) / "s0.parquet")
    pq.write_table(first, Path(points["corpus"]) / "s2.parquet")
    with pytest.raises(ValueError, match="the corpus has 3 shards, recorded were 2"):
        score(**points)


def test_a_folder_with_something_else_is_refused_and_left_alone(
    points: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(points["out"])
    out.mkdir()
    (out / "thesis.tex").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something else \(thesis.tex\)"):
            score(**{**points, "overwrite": overwrite})
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    (out / "_meta.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="holds something else"):
        score(**{**points, "overwrite": True})


def test_a_file_in_the_way_is_refused(points: dict[str, Any]) -> None:
    Path(points["out"]).write_text("here")
    with pytest.raises(ValueError, match="is a file"):
        score(**points)


def test_a_second_run_at_the_same_time_says_so(points: dict[str, Any]) -> None:
    with RunLock(Folder(points["out"])):
        with pytest.raises(RuntimeError, match="another run"):
            score(**points)


def test_an_unfinished_table_says_how_to_finish_it(points: dict[str, Any]) -> None:
    score(**points)
    (Path(points["out"]) / "_SUCCESS.json").unlink()
    with pytest.raises(ValueError, match=r"is not finished .* run the same `curate score` command"):
        ScoreTable.open(points["out"])
    with pytest.raises(ValueError, match="holds no score table"):
        ScoreTable.open(Path(points["out"]).parent / "nothing")


def test_a_damaged_part_is_named(points: dict[str, Any]) -> None:
    score(**points)
    (Path(points["out"]) / "_SUCCESS.json").unlink()
    part = Path(points["out"]) / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-00000.parquet is damaged: delete it"):
        score(**points)


def test_differences_name_the_key_the_old_and_the_new_value() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": "x"}}
    now = {"a": 1, "b": {"c": [1, 3], "e": "y"}}
    assert differences(before, now) == [
        "b.c: [1, 2] -> [1, 3]",
        'b.d: "x" -> nothing',
        'b.e: nothing -> "y"',
    ]
    assert differences(before, before) == []


def test_a_run_refused_at_its_first_rows_leaves_the_folder_free(points: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        score(**{**points, "scorers": "grand(params=nosuch)"})
    assert score(**points).rows == 30
    with pytest.raises(ValueError, match="another configuration"):
        score(**{**points, "scorers": "grand"})
