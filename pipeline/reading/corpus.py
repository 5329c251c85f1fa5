"""The corpus: an ordered set of shards that is read in streams and refuses changed data."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from curate.pipeline.reading.discover import Found, discover
from curate.pipeline.reading.fingerprint import (
    WHOLE_BYTES,
    FileState,
    file_state,
    fingerprint,
    kind_for,
    pool,
    sha256,
)
from curate.pipeline.reading.formats import open_shard
from curate.pipeline.reading.readers import Readers, named
from curate.pipeline.reading.schemas import cast_batch, unify_schemas
from curate.pipeline.storing.storage import canonical_json, join

TAKE_ROWS = 1024

_readers = Readers()
_unchanged: set[tuple[str, str, str]] = set()  # (url, stamp, fingerprint) compared before


@dataclass(frozen=True)
class Shard:
    """One file: its path below the corpus root, and what tells whether its data changed."""

    path: str
    rows: int
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Corpus:
    """Shards in a fixed order, of one format and one schema. Made by `open_corpus`.

    It holds no open file and no row, pickles small, and opens shards where they are read.
    `root` is the folder that shard paths, and relative file paths in columns, start from.
    """

    uri: str
    format: str
    shards: tuple[Shard, ...]
    schema: pa.Schema
    root: str
    _stamps: tuple[str, ...] = field(repr=False, compare=False)
    _hints: tuple[Any, ...] = field(repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    def url(self, shard: int) -> str:
        """Return where the shard is: a local path or a URL."""
        return join(self.root, self.shards[shard].path)

    def read(
        self,
        shard: int,
        start: int = 0,
        rows: int | None = None,
        columns: Sequence[str] | None = None,
        batch_rows: int = 1024,
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows [start, start + rows) in order, in batches of at most `batch_rows`.

        Memory is one block: a Parquet row group read by pages, an Arrow record batch, 8 MiB of
        JSON lines. Blocks before `start` are skipped unread (compressed JSON: unparsed).

        Raises:
            ValueError: the shard changed since the corpus was opened, is damaged, or lacks a
                column.
        """
        schema = self._project(columns)
        total = self.shards[shard].rows
        stop = total if rows is None else min(start + rows, total)
        assert 0 <= start <= total, f"row {start} of a shard with {total} rows"
        assert batch_rows > 0
        self._refuse_change(shard)
        return self._stream(shard, start, stop, schema, batch_rows)

    def take(
        self, shard: int, rows: Int64[np.ndarray, " n"], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Return these rows; `rows` ascends. Only blocks that hold some of them are read.

        Raises as `read`.
        """
        schema = self._project(columns)
        assert not len(rows) or (rows[0] >= 0 and rows[-1] < self.shards[shard].rows)
        assert (np.diff(rows) >= 0).all(), "rows are not sorted"
        self._refuse_change(shard)
        picked = []
        with named(self.url(shard)):
            reader = _readers.get(
                self.format, self.url(shard), self._hints[shard], self.shards[shard].fingerprint
            )
            for block in np.unique(np.searchsorted(reader.starts, rows, side="right") - 1):
                at = int(reader.starts[block])
                stop = rows[np.searchsorted(rows, reader.starts[block + 1]) - 1]
                for batch in reader.batches(int(block), schema.names, TAKE_ROWS):
                    lo, hi = np.searchsorted(rows, (at, at + batch.num_rows))
                    if lo < hi:
                        chosen = batch.take(pa.array(rows[lo:hi] - at))
                        picked.append(cast_batch(chosen, schema))
                    at += batch.num_rows
                    if at > stop:
                        break
        return pa.Table.from_batches(picked, schema)

    def describe(self) -> dict[str, Any]:
        """Return what score tables and manifests record: {uri, format, rows, shards}."""
        shards = [
            {"path": s.path, "rows": s.rows, "bytes": s.bytes, "fingerprint": s.fingerprint}
            for s in self.shards
        ]
        return {"uri": self.uri, "format": self.format, "rows": self.rows, "shards": shards}

    @property
    def digest(self) -> str:
        """sha256 of the description without its uri: equal for copies, new for changed data."""
        described = {key: value for key, value in self.describe().items() if key != "uri"}
        return hashlib.sha256(canonical_json(described)).hexdigest()

    def sha256(self, shard: int) -> str:
        """Return the sha256 of the shard's bytes, hexadecimal. Reads all of them."""
        return sha256(self.url(shard))

    def check(self) -> None:
        """Raise ValueError, naming the first shard that changed since the corpus was opened."""
        with pool() as threads:
            list(threads.map(self._refuse_change, range(len(self.shards))))

    def same_corpus(self, description: dict[str, Any]) -> None:
        """Raise ValueError, naming the first shard that is not as `description` recorded it."""
        recorded = description["shards"]
        for i, (shard, was) in enumerate(zip(self.shards, recorded, strict=False)):
            if shard.path != was["path"]:
                raise ValueError(
                    f"the corpus is not the recorded one: shard {i} is {shard.path}, "
                    f"recorded was {was['path']}"
                )
            for what in ("bytes", "rows"):
                if (now := getattr(shard, what)) != was[what]:
                    raise ValueError(
                        f"shard {shard.path} changed since it was recorded: {now} {what}, "
                        f"recorded were {was[what]}"
                    )
            if self._fingerprint_like(i, was["fingerprint"]) != was["fingerprint"]:
                raise ValueError(f"shard {shard.path} changed since it was recorded")
        if len(self.shards) != len(recorded):
            both = min(len(self.shards), len(recorded))
            new = [f"{shard.path} is new" for shard in self.shards[both:]]
            gone = [f"{was['path']} is gone" for was in recorded[both:]]
            raise ValueError(
                f"the corpus has {len(self.shards)} shards, recorded were {len(recorded)}: "
                f"{(new + gone)[0]}"
            )

    def _project(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        for name in columns:
            if self.schema.get_field_index(name) < 0:
                raise ValueError(
                    f"no column {name!r} in {self.uri}; it has: {', '.join(self.schema.names)}"
                )
        return pa.schema([self.schema.field(name) for name in columns], self.schema.metadata)

    def _fingerprint_like(self, shard: int, recorded: str) -> str:
        """The limit between whole and sampled hashes depends on the corpus size: follow theirs."""
        ours, theirs = self.shards[shard].fingerprint, recorded.partition(":")[0]
        if ours.partition(":")[0] == theirs or "etag" in (theirs, ours.partition(":")[0]):
            return ours
        return fingerprint(self.url(shard), file_state(self.url(shard)), theirs)

    def _refuse_change(self, shard: int) -> None:
        url, known = self.url(shard), self.shards[shard]
        try:
            state = file_state(url)
        except FileNotFoundError:
            raise ValueError(f"shard {url} is gone; restore it") from None
        seen = (url, state.stamp, known.fingerprint)
        if state.stamp == self._stamps[shard] or seen in _unchanged:
            return
        kind = known.fingerprint.partition(":")[0]
        if state.size != known.bytes or fingerprint(url, state, kind) != known.fingerprint:
            raise ValueError(
                f"shard {url} changed since the corpus was opened; start over on unchanging data"
            )
        _unchanged.add(seen)

    def _stream(
        self, shard: int, start: int, stop: int, schema: pa.Schema, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        with named(self.url(shard)):
            reader = open_shard(self.format, self.url(shard), self._hints[shard])
        try:
            first = int(np.searchsorted(reader.starts, start, side="right")) - 1
            for block in range(first, len(reader.starts) - 1):
                at = int(reader.starts[block])
                if at >= stop:
                    return
                batches = reader.batches(block, schema.names, batch_rows)
                while at < stop:
                    with named(self.url(shard)):
                        if (batch := next(batches, None)) is None:
                            break
                        lo, hi = max(start - at, 0), min(stop - at, batch.num_rows)
                        cut = cast_batch(batch.slice(lo, hi - lo), schema) if lo < hi else None
                    at += batch.num_rows
                    if cut is not None:
                        yield cut
        finally:
            reader.close()


def open_corpus(uri: str | os.PathLike[str] | Sequence[str], *, split: str | None = None) -> Corpus:
    """Return the corpus at a path, folder, glob, URL, list of these, or `datasets` hub name.

    Every shard is looked at: row counts, schema and fingerprint, eight at a time. Parquet and
    Arrow shards cost their footers (and, in small corpora, a hash of their bytes); JSON lines are
    read once, and not again in this process while they stay as they are.

    Raises:
        ValueError: nothing to read, a damaged shard, shards that do not fit together.
    """
    found = discover(uri, split)
    is_small = sum(state.size for state in found.states) <= WHOLE_BYTES
    with pool() as threads:
        urls = [join(found.root, name) for name in found.names]
        looks = list(threads.map(_look, repeat(found.form), urls, found.states, repeat(is_small)))
    shards = tuple(
        Shard(name, look.rows, state.size, look.fingerprint)
        for name, state, look in zip(found.names, found.states, looks, strict=True)
    )
    if not sum(shard.rows for shard in shards):
        raise ValueError(f"{found.uri} has no rows")
    schema = unify_schemas(
        zip(urls, (look.schema for look in looks), strict=True), loose=found.form == "json"
    )
    return Corpus(
        found.uri,
        found.form,
        shards,
        _with_features(schema, found),
        found.root,
        tuple(state.stamp for state in found.states),
        tuple(look.hint for look in looks),
    )


@dataclass(frozen=True)
class _Look:
    """What opening a shard told."""

    rows: int
    schema: pa.Schema
    fingerprint: str
    hint: Any


_looks: dict[tuple[str, str, bool], _Look] = {}


def _look(form: str, url: str, state: FileState, is_small: bool) -> _Look:
    key = (url, state.stamp, is_small)
    if key not in _looks:
        with named(url):
            reader = open_shard(form, url)
            reader.close()
        _refuse_twins(url, reader.schema)
        print_ = fingerprint(url, state, kind_for(state, is_small or form == "json"))
        _looks[key] = _Look(int(reader.starts[-1]), reader.schema, print_, reader.hint)
    return _looks[key]


def _refuse_twins(url: str, schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise ValueError(f"shard {url} has two columns called {name!r}; rename one")


def _with_features(schema: pa.Schema, found: Found) -> pa.Schema:
    """Keep what `datasets` knows of the columns (class names, images) in the schema."""
    metadata = schema.metadata or {}
    if not found.features or b"huggingface" in metadata:
        return schema
    info = json.dumps({"info": {"features": found.features}}).encode()
    return schema.with_metadata({**metadata, b"huggingface": info})
