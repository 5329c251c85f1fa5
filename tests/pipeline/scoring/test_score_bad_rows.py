"""Rows fail alone: what raises, is not finite or does not fit gets its error, the rest goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable, read_receipt
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.scoring.windows import encode_rows
from curate.pipeline.training.train import train

Make = Callable[..., str]
REFUSED, CHOKES = 661.0, 662.0
ROWS = [40, 25]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(corpus: str, checkpoints: str, out: Path, **settings: Any) -> ScoreTable:
    table = score(
        corpus,
        checkpoints=checkpoints,
        scorers="loss,el2n,grand",
        out=str(out),
        progress=False,
        **{"batch_rows": 8, **settings},
    )
    assert isinstance(table, ScoreTable)
    return table


def whole(table: ScoreTable) -> pa.Table:
    return pa.Table.from_batches(list(table.scan()), table.schema)


def test_each_bad_row_gets_its_error_and_the_rest_scores_as_without_it(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    checkpoints = points_checkpoints(seeds=2, steps=(1, 4))
    first = {3: REFUSED, 11: CHOKES, 12: CHOKES, 30: float("nan"), 50: float("inf")}
    bad = make_points(ROWS, first=first, labels={60: 7}, name="bad")
    good = make_points(ROWS, name="good")
    spoiled = whole(run(bad, checkpoints, tmp_path / "bad-scores"))
    clean = whole(run(good, checkpoints, tmp_path / "good-scores"))
    errors = {i: e for i, e in enumerate(spoiled["error"].to_pylist()) if e is not None}
    assert errors == {
        3: "x is refused",
        11: "RuntimeError: the model chokes",
        12: "RuntimeError: the model chokes",
        30: "the loss is nan at checkpoint seed0-step000001",
        50: "the score grand is nan",  # tanh is flat there: the loss is finite
        60: "label 7 is none of the 3 classes",
    }
    keep = [i for i in range(65) if i not in errors]
    for name in ("loss", "loss_std", "el2n", "grand", "grand_std"):
        column = spoiled[name]
        assert [i for i, v in enumerate(column.to_pylist()) if v is None] == sorted(errors)
        np.testing.assert_allclose(
            column.take(keep).to_numpy(), clean[name].take(keep).to_numpy(), rtol=1e-4, atol=1e-6
        )
    assert spoiled["label"].to_pylist()[:60] == clean["label"].to_pylist()[:60]


def test_errors_are_compiled_and_counted(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    corpus = make_points(
        ROWS, first={3: CHOKES, 45: REFUSED}, extra={"id": [f"p{i}" for i in range(65)]}
    )
    table = run(corpus, points_checkpoints(), tmp_path / "s", unit_rows=20)
    assert table.success["bad_rows"] == 2 and table.success["quarantined"] == []
    assert table.errors().to_pylist() == [
        {"shard": 0, "row": 3, "unit": 0, "error": "RuntimeError: the model chokes", "id": "p3"},
        {"shard": 1, "row": 5, "unit": 2, "error": "x is refused", "id": "p45"},
    ]
    assert read_receipt(table.folder, 0)["bad_rows"] == 1


def test_too_many_bad_rows_stop_the_run_with_one_sentence(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    checkpoints = points_checkpoints()
    corpus = make_points(ROWS, first=dict.fromkeys(range(20, 31), CHOKES))
    with pytest.raises(RunError, match=r"more than 10 rows cannot be scored, the first is row 2\d"):
        run(corpus, checkpoints, tmp_path / "s")
    with pytest.raises(RunError, match="more than 3 rows"):
        run(corpus, checkpoints, tmp_path / "s", max_bad_rows=3)
    table = run(corpus, checkpoints, tmp_path / "s", max_bad_rows=11)
    assert table.success["bad_rows"] == 11


def test_bad_rows_of_several_units_add_up(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    checkpoints = points_checkpoints()
    corpus = make_points(ROWS, first={5: CHOKES, 25: CHOKES, 45: CHOKES, 60: CHOKES})
    for _ in range(2):  # the second time no unit more is scored
        with pytest.raises(RunError, match="3 rows cannot be scored, more than 2"):
            run(corpus, checkpoints, tmp_path / "s", unit_rows=10, max_bad_rows=2)
    assert len(list((tmp_path / "s").glob("part-*"))) == 5
    assert run(corpus, checkpoints, tmp_path / "s", unit_rows=10).success["bad_rows"] == 4


def test_a_corpus_that_no_model_accepts_is_refused_before_anything_runs(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    corpus = make_points([30], first=dict.fromkeys(range(30), CHOKES))
    with pytest.raises(ValueError, match=r"none of 30 rows can be scored.*the model chokes"):
        run(corpus, points_checkpoints(), tmp_path / "s")
    assert not list((tmp_path / "s").glob("part-*"))


def test_what_the_model_says_of_good_rows_goes_before_a_bad_row_among_them(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    first = {0: REFUSED} | dict.fromkeys(range(1, 30), CHOKES)
    corpus = make_points([30], first=first)
    with pytest.raises(ValueError, match=r"none of 30 rows can be scored.*the model chokes"):
        run(corpus, points_checkpoints(), tmp_path / "scores")


def test_bad_rows_at_the_very_start_do_not_stop_the_probe(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    corpus = make_points([40], first=dict.fromkeys(range(9), CHOKES))
    table = run(corpus, points_checkpoints(), tmp_path / "s")
    assert table.success["bad_rows"] == 9


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory")],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_splits_the_batch_and_says_so_in_the_receipt(
    make_points: Make,
    points_checkpoints: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    from curate.scorers.engine import Engine

    checkpoints, corpus = points_checkpoints(), make_points([40])
    usual = whole(run(corpus, checkpoints, tmp_path / "a", batch_rows=16))
    call = Engine.__call__

    def small(self: Engine, batch: Any) -> Any:
        if batch.rows > 5:
            raise error
        return call(self, batch)

    monkeypatch.setattr(Engine, "__call__", small)
    table = run(corpus, checkpoints, tmp_path / "b", batch_rows=16)
    split = whole(table)
    for name in ("loss", "el2n", "grand"):
        np.testing.assert_allclose(split[name], usual[name], rtol=1e-4, atol=1e-6)
    assert split["error"].null_count == 40
    splits = read_receipt(table.folder, 0)["splits"]
    # 16, 16 and 8 rows: each 16 splits at 16 and twice at 8, the 8 once.
    assert sorted(rows for _, rows in splits) == [8, 8, 8, 8, 8, 16, 16]
    assert table.success["splits"] == 7


def test_a_row_that_spoils_its_neighbours_is_found(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from curate.scorers.engine import Engine

    checkpoints = points_checkpoints()
    corpus = make_points([32], first={9: 99.0})
    usual = whole(run(corpus, checkpoints, tmp_path / "a"))
    call = Engine.__call__

    def contagious(self: Engine, batch: Any) -> Any:
        found = call(self, batch)
        if (batch.inputs["x"][:, 0] == 99).any():
            found = {signal: torch.full_like(value, torch.nan) for signal, value in found.items()}
        return found

    monkeypatch.setattr(Engine, "__call__", contagious)
    found = whole(run(corpus, checkpoints, tmp_path / "b"))
    assert [i for i, e in enumerate(found["error"].to_pylist()) if e] == [9]
    keep = [i for i in range(32) if i != 9]
    np.testing.assert_allclose(found["grand"].take(keep), usual["grand"].take(keep), rtol=1e-4)


def test_encoding_takes_out_what_cannot_be_encoded() -> None:
    rows = pa.table({"v": list(range(20))})

    def encode(table: pa.Table) -> pa.Table:
        if {3, 4, 19} & set(table["v"].to_pylist()):
            raise ValueError("three, four and nineteen")
        return table

    encoded, good, errors = encode_rows(encode, rows)
    assert encoded is not None
    assert encoded["v"].to_pylist() == good.tolist() == sorted(set(range(20)) - {3, 4, 19})
    assert errors == dict.fromkeys((3, 4, 19), "three, four and nineteen")
    nothing, good, errors = encode_rows(encode, rows.slice(3, 2))
    assert nothing is None and not len(good) and set(errors) == {0, 1}


def test_an_answer_of_one_token_has_no_angles_and_is_told_why(tmp_path: Path) -> None:
    """It is a target, but the model is not run on it."""
    rows = {"ask": [[1, 2], [3], [4, 5]], "answer": [[6], [7, 8], [9, 1, 2]]}
    tokens = {name: pa.array(of, pa.list_(pa.int32())) for name, of in rows.items()}
    pq.write_table(pa.table(tokens), tmp_path / "corpus.parquet")
    corpus = str(tmp_path / "corpus.parquet")
    (checkpoint,) = train(
        corpus, model="gpt", seeds=1, steps=1, save_steps=[1], out=tmp_path / "run",
        task="causal_lm", task_options={"inputs": "answer", "prompt": "ask"}, progress=False,
    )  # fmt: skip
    table = score(
        corpus, checkpoints=checkpoint.path, scorers="angle_concentration", progress=False,
        out=str(tmp_path / "scores"),
    )  # fmt: skip
    assert isinstance(table, ScoreTable)
    errors = whole(table)["error"].to_pylist()
    assert errors[0] is not None and "behind a prompt it needs two" in errors[0]
    assert errors[1:] == [None, None]
