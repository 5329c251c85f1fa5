"""Several corpora read as one: their shards in a row, the columns that all of them have."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.reading.schemas import cast_batch, unify_schemas

log = logging.getLogger("curate.corpus")

FORMAT = "mixture"


@dataclass(frozen=True)
class MixedCorpus(Corpus):
    """The shards of several corpora, one corpus after the other. Made by `mix_corpora`.

    Shard s of the whole is the s-th when all are counted through; columns that not all corpora have
    are left out, and types are widened as between shards. Relative file names in columns work only
    where all corpora have one root.
    """

    components: tuple[Corpus, ...] = field(default=())

    def url(self, shard: int) -> str:
        component, own = self._component(shard)
        return component.url(own)

    def read(
        self,
        shard: int,
        start: int = 0,
        rows: int | None = None,
        columns: Sequence[str] | None = None,
        batch_rows: int = 1024,
    ) -> Iterator[pa.RecordBatch]:
        schema = self._project(columns)
        component, own = self._component(shard)
        batches = component.read(own, start, rows, schema.names, batch_rows)
        return (cast_batch(batch, schema) for batch in batches)

    def take(
        self, shard: int, rows: Int64[np.ndarray, " n"], columns: Sequence[str] | None = None
    ) -> pa.Table:
        schema = self._project(columns)
        component, own = self._component(shard)
        batches = component.take(own, rows, schema.names).to_batches()
        return pa.Table.from_batches([cast_batch(b, schema) for b in batches], schema)

    def describe(self) -> dict[str, Any]:
        """Return the description of all shards, and under `parts` which corpora they are of."""
        parts = [
            {"uri": c.uri, "format": c.format, "rows": c.rows, "shards": len(c.shards)}
            for c in self.components
        ]
        return {**super().describe(), "parts": parts}

    def sha256(self, shard: int) -> str:
        component, own = self._component(shard)
        return component.sha256(own)

    def check(self) -> None:
        for component in self.components:
            component.check()

    def same_corpus(self, description: dict[str, Any]) -> None:
        described = split_description(description)
        if len(described) != len(self.components):
            raise ValueError(
                f"the mixture has {len(self.components)} corpora, recorded were {len(described)}"
            )
        for component, was in zip(self.components, described, strict=True):
            component.same_corpus(was)

    def _component(self, shard: int) -> tuple[Corpus, int]:
        for component in self.components:
            if shard < len(component.shards):
                return component, shard
            shard -= len(component.shards)
        raise AssertionError(f"the mixture has no shard {shard} more")


def mix_corpora(components: Sequence[Corpus]) -> MixedCorpus:
    """Return the corpora as one.

    Raises:
        ValueError: one is a mixture itself, a column has types that do not fit together, or no
            column is in all of them.
    """
    for component in components:
        if isinstance(component, MixedCorpus):
            raise ValueError("one of the corpora is a mixture itself; mix its corpora directly")
    common = [
        name
        for name in components[0].schema.names
        if all(name in c.schema.names for c in components)
    ]
    if not common:
        places = " and ".join(c.uri for c in components)
        raise ValueError(f"{places} have no column in common; give one of them the same names")
    left_out = {name for c in components for name in c.schema.names} - set(common)
    if left_out:
        log.warning("columns that not all corpora have: %s; left out", ", ".join(sorted(left_out)))
    schemas = [(c.uri, _chosen(c.schema, common)) for c in components]
    roots = {c.root for c in components}
    return MixedCorpus(
        "\n".join(c.uri for c in components),
        FORMAT,
        tuple(shard for c in components for shard in c.shards),
        unify_schemas(schemas, loose=all(c.format == "json" for c in components)),
        roots.pop() if len(roots) == 1 else "",
        (),
        (),
        tuple(components),
    )


def open_described(description: dict[str, Any], moved_to: str | None = None) -> Corpus:
    """Return the corpus or mixture of a description, opened and compared with it.

    `moved_to` says where the data is now; for a mixture a line per corpus.

    Raises:
        ValueError: it is missing or was changed (the shard is named).
    """
    parts = split_description(description)
    places: list[str | None] = [moved_to] * len(parts)
    if moved_to is not None and "parts" in description:
        places = [*moved_to.split("\n")]
    if len(places) != len(parts):
        raise ValueError(f"the mixture has {len(parts)} corpora, {len(places)} places are given")
    opened = [open_corpus(p or d["uri"]) for p, d in zip(places, parts, strict=True)]
    corpus = mix_corpora(opened) if "parts" in description else opened[0]
    corpus.same_corpus(description)
    return corpus


def split_description(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a description for each corpus of a mixture, or the only one."""
    if "parts" not in description:
        return [description]
    found, start = [], 0
    for part in description["parts"]:
        stop = start + part["shards"]
        found.append({**part, "shards": description["shards"][start:stop]})
        start = stop
    return found


def _chosen(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names], schema.metadata)
