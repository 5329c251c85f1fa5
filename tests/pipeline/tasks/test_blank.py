"""What an empty input is, task by task, and models that are trained on nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.models.checkpoint import find_checkpoints, load_model, read_checkpoint
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import make_task
from curate.pipeline.tasks.task import Task
from curate.pipeline.training.train import train
from curate.scorers.protocol import IGNORE, Batch

Write = Callable[..., Corpus]
Read = Callable[[Corpus], pa.Table]


def batch_of(task: Task, rows: pa.Table) -> Batch:
    return task.collate(task.encode(rows))


def same_targets(blank: Batch, batch: Batch) -> bool:
    return torch.equal(blank.targets, batch.targets) and blank.rows == batch.rows


def test_images_and_tables_are_zeros(corpus: Write, read_all: Read) -> None:
    rng = np.random.default_rng(0)
    pixels = pa.array(rng.integers(1, 255, (6, 16)).astype(np.uint8).tolist(), pa.list_(pa.uint8()))
    label = [0, 1, 2, 0, 1, 2]
    images = corpus({"image": pixels, "label": label})
    task = make_task("image_classification", images, shape="4x4", mean=0.5, std=0.25)
    batch = batch_of(task, read_all(images))
    blank = task.blank(batch)
    assert blank.inputs["images"].shape == (6, 1, 4, 4) and not blank.inputs["images"].any()
    assert same_targets(blank, batch)
    table = corpus({"a": rng.normal(size=6), "w": list("xyxyxy"), "label": label})
    task = make_task("tabular_classification", table)
    batch = batch_of(task, read_all(table))
    blank = task.blank(batch)
    assert blank.inputs["features"].shape == (6, 3) and not blank.inputs["features"].any()
    assert same_targets(blank, batch)


def test_texts_are_the_special_tokens_of_the_empty_one(
    corpus: Write, read_all: Read, bert_folder: str, gpt2_folder: str, sentences: list[str]
) -> None:
    rows = corpus({"text": sentences, "label": [0, 1, 0, 1, 0]})
    task = make_task("text_classification", rows, model=bert_folder)
    batch = batch_of(task, read_all(rows))
    blank = task.blank(batch)
    cls, sep = (task.blank(batch).inputs["input_ids"][0]).tolist()  # [CLS] [SEP]
    assert batch.inputs["input_ids"][:, 0].unique().tolist() == [cls]
    assert (batch.inputs["input_ids"] == sep).sum() == 5
    assert blank.inputs["input_ids"].tolist() == [[cls, sep]] * 5
    assert blank.inputs["attention_mask"].tolist() == [[1, 1]] * 5
    assert set(blank.inputs) == set(batch.inputs) and same_targets(blank, batch)
    task = make_task("text_classification", rows, tokenizer="bytes")
    assert task.blank(batch_of(task, read_all(rows))).inputs["input_ids"].tolist() == [[256]] * 5
    task = make_task("text_classification", rows, tokenizer=gpt2_folder)  # adds no token
    ids = task.blank(batch_of(task, read_all(rows))).inputs["input_ids"]
    assert ids.tolist() == [[0]] * 5  # its <|endoftext|>


def test_pairs_are_a_pair_of_empty_texts(
    corpus: Write, read_all: Read, bert_folder: str, sentences: list[str]
) -> None:
    rows = corpus({"premise": sentences, "hypothesis": sentences[::-1], "label": [0, 1, 0, 1, 0]})
    task = make_task("text_classification", rows, model=bert_folder)
    blank = task.blank(batch_of(task, read_all(rows)))
    (cls, sep, end) = blank.inputs["input_ids"][0].tolist()
    assert sep == end != cls
    assert blank.inputs["token_type_ids"][0].tolist() == [0, 0, 1]


def test_documents_and_unwilling_tasks_say_why_there_is_none(
    corpus: Write, read_all: Read, sentences: list[str], points_code: Path
) -> None:
    rows = corpus({"text": sentences})
    task = make_task("causal_lm", rows)
    with pytest.raises(ValueError, match="a document of causal_lm is all target"):
        task.blank(batch_of(task, read_all(rows)))
    points = corpus({"x": [[1.0, 2.0, 3.0, 4.0]], "label": [0]})
    task = make_task(f"{points_code}:Points", points)
    with pytest.raises(ValueError, match=r"the task points does not say .* define blank\(batch\)"):
        task.blank(batch_of(task, read_all(points)))


def prompted(corpus: Write) -> Corpus:
    """Of the third the prompt is longer than a window, of the fourth it is empty."""
    tokens = pa.list_(pa.int32())
    return corpus({
        "ask": pa.array([[5, 6, 7], [8], list(range(10, 20)), []], tokens),
        "answer": pa.array([[1, 2, 3, 4, 5, 6, 7], [9], [1, 2], [3, 4, 5]], tokens),
    })  # fmt: skip


@pytest.mark.parametrize("context", [4, 32])
def test_documents_follow_an_empty_prompt(corpus: Write, read_all: Read, context: int) -> None:
    """Token 0, then the answer; its tokens are targets as before, in windows of their own."""
    rows = prompted(corpus)
    task = make_task("causal_lm", rows, inputs="answer", prompt="ask", context=context)
    batch = batch_of(task, read_all(rows))
    blank = task.blank(batch)
    ids = range(4) if blank.row_ids is None else blank.row_ids.tolist()
    seen: list[list[int]] = [[], [], [], []]
    predicted: list[list[int]] = [[], [], [], []]
    for row, given, goals in zip(ids, blank.inputs["input_ids"], blank.targets, strict=True):
        predicted[row] += [int(t) for t in goals if t != IGNORE]
        seen[row] += given[: int((goals != IGNORE).nonzero().max()) + 1].tolist()
    assert seen == [[0, 1, 2, 3, 4, 5, 6], [0], [0, 1], [0, 3, 4]]
    assert predicted == [[1, 2, 3, 4, 5, 6, 7], [9], [1, 2], [4, 5]]
    assert blank.rows == 4 and set(blank.inputs) == set(batch.inputs)
    for row in range(4):  # a row's blank does not depend on the rows beside it
        one = task.blank(batch.select_rows([row])).select_rows([0])
        of = blank.select_rows([row])
        length = one.targets.shape[1]
        assert torch.equal(one.targets, of.targets[:, :length])
        assert torch.equal(one.inputs["input_ids"], of.inputs["input_ids"][:, :length])


def test_an_empty_prompt_of_text_is_the_tokenizer_s(
    corpus: Write, read_all: Read, gpt2_folder: str
) -> None:
    rows = corpus({"ask": ["who?", "what?"], "text": ["me", "a rose"]})
    task = make_task("causal_lm", rows, inputs="text", prompt="ask")
    blank = task.blank(batch_of(task, read_all(rows)))  # of bytes
    assert blank.inputs["input_ids"].tolist() == [[256, ord("m"), 0, 0, 0, 0], [256, *b"a ros"]]
    assert blank.targets.tolist() == [[*b"me", *[IGNORE] * 4], [*b"a rose"]]
    task = make_task("causal_lm", rows, inputs="text", prompt="ask", tokenizer=gpt2_folder)
    blank = task.blank(batch_of(task, read_all(rows)))
    assert blank.inputs["input_ids"][:, 0].tolist() == [0, 0]  # its <|endoftext|>


def test_a_user_s_task_may_say_what_is_empty(
    corpus: Write, read_all: Read, points_code: Path, tmp_path: Path
) -> None:
    code = points_code.read_text().replace(
        "    def describe(self):",
        "    def blank(self, batch):\n"
        "        x = torch.full_like(batch.inputs['x'], 7.0)\n"
        "        return Batch({'x': x}, batch.targets, batch.rows)\n\n"
        "    def describe(self):",
    )
    (tmp_path / "blank.py").write_text(code)
    points = corpus({"x": [[1.0, 2.0, 3.0, 4.0]], "label": [2]})
    task = make_task(f"{tmp_path / 'blank.py'}:Points", points)
    assert task.blank(batch_of(task, read_all(points))).inputs["x"].tolist() == [[7.0] * 4]


def test_a_null_model_learns_the_classes_shares_and_says_what_it_is(tmp_path: Path) -> None:
    """Of what it is shown only the labels differ, so cross entropy is least at their shares."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, 400, p=[0.6, 0.3, 0.1])
    x = rng.normal(size=400) + 3 * label
    pq.write_table(pa.table({"x": x, "label": label}), tmp_path / "data.parquet")
    result = CliRunner().invoke(
        cli.app,
        ["train", str(tmp_path / "data.parquet"), "--model", "mlp", "--null-input", "--seeds", "1",
         "--epochs", "30", "--save-epochs", "30", "-o", str(tmp_path / "null")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (checkpoint,) = find_checkpoints(tmp_path / "null")
    assert checkpoint.null_input
    with torch.no_grad():
        found = load_model(checkpoint)(torch.zeros(1, 1)).softmax(1)[0]
    shares = np.bincount(label) / 400
    # Each step sees 32 rows: their shares are off by 0.02 or so, which decays with the rate.
    np.testing.assert_allclose(found.numpy(), shares, atol=0.02)
    told = json.loads((tmp_path / "null" / "train.json").read_text())
    assert told["null_input"] is True
    with pytest.raises(ValueError, match="null_input: True -> None"):
        train(
            str(tmp_path / "data.parquet"), model="mlp", seeds=1, epochs=30, save_epochs=[30],
            out=tmp_path / "null", progress=False,
        )  # fmt: skip


def test_other_training_says_nothing_of_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [0.0, 1.0] * 4, "label": [0, 1] * 4}), tmp_path / "d.parquet")
    (checkpoint,) = train(
        str(tmp_path / "d.parquet"), model="mlp", seeds=1, epochs=1, save_epochs=[1],
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert not checkpoint.null_input
    assert "null_input" not in json.loads((Path(checkpoint.path) / "curate.json").read_text())
    assert "null_input" not in json.loads((tmp_path / "run" / "train.json").read_text())
    assert read_checkpoint(checkpoint.path) == checkpoint


def test_training_refuses_what_has_no_empty_input(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a rose is a rose"] * 8}), tmp_path / "d.parquet")
    for pack, message in (
        (False, "null inputs need a prompt, a column"),
        (True, "documents have no inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            train(
                str(tmp_path / "d.parquet"), model="gpt", null_input=True, pack=pack, seeds=1,
                task="causal_lm", out=tmp_path / "run", progress=False,
            )  # fmt: skip
