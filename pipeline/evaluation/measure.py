"""How good a model is on a test corpus.

Shapes: B rows of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from curate.kernels.cross_entropy import token_statistics
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.task import Task
from curate.pipeline.training.batch_loss import row_tokens
from curate.pipeline.training.encoded_rows import BadRows, trainable_rows
from curate.scorers.protocol import Batch, Outputs

BATCH_ROWS = 256
BATCH_TOKENS = 1 << 13


@dataclass(frozen=True)
class Measure:
    """The test results. `accuracy` is null for language; `loss` is in nats per target."""

    rows: int
    bad_rows: int
    loss: float
    accuracy: float | None

    @property
    def value(self) -> float:
        """The result that runs are compared by."""
        return self.loss if self.accuracy is None else self.accuracy


class HeldOut:
    """The usable rows of a test corpus, ready to be run through any number of models."""

    def __init__(self, corpus: Corpus, task: Task, device: str) -> None:
        source = RowSource.of_corpus(corpus, task.columns(corpus.schema).all)
        self.task, self.bad = task, BadRows()
        self._count = len(source)
        self._rows = trainable_rows(source, task, device, self.bad, self._count)

    def measure(self, model: nn.Module, precision: str = "float32") -> Measure:
        """Return the model's accuracy (one target a row) or mean loss per target token.

        Raises:
            ValueError: no test row can be used.
        """
        totals = np.zeros(4)  # rows, targets, sum of losses, right ones
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for batch in self._batches():
                device = batch.targets.device.type
                dtype = getattr(torch, precision)
                with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
                    outputs = self.task.outputs(model, batch)
                totals += (batch.rows, *_sums(outputs, self._is_sum))
        model.train(was_training)
        rows, targets, loss, right = totals
        if not targets:
            raise ValueError(f"no row of the test corpus can be used; {self.bad.first()}")
        accuracy = None if np.isnan(right) else float(right / targets)
        return Measure(int(rows), self._count - int(rows), float(loss / targets), accuracy)

    @property
    def _is_sum(self) -> bool:
        return bool(self.task.describe().get("row_loss", "mean") == "sum")

    def _batches(self) -> Iterator[Batch]:
        """Yield batches of at most BATCH_ROWS rows and about BATCH_TOKENS tokens."""
        start, size = 0, min(16, BATCH_ROWS)
        while start < self._count:
            positions = np.arange(start, min(start + size, self._count))
            batch, _ = self._rows.batch(positions)
            start = int(positions[-1]) + 1
            if batch is not None:
                yield batch
                each = max(1, batch.targets.numel() // batch.rows)
                size = max(1, min(BATCH_ROWS, BATCH_TOKENS // each))


def _sums(outputs: Outputs, is_sum: bool) -> tuple[float, float, float]:
    """Return the number of targets, the sum of their losses, and how many are right.

    Right is NaN where targets are tokens, or where the task shows no logits.
    """
    loss = outputs.loss.double()
    if outputs.targets is None or outputs.targets.dim() < 2:
        right = float("nan")
        if outputs.targets is not None and outputs.logits is not None:
            right = float(token_statistics(outputs.logits, outputs.targets).correct.sum())
        return float(len(loss)), float(loss.sum()), right
    tokens = row_tokens(outputs).double()
    sums = loss if is_sum else loss * tokens
    return float(tokens.sum()), float(sums.sum()), float("nan")
