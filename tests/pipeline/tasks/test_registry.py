"""Guessing the task from columns, and tasks of the user's own."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from curate.pipeline.models.models import make_model, model_args
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import TASKS, guess_task, make_task, task_from_description

Write = Callable[..., Corpus]
TEXT, INT, FLOAT, BYTES = pa.string(), pa.int64(), pa.float32(), pa.binary()
IMAGE = pa.struct([("bytes", BYTES), ("path", TEXT)])


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"image": IMAGE, "label": INT}, "image_classification"),
        ({"img": BYTES, "label": TEXT}, "image_classification"),
        ({"image": IMAGE, "caption": TEXT, "label": INT}, "image_classification"),
        ({"image_path": TEXT, "label": INT}, "image_classification"),
        ({"pixels": pa.list_(FLOAT, 784), "label": INT}, "image_classification"),
        ({"pixels": pa.list_(pa.list_(FLOAT)), "y": INT}, "image_classification"),
        ({"image": pa.list_(FLOAT), "label": INT}, "image_classification"),
        ({"text": TEXT, "label": INT}, "text_classification"),
        ({"sentence1": TEXT, "sentence2": TEXT, "label": INT, "idx": INT}, "text_classification"),
        ({"id": TEXT, "text": TEXT, "source": TEXT, "label": INT}, "text_classification"),
        ({"path": TEXT, "text": TEXT, "label": INT}, "text_classification"),
        ({"path": TEXT, "image": IMAGE, "label": INT}, "image_classification"),
        ({"path": TEXT, "content": TEXT}, "causal_lm"),
        ({"text": TEXT}, "causal_lm"),
        ({"text": TEXT, "url": TEXT, "score": FLOAT}, "causal_lm"),
        ({"story": TEXT}, "causal_lm"),
        ({"input_ids": pa.list_(pa.int32())}, "causal_lm"),
        ({"a": FLOAT, "b": INT, "target": INT}, "tabular_classification"),
        ({"embedding": pa.list_(FLOAT, 385), "label": INT}, "tabular_classification"),
    ],
)
def test_the_task_is_guessed_where_columns_tell(columns: dict[str, pa.DataType], kind: str) -> None:
    assert guess_task(pa.schema(list(columns.items()))) == kind
    assert kind in TASKS


def test_a_declared_class_label_counts_under_any_name() -> None:
    schema = pa.schema([("review", TEXT), ("stars", INT)])
    features = {"stars": {"_type": "ClassLabel", "names": ["bad", "good"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    assert guess_task(schema.with_metadata(metadata)) == "text_classification"
    assert guess_task(schema, label="stars") == "text_classification"
    assert guess_task(schema) == "causal_lm"


CHANGED = {
    "image_classification": (
        {"image": [[0.5] * 16, [0.1] * 16], "label": [0, 1]},
        {"image": pa.array([[0.5] * 25, [0.1] * 25], pa.list_(FLOAT, 25)), "label": [0, 1]},
        "'image' holds images of 25 values, but the task's images are 1x4x4",
    ),
    "tabular_classification": (
        {"x": [1.0, 2.0], "label": ["a", "b"]},
        {"x": ["1", "2"], "label": ["a", "b"]},
        "column 'x' holds string, not numbers",
    ),
    "text_classification": (
        {"text": ["a", "b"], "label": ["a", "b"]},
        {"text": ["a", "b"], "label": [0, 1]},
        "label column 'label' holds int64, but the classes are .a, b.",
    ),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_corpus_that_the_checkpoints_task_cannot_read_is_refused_at_once(
    kind: str, corpus: Write
) -> None:
    trained, other, complaint = CHANGED[kind]
    options = {"tokenizer": "bytes"} if kind == "text_classification" else {}
    task = make_task(kind, corpus(trained), **options)
    again = task_from_description(json.loads(json.dumps(task.describe())))
    again.columns(corpus(trained).schema)
    with pytest.raises(ValueError, match=complaint):
        again.columns(corpus(other).schema)
    with pytest.raises(ValueError, match=r"the task reads column '\w+', but the corpus has other"):
        again.columns(corpus({"other": [1]}).schema)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (
            {"job": TEXT, "age": INT, "label": INT},
            "--task text_classification or tabular_classification",
        ),
        ({"image": IMAGE, "text": TEXT, "label": INT}, "--task image_classification or text_cl"),
        ({"a": TEXT, "b": TEXT}, "no task suits the columns a .string., b .string."),
        ({"a": FLOAT}, "no task suits"),
        ({"label": INT}, "no task suits"),
    ],
)
def test_what_columns_do_not_tell_is_asked(columns: dict[str, pa.DataType], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        guess_task(pa.schema(list(columns.items())))


def test_an_unknown_task_is_answered_with_the_known_ones(corpus: Write) -> None:
    opened = corpus({"a": [1.0]})
    with pytest.raises(ValueError, match="unknown task 'images'; choose one of image_classif"):
        make_task("images", opened)
    with pytest.raises(ValueError, match="unknown task"):
        task_from_description({"kind": "of tomorrow"})


OWN_TASK = '''
import torch
from curate import Batch, Outputs, Task
from curate.pipeline.tasks.task import Columns

class Parity(Task):
    """Whether a number is odd."""
    kind = "parity"
    classes = ("even", "odd")

    def __init__(self, column="number", scale=1.0):
        self.column, self.scale = column, scale

    def columns(self, schema):
        if self.column not in schema.names:
            raise ValueError(f"no column {self.column}")
        return Columns((self.column,))

    def collate(self, encoded):
        numbers = torch.tensor(encoded.column(self.column).to_pylist())
        features = numbers[:, None].float() * self.scale
        return Batch({"features": features}, numbers % 2, len(numbers))

    def outputs(self, model, batch):
        logits = model(batch.inputs["features"])
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        return Outputs(loss, batch.targets, logits)

    def describe(self):
        return {"kind": self.kind, "columns": {"inputs": [self.column]},
                "classes": list(self.classes), "row_loss": "mean"}

    def model_args(self):
        return {"num_classes": 2, "input_shape": (1,)}

class NotATask:
    pass

def broken(**_):
    raise RuntimeError
'''


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "my task.py"
    path.write_text(OWN_TASK)
    return path


def test_a_users_task_works_like_ours(own_file: Path, corpus: Write, read_all: Callable) -> None:
    opened = corpus({"number": [4, 7]})
    task = make_task(f"{own_file}:Parity", opened, scale=0.5)
    model = make_model("mlp", **model_args(task))
    batch = task.collate(task.encode(read_all(opened)))
    assert batch.inputs["features"].tolist() == [[2.0], [3.5]]
    assert task.outputs(model, batch).loss.shape == (2,)
    described = json.loads(json.dumps(task.describe()))
    again = task_from_description(described)
    assert again.kind == "parity" and again.classes == ("even", "odd")
    assert torch.equal(again.collate(read_all(opened)).inputs["features"], batch.inputs["features"])


def test_a_users_task_travels_to_a_process_that_has_not_seen_its_file(
    own_file: Path, corpus: Write, tmp_path: Path
) -> None:
    task = make_task(f"{own_file}:Parity", corpus({"number": [4]}), scale=3)
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(task))
    script = (
        "import pickle, sys, pyarrow as pa\n"
        "task = pickle.load(open(sys.argv[1], 'rb'))\n"
        "batch = task.collate(pa.table({'number': [5]}))\n"
        "print(task.kind, batch.inputs['features'].item(), batch.targets.item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "task.pickle")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["parity", "15.0", "1"]


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("Missing", {}, "defines no 'Missing'; it defines .*Parity"),
        ("NotATask", {}, "is no subclass of curate.Task"),
        ("Parity", {"speed": 3}, "cannot be made with the options {'speed': 3}"),
        ("Parity", {"column": "x"}, "no column x"),
    ],
)
def test_a_users_mistake_is_named(
    own_file: Path, corpus: Write, name: str, options: dict[str, object], complaint: str
) -> None:
    opened = corpus({"number": [4]})
    with pytest.raises(ValueError, match=complaint):
        make_task(f"{own_file}:{name}", opened, **options)


def test_a_file_that_does_not_import_is_named(tmp_path: Path, corpus: Write) -> None:
    opened = corpus({"number": [4]})
    with pytest.raises(ValueError, match=r"no file gone\.py"):
        make_task("gone.py:Task", opened)
    (tmp_path / "bad.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        make_task(f"{tmp_path / 'bad.py'}:Task", opened)
