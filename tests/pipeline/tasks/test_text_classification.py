"""Texts as encoder inputs, against the tokenizer alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.pipeline.tasks.tokenizers import tokenizer

Write = Callable[..., Corpus]


def test_padding_and_masks_are_those_of_the_tokenizer(
    bert_folder: str, corpus: Write, read_all: Callable, sentences: list[str]
) -> None:
    opened = corpus({"text": sentences, "label": [0, 1, 0, 1, 0]}, shards=2)
    task = make_task("text_classification", opened, model=bert_folder, max_length="16")
    encoded = task.encode(read_all(opened))
    batch = task.collate(encoded)
    expected = tokenizer(bert_folder)(
        sentences, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, value in batch.inputs.items():
        assert torch.equal(value, expected[name]), name
    assert task.cost(encoded).tolist() == expected["attention_mask"].sum(1).tolist()
    part = task.collate(encoded.slice(2, 2))
    width = part.inputs["input_ids"].shape[1]
    assert torch.equal(part.inputs["input_ids"], batch.inputs["input_ids"][2:4, :width])


def test_two_columns_are_a_pair(
    bert_folder: str, corpus: Write, read_all: Callable, sentences: list[str]
) -> None:
    first, second = sentences[:2], sentences[3:]
    opened = corpus({"premise": first, "hypothesis": second, "label": ["no", "yes"]})
    task = make_task("text_classification", opened, model=bert_folder)
    assert task.inputs == ("premise", "hypothesis")
    batch = task.collate(task.encode(read_all(opened)))
    expected = tokenizer(bert_folder)(
        first, second, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    assert batch.inputs["token_type_ids"].max() == 1
    for name, value in batch.inputs.items():
        assert torch.equal(value, expected[name]), name


def test_the_longest_text_is_the_models(bert_folder: str, corpus: Write) -> None:
    opened = corpus({"text": ["a", "b"], "label": [0, 1]})
    task = make_task("text_classification", opened, model=bert_folder)
    assert task.max_length == 24
    again = task_from_description(task.describe())
    assert again == task
    assert task.describe()["preprocess"]["tokenizer_digest"]


@pytest.mark.parametrize(
    ("kind", "setting"), [("text_classification", "max_length"), ("causal_lm", "context")]
)
def test_more_tokens_than_the_model_has_positions_are_warned_of(
    bert_folder: str, corpus: Write, caplog: pytest.LogCaptureFixture, kind: str, setting: str
) -> None:
    opened = corpus({"text": ["a", "b"], "label": [0, 1]})
    caplog.set_level("WARNING", logger="curate")
    for length in (24, 25):
        assert not caplog.messages
        make_task(kind, opened, model=bert_folder, **{setting: length, "inputs": "text"})
    (said,) = caplog.messages
    assert said.startswith(f"{setting}=25 is more than the model's 24 positions")


@pytest.mark.parametrize(
    ("text", "complaint"), [("", "the text is empty"), (" \n", "is empty"), (None, "is null")]
)
def test_a_text_of_length_zero_is_the_error_of_its_row(
    bert_folder: str, corpus: Write, read_all: Callable, text: str | None, complaint: str
) -> None:
    opened = corpus({"text": ["a dog", text, "fox"], "label": [0, 1, 0]})
    task = make_task("text_classification", opened, model=bert_folder)
    table = read_all(opened)
    assert task.encode(table.take([0, 2])).num_rows == 2
    with pytest.raises(ValueError, match=complaint):
        task.encode(table)


def test_bytes_need_no_tokenizer(corpus: Write, read_all: Callable) -> None:
    opened = corpus({"text": ["ab", "c"], "label": [0, 1]})
    task = make_task("text_classification", opened, tokenizer="bytes")
    batch = task.collate(task.encode(read_all(opened)))
    assert batch.inputs["input_ids"].tolist() == [[256, 97, 98], [256, 99, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert task.model_args() == {"num_classes": 2, "vocab_size": 257}


@pytest.mark.parametrize(
    ("columns", "options", "complaint"),
    [
        ({"a": ["x"] * 2, "b": ["y"] * 2}, {}, "which column is the text"),
        ({"a": [1, 2]}, {}, "no column holds text"),
        ({"a": ["x"] * 2}, {"inputs": "b"}, "no column 'b'"),
        ({"a": [1, 2], "b": ["x"] * 2}, {"inputs": "a"}, "column 'a' holds int64, not text"),
        ({"a": ["x"] * 2}, {"max_length": "long"}, "max_length='long' is no size"),
    ],
)
def test_a_wrong_column_is_answered_in_one_sentence(
    bert_folder: str,
    corpus: Write,
    columns: dict[str, Any],
    options: dict[str, Any],
    complaint: str,
) -> None:
    opened = corpus({**columns, "label": [0, 1]})
    with pytest.raises(ValueError, match=complaint):
        make_task("text_classification", opened, model=bert_folder, **options)
