"""A task turns corpus rows into model inputs, targets and one loss per row.

Built-in tasks live in `pipeline/tasks/`; a user's own subclasses `Task` and is named on the
command line as `--task file.py:Class`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from curate.scorers.protocol import Batch, Outputs


@dataclass(frozen=True)
class Columns:
    """The corpus columns a task reads."""

    inputs: tuple[str, ...]
    label: str | None = None
    id: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.inputs, *(c for c in (self.label, self.id) if c))


class Task(ABC):
    """Base of all tasks. Override `columns`, `collate` and `outputs`; the rest has defaults.

    An instance is bound to its columns and classes and must survive `describe` -> `make_task`.
    """

    kind: str = "custom"
    classes: tuple[str | int, ...] | None = None

    @abstractmethod
    def columns(self, schema: pa.Schema) -> Columns:
        """Return the columns this task reads.

        Raises:
            ValueError: a column is missing or has a type that the task cannot read.
        """

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return the rows in model-ready form (decoded, tokenised), one for one, in order.

        Raises:
            ValueError: a row is unusable; the message says why.
        """
        return rows

    def cost(self, encoded: pa.Table) -> np.ndarray:
        """Return what each encoded row costs in a batch, int64 [B]: tokens for text, else 1."""
        return np.ones(encoded.num_rows, dtype=np.int64)

    @abstractmethod
    def collate(self, encoded: pa.Table) -> Batch:
        """Return the batch of encoded rows.

        Raises:
            ValueError: rows do not fit together or a label is out of range.
        """

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with an empty input in each row, the same in all; targets as they are.

        For models of how far labels can be guessed without an input (`curate train --null-input`).

        Raises:
            ValueError: the task has no empty input; the message says why.
        """
        raise ValueError(
            f"the task {self.kind} does not say what an empty input is: define blank(batch) in it"
        )

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model and return each row's loss with its logits and targets."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the JSON-ready description kept in checkpoints: {kind, columns, classes, ...}."""
