"""What `--vectors` may name: a source of one vector per row, and the rows it is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa

from curate.pipeline.manifests.mixed_corpus import open_described
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.scoring.score_table import ScoreTable
from curate.selectors.vectors import Vectors


class Source(Protocol):
    """Vectors with where they are from. Made without reading them; `read` does."""

    @property
    def wanted(self) -> "Wanted":
        """The rows that they belong to."""
        ...

    @property
    def content(self) -> dict[str, Any]:
        """What the manifest says of them: `source`, `digest` and what else decides them."""
        ...

    def read(self) -> Vectors: ...


@dataclass(frozen=True)
class Wanted:
    """The rows that need vectors: those of a score table or, with `is_target`, of a target set.

    `elsewhere` is the target corpus; without one it is the target of the score run.
    """

    scores: ScoreTable
    is_target: bool = False
    elsewhere: str | None = None

    @property
    def flag(self) -> str:
        return "--target-vectors" if self.is_target else "--vectors"

    @property
    def rows(self) -> int | None:
        """How many there must be; None where any number will do."""
        if not self.is_target:
            return self.scores.rows
        return None if self.elsewhere is None else self.corpus.rows

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus of the rows, opened and compared with what the score run recorded.

        Raises:
            ValueError: it is missing or was changed, or there is no target.
        """
        if not self.is_target:
            return open_described(self.scores.corpus)
        if self.elsewhere is not None:
            return open_corpus(self.elsewhere)
        described = self.scores.meta.get("target")
        if not described:
            raise ValueError(
                f"{self.flag} reads a target corpus and {self.scores.path} was made without one; "
                "name it by --target CORPUS"
            )
        return open_described(described)

    def type_of(self, column: str) -> pa.DataType:
        """Return what a column of the corpus holds.

        Raises:
            ValueError: there is no such column.
        """
        schema = self.corpus.schema
        if column not in schema.names:
            raise ValueError(
                f"{self.flag}: no column {column!r} in {self.corpus.uri}; "
                f"it has: {', '.join(schema.names)}"
            )
        return schema.field(column).type

    def batches(self, columns: list[str], batch_rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """Yield these columns of the rows, in the order of the score table (of the target)."""
        if self.is_target:
            for shard in range(len(self.corpus.shards)):
                yield from self.corpus.read(shard, columns=columns, batch_rows=batch_rows)
            return
        for unit in self.scores.units.to_pylist():
            shard, start, rows = unit["shard"], unit["row_start"], unit["rows"]
            yield from self.corpus.read(shard, start, rows, columns, batch_rows)
