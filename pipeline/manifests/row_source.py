"""The rows of a selection, or of a whole corpus, by position."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.manifests.epoch import EpochPlan
from curate.pipeline.manifests.places import (
    CorpusPlaces,
    PartPlaces,
    Placed,
    Places,
    Recent,
    placed,
)
from curate.selectors.settings import did_you_mean

if TYPE_CHECKING:
    from curate.pipeline.manifests.manifest import Manifest
    from curate.pipeline.manifests.schedules import Schedule
    from curate.pipeline.reading.corpus import Corpus

BLOCK = 4096
CACHE_BYTES = 1 << 30
MAX_GAP = 65_536  # rows not wanted that are cheaper to read through than to look for
SHARD, ROW, WEIGHT = "__shard", "__row", "__weight"


class RowSource:
    """Positions 0..K-1 of a selection (or of a corpus), sorted by (shard, row).

    Rows come with the corpus columns asked for and `__shard`, `__row`, `__weight`. A selection
    whose decoded rows take at most `cache_bytes` is read once, in one sweep, and stays in memory.
    A larger one is read in blocks of BLOCK positions, of which as many stay as fit: visited in
    `order`, every block is then read once per epoch (and with it the whole Parquet row groups it
    lies in: row groups of a few thousand rows suit this best).
    """

    def __init__(
        self,
        corpus: "Corpus",
        places: Places,
        columns: Sequence[str] | None = None,
        weight_kind: str = "none",
        cache_bytes: int = CACHE_BYTES,
        schedule: "Schedule | None" = None,
    ) -> None:
        if unknown := sorted(set(columns or ()) - set(corpus.schema.names)):
            have = ", ".join(corpus.schema.names)
            raise ValueError(
                f"the corpus {corpus.uri} has no column {unknown[0]!r}; it has: {have}"
                + did_you_mean(unknown[0], corpus.schema.names)
            )
        self.corpus, self.places, self.weight_kind = corpus, places, weight_kind
        self.schedule = schedule
        self.columns = list(corpus.schema.names if columns is None else columns)
        self.cache_bytes = cache_bytes
        self._blocks: Recent[int, pa.Table] = Recent(cache_bytes, lambda t: int(t.nbytes))
        self._all: pa.Table | None = None
        self._plan = EpochPlan(places, weight_kind, 0, 0, BLOCK, schedule)

    @classmethod
    def of_corpus(cls, corpus: "Corpus", columns: Sequence[str] | None = None) -> "RowSource":
        """Return the source of all rows, each with weight 1."""
        return cls(corpus, CorpusPlaces([shard.rows for shard in corpus.shards]), columns)

    @classmethod
    def of_manifest(cls, manifest: "Manifest", columns: Sequence[str] | None = None) -> "RowSource":
        """Return the source of the selected rows with their weights."""
        places = PartPlaces(manifest.folder, manifest.parts)
        kind, schedule = manifest.weight_kind, manifest.schedule
        return cls(manifest.corpus, places, columns, kind, schedule=schedule)

    def __len__(self) -> int:
        return int(self.places.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        fresh = Recent[int, pa.Table](self.cache_bytes, lambda t: int(t.nbytes))
        plan = replace(self._plan)  # without what it has found out so far
        # Rows are read again, not sent.
        state = {**self.__dict__, "_blocks": fresh, "_all": None, "_plan": plan}
        state.pop("_is_small", None)
        return state

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of `take`."""
        fields = [self.corpus.schema.field(name) for name in self.columns]
        own = [(SHARD, pa.int32()), (ROW, pa.int64()), (WEIGHT, pa.float32())]
        own_fields = [pa.field(name, dtype) for name, dtype in own]
        return pa.schema([*fields, *own_fields], self.corpus.schema.metadata)

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return which positions this epoch visits, in what order; weights of kind `sampling`
        and `repeat`, or the schedule, decide how often a position occurs."""
        if (self._plan.seed, self._plan.epoch) != (seed, epoch):
            kind, schedule = self.weight_kind, self.schedule
            self._plan = EpochPlan(self.places, kind, seed, epoch, BLOCK, schedule)
        return self._plan

    def preload(self) -> None:
        """Read a small source into memory now, before processes that shall share it start."""
        _ = self._is_small

    def share_cache(self, workers: int) -> None:
        """Keep to one of `workers` equal parts of the memory."""
        self._blocks.limit = self.cache_bytes // workers

    def take(self, positions: Int64[ndarray, " n"]) -> pa.Table:
        """Return the rows at `positions`, in that order; positions may repeat."""
        if self._is_small:
            assert self._all is not None, "a small source is held whole"
            return self._all.take(pa.array(positions))
        blocks = positions // BLOCK
        order = np.argsort(blocks, kind="stable")
        pieces = []
        for block in np.unique(blocks):
            mine = positions[blocks == block] - block * BLOCK
            pieces.append(self._blocks.get(int(block), self._read_block).take(pa.array(mine)))
        if not pieces:
            return self.schema.empty_table()
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))

    def stream(
        self, start: int = 0, stop: int | None = None, batch_rows: int = 1024
    ) -> Iterator[pa.Table]:
        """Yield the rows at positions [start, stop) in order; memory is one read batch."""
        for piece in placed(self.places, start, len(self) if stop is None else stop):
            for begin, end in _runs(piece):
                yield from self._read_run(piece.slice(begin, end), batch_rows)

    @cached_property
    def _is_small(self) -> bool:
        """True if everything fits into the cache; then reads it all, once."""
        sample = self._read_block(0) if len(self) else self.schema.empty_table()
        per_row = sample.nbytes / max(1, sample.num_rows)
        if per_row * len(self) > self._blocks.limit:
            return False
        pieces = [sample, *self.stream(sample.num_rows)]
        self._all = pa.concat_tables(pieces).combine_chunks()
        return True

    def _read_block(self, block: int) -> pa.Table:
        start = block * BLOCK
        pieces = []
        for piece in placed(self.places, start, min(len(self), start + BLOCK)):
            for shard, begin, end in _by_shard(piece):
                part = piece.slice(begin, end)
                rows = self.corpus.take(shard, part.row, self.columns)
                pieces.append(self._with_identity(rows, part))
        return pa.concat_tables(pieces).combine_chunks()

    def _read_run(self, run: Placed, batch_rows: int) -> Iterator[pa.Table]:
        at, first, last = int(run.row[0]), 0, int(run.row[-1])
        reads = self.corpus.read(int(run.shard[0]), at, last - at + 1, self.columns, batch_rows)
        for batch in reads:
            stop = int(np.searchsorted(run.row, at + batch.num_rows))
            if stop > first:
                kept = run.slice(first, stop)
                rows = pa.Table.from_batches([batch]).take(pa.array(kept.row - at))
                yield self._with_identity(rows, kept)
            at, first = at + batch.num_rows, stop
        assert first == len(run.row), "the corpus ended before the last selected row"

    def _with_identity(self, rows: pa.Table, places: Placed) -> pa.Table:
        columns = [*rows.select(self.columns).columns]
        columns += [pa.array(places.shard), pa.array(places.row), pa.array(places.weight)]
        return pa.table(columns, schema=self.schema)


def _by_shard(piece: Placed) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, begin, end) for each stretch of one shard."""
    cuts = np.flatnonzero(np.diff(piece.shard)) + 1
    edges = [0, *cuts.tolist(), len(piece.row)]
    for begin, end in pairwise(edges):
        yield int(piece.shard[begin]), begin, end


def _runs(piece: Placed) -> Iterator[tuple[int, int]]:
    """Yield stretches of one shard without a gap too wide to read through."""
    for _, begin, end in _by_shard(piece):
        gaps = np.flatnonzero(np.diff(piece.row[begin:end]) > MAX_GAP) + 1
        edges = [begin, *(begin + gaps).tolist(), end]
        yield from pairwise(edges)
