"""From `--vectors SOURCE` to a score table whose rows have vectors."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from jaxtyping import Float64
from numpy import ndarray

from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.vectors.column import Column
from curate.pipeline.vectors.hashed import Hashed
from curate.pipeline.vectors.manifest_weights import table_weights, weighted_manifest
from curate.pipeline.vectors.npy import NpyFile
from curate.pipeline.vectors.source import Source, Wanted
from curate.pipeline.vectors.stored import Stored, is_store
from curate.selectors.protocol import Selector, Table
from curate.selectors.vectors import Vectors

SOURCES = "embedding, sketch, probs, column:NAME, FILE.npy, encoder:FOLDER or hash:NAME"


class TableWithVectors:
    """A table and vectors in its order, read when they are first asked for."""

    def __init__(
        self,
        table: Table,
        vectors: Source,
        target: Source | None,
        weighted: Manifest | None = None,
    ) -> None:
        self._table, self._vectors, self._target = table, vectors, target
        self._weighted = weighted

    @property
    def rows(self) -> int:
        return self._table.rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return self._table.scan(columns)

    @cached_property
    def vectors(self) -> Vectors:
        return self._vectors.read()

    @cached_property
    def target(self) -> Vectors | None:
        """Vectors to compare with; ValueError if they have another dimension."""
        if self._target is None:
            return None
        target = self._target.read()
        if target.dimension != self.vectors.dimension:
            raise ValueError(
                f"--target-vectors have {target.dimension} dimensions, "
                f"--vectors {self.vectors.dimension}; both must come from the same encoder"
            )
        return target

    def manifest_weights(self) -> Float64[ndarray, " n"]:
        """Return each row's weight in the manifest that the method names, NaN where it has none.

        Raises:
            ValueError: the manifest has rows that the table lacks.
        """
        assert self._weighted is not None, "the method names a manifest"
        return table_weights(self._weighted, self._table)

    def target_values(self, column: str) -> pa.Array:
        """Return a column of the target's rows, in the order of its vectors.

        Raises:
            ValueError: the target corpus is not known, or has no such column.
        """
        assert self._target is not None, "there is a target"
        wanted = self._target.wanted
        if column not in wanted.corpus.schema.names:
            have = ", ".join(wanted.corpus.schema.names)
            raise ValueError(
                f"the target {wanted.corpus.uri} has no column {column!r}; it has: {have}"
            )
        parts = [batch.column(0) for batch in wanted.batches([column])]
        return pa.chunked_array(parts, wanted.corpus.schema.field(column).type).combine_chunks()


def with_vectors(
    table: Table,
    scores: ScoreTable,
    selector: Selector,
    method: str,
    vectors: str | None,
    target_vectors: str | None,
    target: str | None = None,
) -> tuple[Table, dict[str, Any]]:
    """Return the table with the vectors asked for, and what the manifest says of them.

    A method that compares vectors has `uses_vectors`, one that needs a target `uses_target`, one
    that can do with or without one `takes_target`. One whose setting `manifest` names a manifest
    gets the weights of that.

    Raises:
        ValueError: the method needs vectors that are not named or names what it has no use for,
            a source is none, or the manifest has no weights or is of other data.
    """
    uses, uses_target, takes_target = (
        bool(getattr(selector, name, False))
        for name in ("uses_vectors", "uses_target", "takes_target")
    )
    for flag, text, is_used in (
        ("--vectors", vectors, uses),
        ("--target-vectors", target_vectors, uses_target or takes_target),
    ):
        if text is not None and not is_used:
            raise ValueError(f"method {method!r} makes no use of {flag}; leave it out")
    if target is not None and target_vectors is None:
        raise ValueError("--target names a corpus; say what its vectors are by --target-vectors")
    if not uses:
        return table, {}
    if vectors is None:
        raise ValueError(
            f"method {method!r} compares the rows' vectors: say which, --vectors {SOURCES}"
        )
    if uses_target and target_vectors is None:
        raise ValueError(
            f"method {method!r} compares rows with a target: name its vectors by --target-vectors"
        )
    source = find_source(vectors, Wanted(scores))
    content: dict[str, Any] = {"vectors": source.content}
    aim = None
    if target_vectors is not None:
        aim = find_source(target_vectors, Wanted(scores, is_target=True, elsewhere=target))
        content["target_vectors"] = aim.content
    weighted = None
    if (named := getattr(selector, "manifest", None)) is not None:
        weighted = weighted_manifest(named, scores)
        content["weights_of"] = {"source": named, "digest": f"sha256:{weighted.digest}"}
    return TableWithVectors(table, source, aim, weighted), content


def find_source(text: str, wanted: Wanted) -> Source:
    """Return the source that `text` names, checked as far as that takes no reading.

    Raises:
        ValueError: it names none, or one that does not suit the rows.
    """
    kind, colon, name = text.partition(":")
    if colon and kind == "column":
        return Column(name, wanted)
    if colon and kind == "hash":
        return Hashed(name, wanted)
    if colon and kind == "encoder":
        from curate.pipeline.vectors.encoder import Encoder  # brings torch

        folder, at, column = name.rpartition("@")
        if at and not Path(name).is_dir():
            return Encoder(folder, wanted, column)
        return Encoder(name, wanted)
    if is_store(text):
        return Stored(text, wanted)
    if text.endswith(".npy"):
        return NpyFile(text, wanted)
    raise ValueError(f"{wanted.flag} {text!r} names no vectors; give {SOURCES}")
