"""Rows read in several ways at once: as the checkpoints take them, and as references do.

A reference may have been trained on rows that were prepared otherwise: tables by other means and
deviations, texts by another tokenizer. What its own task makes of a row travels beside the row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from curate.pipeline.models.checkpoint import Checkpoint
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.tasks.task import Columns, Task
from curate.scorers.protocol import Batch, Outputs


def own_tasks(
    task: Mapping[str, Any], references: Sequence[Checkpoint], corpus: Corpus
) -> dict[int, Task]:
    """Return the tasks of the references that read rows otherwise than `task`, by their place."""
    return {
        i: task_from_description(c.task or task, corpus)
        for i, c in enumerate(references)
        if c.task is not None and _read_by(c.task) != _read_by(task)
    }


@dataclass(frozen=True)
class JointBatch(Batch):
    """A batch, and the same rows as some references take them, by the place of the reference."""

    others: Mapping[int, Batch] | None = None

    def to(self, device: torch.device | str) -> "JointBatch":
        """Return the batch with every tensor on `device`."""
        moved = {i: batch.to(device) for i, batch in (self.others or {}).items()}
        return _joint(super().to(device), moved)

    def select_rows(self, rows: Sequence[int]) -> "JointBatch":
        """Return the sub-batch of these rows, in this order."""
        picked = {i: batch.select_rows(rows) for i, batch in (self.others or {}).items()}
        return _joint(super().select_rows(rows), picked)


class JointTask(Task):
    """The checkpoints' task; its batches hold what the references' own tasks make of the rows."""

    def __init__(
        self, task: Task, others: Mapping[int, Task], references: Sequence[Checkpoint]
    ) -> None:
        self.task, self.others = task, others
        self.names = {i: Path(references[i].path).name for i in others}
        self.kind, self.classes = task.kind, task.classes

    def columns(self, schema: pa.Schema) -> Columns:
        return self.task.columns(schema)

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return the rows as the task encodes them, and a struct column for each reference."""
        made = self.task.encode(rows)
        for i, task in self.others.items():
            try:
                own = task.encode(rows)
            except ValueError as error:
                raise ValueError(f"reference {self.names[i]}: {error}") from None
            made = made.append_column(_column(i), own.to_struct_array())
        return made

    def cost(self, encoded: pa.Table) -> np.ndarray:
        return self.task.cost(encoded)

    def collate(self, encoded: pa.Table) -> Batch:
        """Return the task's batch of the rows, with one for each reference beside it."""
        own = {
            i: task.collate(pa.Table.from_struct_array(encoded.column(_column(i))))
            for i, task in self.others.items()
        }
        plain = encoded.drop_columns([_column(i) for i in self.others])
        return _joint(self.task.collate(plain), own)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        return self.task.outputs(model, batch)

    def blank(self, batch: Batch) -> Batch:
        return self.task.blank(batch)

    def describe(self) -> dict[str, Any]:
        return self.task.describe()


def batch_of(batch: Batch, reference: int) -> Batch:
    """Return the rows as the reference at this place takes them, on the batch's device."""
    others = batch.others if isinstance(batch, JointBatch) else None
    own = batch if others is None else others.get(reference, batch)
    return own.to(batch.targets.device)


def _joint(batch: Batch, others: Mapping[int, Batch]) -> JointBatch:
    return JointBatch(**vars(batch), others=others)


def _column(i: int) -> str:
    return f"reference {i}"


def _read_by(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a description decides what rows become: neither places nor the row's id."""
    kept = {k: v for k, v in task.get("preprocess", {}).items() if k not in ("tokenizer", "root")}
    columns = {k: v for k, v in task.get("columns", {}).items() if k != "id"}
    return {**task, "preprocess": kept, "columns": columns}
