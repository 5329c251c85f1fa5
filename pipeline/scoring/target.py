"""The target: a small corpus that stands for what the model should do well, and its groups.

Shapes: M groups.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.tasks.task import Task
from curate.scorers.protocol import ADAM_KINDS, TARGET_KINDS, Scorer

ONE_GROUP = "none"
"""Asked for as the group column: all rows of the target together."""


@dataclass(frozen=True)
class Target:
    """A corpus in groups by the values of a column; without one, all rows are one group."""

    corpus: Corpus
    column: str | None
    groups: tuple[str, ...]
    counts: tuple[int, ...]
    """Rows of each group."""

    def describe(self) -> dict[str, Any]:
        """Return what `_meta.json` records: the corpus, and rows by group."""
        by_group = dict(zip(self.groups, self.counts, strict=True))
        return {**self.corpus.describe(), "group": self.column, "groups": by_group}

    def config(self) -> dict[str, Any]:
        """Return what decides the values."""
        return {"corpus": self.corpus.digest, "group": self.column}

    def groups_of(self, rows: pa.Table) -> Int64[np.ndarray, " n"]:
        """Return the place of each row's group in `groups`."""
        if self.column is None:
            return np.zeros(rows.num_rows, dtype=np.int64)
        values = _as_text(rows.column(self.column), self.column)
        places = pc.index_in(values, value_set=pa.array(self.groups, pa.string()))
        return np.asarray(places.to_numpy(), dtype=np.int64)


Given = str | os.PathLike[str] | Sequence[str] | Corpus
"""A target as a caller names it."""


def find_target(
    given: Given | None,
    column: str | None,
    task: Task,
    scorers: Mapping[str, Scorer],
    is_stored: bool = False,
) -> Target | None:
    """Return the target with its groups: by `column`, or by class where there are classes.

    `is_stored`: vectors of its rows are stored, whatever the scorers ask.

    Raises:
        ValueError: a scorer lacks a target or the target a scorer, or it does not suit the task.
    """
    kinds = TARGET_KINDS | ADAM_KINDS
    asking = [a for a, s in scorers.items() if any(n.kind in kinds for n in s.needs)]
    if given is None:
        if asking:
            raise ValueError(f"{asking[0]} compares rows with a target: name it by --target CORPUS")
        if column is not None:
            raise ValueError(f"target group {column!r} is given, but no --target")
        return None
    if not asking and not is_stored:
        raise ValueError(
            "target is given, but none of the scorers compares rows with a target: add "
            "grad_similarity, influence, --top-rows or --store, or leave the target out"
        )
    corpus = given if isinstance(given, Corpus) else open_corpus(given)
    try:
        columns = task.columns(corpus.schema)
    except ValueError as unsuited:
        raise ValueError(f"the target {corpus.uri} does not suit the task: {unsuited}") from None
    if column is None:
        column = columns.label if task.classes else None
    elif column == ONE_GROUP:
        column = None
    if column is None:
        return Target(corpus, None, ("all",), (corpus.rows,))
    return Target(corpus, column, *_groups(corpus, column))


def _groups(corpus: Corpus, column: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the different values of a column, in the order of their text, and the rows of each."""
    if column not in corpus.schema.names:
        raise ValueError(
            f"the target has no column {column!r} to group by; it has: "
            f"{', '.join(corpus.schema.names)} (or '{ONE_GROUP}' for one group)"
        )
    counts: dict[str, int] = {}
    for shard in range(len(corpus.shards)):
        for batch in corpus.read(shard, columns=[column], batch_rows=65_536):
            for found in pc.value_counts(_as_text(batch.column(0), column)).to_pylist():
                counts[found["values"]] = counts.get(found["values"], 0) + found["counts"]
    names = tuple(sorted(counts))
    return names, tuple(counts[name] for name in names)


def _as_text(values: pa.Array | pa.ChunkedArray, column: str) -> pa.Array | pa.ChunkedArray:
    if values.null_count:
        raise ValueError(f"target column {column!r} is null in a row; every row needs a group")
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_nested(values.type) or pa.types.is_binary(values.type):
        raise ValueError(f"target column {column!r} holds {values.type}, which makes no groups")
    return values.cast(pa.string())
