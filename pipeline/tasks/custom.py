"""A user's own task, `file.py:Class`, carried from the command line to workers and checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.task import Columns, Task
from curate.pipeline.user_code import absolute_spec, load_named
from curate.scorers.protocol import Batch, Outputs


class CustomTask(Task):
    """The user's task, with the file it comes from added to what it says of itself.

    It pickles as its description, so a worker imports the file by path.
    """

    def __init__(self, task: Task, path: str, options: Mapping[str, Any]) -> None:
        self.task, self.path, self.options = task, path, dict(options)
        self.kind, self.classes = task.kind, task.classes

    def columns(self, schema: pa.Schema) -> Columns:
        return self.task.columns(schema)

    def encode(self, rows: pa.Table) -> pa.Table:
        return self.task.encode(rows)

    def cost(self, encoded: pa.Table) -> np.ndarray:
        return self.task.cost(encoded)

    def collate(self, encoded: pa.Table) -> Batch:
        return self.task.collate(encoded)

    def blank(self, batch: Batch) -> Batch:
        return self.task.blank(batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return self.task.outputs(model, batch)

    def model_args(self) -> dict[str, Any]:
        """Return the user's `model_args()`, else the number of classes."""
        own = getattr(self.task, "model_args", None)
        if own is not None:
            return dict(own())
        return {"num_classes": len(self.classes)} if self.classes else {}

    def describe(self) -> dict[str, Any]:
        return {**self.task.describe(), "path": self.path, "options": self.options}

    def __reduce__(self) -> tuple[Callable[..., Task], tuple[dict[str, Any]]]:
        return custom_from_description, (self.describe(),)


def custom_from_corpus(spec: str, corpus: Corpus, options: Mapping[str, Any]) -> CustomTask:
    """Return `Class.from_corpus(corpus, **options)` if the class has it, else `Class(**options)`.

    Raises:
        ValueError: the class is no Task, or does not take these options.
    """
    made = _make(spec, "from_corpus", (corpus,), options)
    task = CustomTask(made, absolute_spec(spec), options)
    task.columns(corpus.schema)
    return task


def custom_from_description(description: Mapping[str, Any]) -> CustomTask:
    """Return `Class.from_description(description)` where it has it, else `Class(**options)`."""
    options = description["options"]
    cls = load_named(description["path"])
    if hasattr(cls, "from_description"):
        task = cls.from_description(description)
    else:
        task = _make(description["path"], "", (), options)
    return CustomTask(task, description["path"], options)


def _make(
    spec: str, constructor: str, arguments: tuple[object, ...], options: Mapping[str, Any]
) -> Task:
    cls = load_named(spec)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ValueError(f"{spec} is no subclass of curate.Task")
    own = getattr(cls, constructor, None) if constructor else None
    try:
        return own(*arguments, **options) if own is not None else cls(**options)
    except TypeError as error:
        raise ValueError(
            f"{spec} cannot be made with the options {dict(options)}: {error}"
        ) from error
