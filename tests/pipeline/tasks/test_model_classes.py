"""A classifier's own order of classes, against the loss that transformers gives by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from curate.pipeline.models.checkpoint import find_checkpoints, load_model, save_checkpoint
from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.pipeline.tasks.tokenizers import tokenizer

transformers = pytest.importorskip("transformers")
Write = Callable[..., Corpus]
Classifier = Callable[..., str]


@pytest.fixture
def classifier(bert_folder: str, tmp_path: Path) -> Classifier:
    """Writes a classifier with these names of its outputs."""

    def write(*names: str) -> str:
        folder = str(tmp_path / "classifier")
        torch.manual_seed(0)
        transformers.BertForSequenceClassification.from_pretrained(
            bert_folder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        ).save_pretrained(folder)
        tokenizer(bert_folder).save_pretrained(folder)
        return folder

    return write


def test_labels_are_the_outputs_that_the_model_names_so(
    classifier: Classifier, corpus: Write, read_all: Callable, sentences: list[str]
) -> None:
    folder = classifier("wood", "air", "stone")
    labels = ["air", "wood", "air", "wood", "air"]  # one class is missing
    opened = corpus({"text": sentences, "label": labels})
    task = make_task("text_classification", opened, model=folder)
    (checkpoint,) = find_checkpoints(folder)
    model = load_model(checkpoint)
    task = task_from_description(json.loads(json.dumps(task.describe())))
    losses = task.outputs(model, task.collate(task.encode(read_all(opened)))).loss
    for text, label, loss in zip(sentences, labels, losses, strict=True):
        made = tokenizer(folder)(text, return_tensors="pt", truncation=True, max_length=24)
        alone = model(**made, labels=torch.tensor([model.config.label2id[label]]))
        assert loss.item() == pytest.approx(alone.loss.item(), 1e-5)


@pytest.mark.parametrize(
    ("names", "labels", "classes", "indices"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 1, 2, 1, 2], (0, 1, 2), [2, 1, 2, 1, 2]),
        (["c", "a", "b"], [2, 1, 2, 1, 2], ("c", "a", "b"), [2, 1, 2, 1, 2]),
        (["3", "1", "2"], [2, 1, 2, 1, 2], (3, 1, 2), [2, 1, 2, 1, 2]),
        (["LABEL_0", "LABEL_1"], [7, 3, 7, 3, 7], (3, 7), [1, 0, 1, 0, 1]),
        (["LABEL_0", "LABEL_1"], ["b", "a", "b", "a", "b"], ("a", "b"), [1, 0, 1, 0, 1]),
        (["true", "false"], [True, False, True, False, True], ("true", "false"), [0, 1, 0, 1, 0]),
        (["a", "b", "c"], ["x", "y", "x", "y", "x"], ("x", "y"), [0, 1, 0, 1, 0]),
    ],
)
def test_numbers_are_positions_and_other_words_another_task(
    classifier: Classifier,
    corpus: Write,
    read_all: Callable,
    sentences: list[str],
    names: list[str],
    labels: list[Any],
    classes: tuple[Any, ...],
    indices: list[int],
) -> None:
    opened = corpus({"text": sentences, "label": labels})
    task = make_task("text_classification", opened, model=classifier(*names))
    assert task.classes == classes
    assert task.encode(read_all(opened))["label"].to_pylist() == indices


def test_numbers_that_mean_other_classes_than_the_models_are_refused(
    classifier: Classifier, corpus: Write, sentences: list[str]
) -> None:
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": sentences, "label": [0, 1, 0, 1, 0]})
    opened = corpus(table.replace_schema_metadata(metadata))
    assert make_task("text_classification", opened, model=classifier("a", "b")).classes == (
        "a",
        "b",
    )
    with pytest.raises(ValueError, match=r"numbers its classes \(a, b\), but .* \(b, a\)"):
        make_task("text_classification", opened, model=classifier("b", "a"))


def test_a_checkpoint_names_its_own_classes(
    classifier: Classifier, corpus: Write, sentences: list[str], tmp_path: Path
) -> None:
    folder = classifier("a", "b")
    task = make_task(
        "text_classification", corpus({"text": sentences, "label": [*"xyxyx"]}), model=folder
    )
    args = model_args(task)
    model = make_model(folder, **args)
    save_checkpoint(
        tmp_path / "seed0-step000000",
        model,
        spec=folder,
        model_args=args,
        task=task.describe(),
        seed=0,
        step=0,
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "seed0-step000000")
    assert config.id2label == {0: "x", 1: "y"} and config.label2id == {"x": 0, "y": 1}
