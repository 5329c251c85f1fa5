"""Rows of the corpus at even distances, as batches: what is estimated need not see all rows.

Shapes: n rows of the sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from curate.pipeline.scoring.windows import encode_rows
from curate.pipeline.scoring.work import Work
from curate.pipeline.tasks.task import Task


@dataclass(frozen=True)
class Sampled:
    """Encoded rows of one window and their numbers in the corpus; `refused` are those that could
    not be encoded, and why."""

    encoded: pa.Table | None
    numbers: Int64[np.ndarray, " n"]
    refused: dict[int, str]


def evenly_spaced(rows: int, most: int) -> Int64[np.ndarray, " n"]:
    """Return the numbers of at most `most` of so many rows, at even distances from the first on."""
    n = min(rows, most)
    numbers: np.ndarray = np.arange(n, dtype=np.int64) * rows // max(1, n)
    return numbers


def sampled_windows(work: Work, task: Task, most: int) -> Iterator[Sampled]:
    """Yield the sample a window at a time, in the order of the corpus."""
    numbers = evenly_spaced(work.corpus.rows, most)
    columns = list(task.columns(work.corpus.schema).all)
    first = 0
    for shard, rows in enumerate(s.rows for s in work.corpus.shards):
        inside = numbers[(numbers >= first) & (numbers < first + rows)]
        for start in range(0, len(inside), work.plan.window_rows):
            some = inside[start : start + work.plan.window_rows]
            table = work.corpus.take(shard, some - first, columns)
            encoded, good, errors = encode_rows(task.encode, table)
            yield Sampled(encoded, some[good], {int(some[i]): why for i, why in errors.items()})
        first += rows
