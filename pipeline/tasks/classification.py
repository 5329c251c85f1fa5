"""What all classification tasks share: the label, the loss and the call of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.pipeline.tasks.calls import call
from curate.pipeline.tasks.labels import Labels
from curate.pipeline.tasks.schema import require
from curate.pipeline.tasks.task import Columns, Task
from curate.scorers.protocol import Batch, Outputs


@dataclass
class Classification(Task):
    """Rows with one label each. Subclasses say how the inputs are read."""

    inputs: tuple[str, ...]
    label: str
    labels: Labels
    id: str | None = None

    def __post_init__(self) -> None:
        self.classes = self.labels.classes

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the input and label columns, and `id` where the corpus has it."""
        found = require(schema, Columns(self.inputs, self.label))
        self.labels.check(schema, self.label)
        return Columns(found.inputs, found.label, self.id if self.id in schema.names else None)

    def encode_label(self, rows: pa.Table) -> np.ndarray:
        """Return the rows' class indices, int64 [n]; raises ValueError naming a bad label."""
        return self.labels.encode(rows.column(self.label), self.label)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return each row's cross entropy, in nats, with logits and class indices."""
        logits = call(model, batch.inputs)
        if logits.ndim != 2 or logits.shape[1] != len(self.labels.classes):
            raise ValueError(
                f"the model gives logits of shape {list(logits.shape)}, but the task has "
                f"{len(self.labels.classes)} classes"
            )
        loss = token_cross_entropy(logits, batch.targets)
        return Outputs(loss=loss, targets=batch.targets, logits=logits)

    def describe(self) -> dict[str, Any]:
        """Return the description kept in checkpoints; `from_description` reads it."""
        return {
            "kind": self.kind,
            "columns": {"inputs": list(self.inputs), "label": self.label, "id": self.id},
            "classes": list(self.labels.classes),
            "preprocess": {"labels": "index" if self.labels.by_index else "value"}
            | self.preprocess(),
            "row_loss": "mean",
        }

    def preprocess(self) -> dict[str, Any]:
        """Return what `from_description` needs beside columns and classes, as JSON."""
        return {}


def described(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments that every classification task shares."""
    columns = description["columns"]
    return {
        "inputs": tuple(columns["inputs"]),
        "label": columns["label"],
        "id": columns.get("id"),
        "labels": Labels(
            tuple(description["classes"]), description["preprocess"]["labels"] == "index"
        ),
    }
