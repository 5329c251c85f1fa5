"""What an export is made of: units of consecutive rows, planned once, and what each must hold."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from curate.pipeline.exporting.formats import Format, Source, make_format
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.places import Placed, Places, placed
from curate.pipeline.manifests.row_source import ROW, SHARD, WEIGHT, RowSource

UNIT_BYTES = 64 << 20
"""Bytes of the corpus's files that a unit's rows take, about; a unit is written in memory."""
MAX_UNIT_ROWS = 1 << 20
LISTED_ROWS = 1 << 24
"""Rows of a unit where only identity and weight are written."""
REPEATS = ("rows", "column", "streams")
MAX_STREAMS = 64
TAKE_ROWS = 4096


@dataclass(frozen=True)
class Wish:
    """What is asked for, as `plan.json` records it."""

    to: str
    columns: tuple[str, ...] | None
    epoch: int | None
    seed: int
    repeats: str
    packing: str | None
    unit_rows: int | None

    def __post_init__(self) -> None:
        if self.repeats not in REPEATS:
            raise ValueError(f"repeats are one of: {', '.join(REPEATS)}; not {self.repeats!r}")
        if self.repeats == "streams" and self.to != "mds":
            raise ValueError(f"repeats as streams are for mds; {self.to} has none")
        if self.epoch is not None and (self.epoch < 0 or self.repeats != "rows"):
            raise ValueError("--epoch is a number from 0, and goes with --repeats rows alone")
        if self.seed < 0:
            raise ValueError(f"the seed must be a whole number from 0, not {self.seed}")
        if self.packing is not None and self.to != "jsonl":
            raise ValueError(f"--packing is for jsonl; {self.to} packs in its own way")
        if self.unit_rows is not None and self.unit_rows < 1:
            raise ValueError(f"unit_rows must be at least 1, got {self.unit_rows}")

    def content(self) -> dict[str, Any]:
        wish = asdict(self)
        return {**wish, "columns": None if self.columns is None else list(self.columns)}


@dataclass(frozen=True)
class Unit:
    """Positions [start, stop) of the selection, or places of the epoch; with `count`, only rows
    repeated so often. `rows` is what the unit's files must hold."""

    number: int
    start: int
    stop: int
    rows: int
    count: int | None = None


@dataclass(frozen=True)
class Export:
    """A manifest on its way into a format."""

    manifest: Manifest
    wish: Wish

    def check(self) -> None:
        """Refuse what cannot be exported, before anything is written.

        Raises:
            ValueError: the format, a column or the weights are wrong.
        """
        if self.manifest.content["schedule"] is not None and self.wish.epoch is None:
            rule = self.manifest.content["schedule"]["rule"]
            raise ValueError(
                f"{self.manifest.path} has a schedule ({rule}) and a copy holds one epoch of it; "
                "name the epoch with --epoch, or export the selection that was scheduled"
            )
        if self.wish.repeats != "rows" and self.manifest.weight_kind != "repeat":
            raise ValueError(
                f"--repeats {self.wish.repeats} is for weights of kind 'repeat'; "
                f"{self.manifest.path} has {self.manifest.weight_kind!r}"
            )
        taken = {SHARD, ROW, WEIGHT, "weight"} & set(self.rows.columns)
        if taken:
            raise ValueError(
                f"the corpus has a column {min(taken)!r} of its own, which the export uses; "
                "leave it out with --columns"
            )
        _ = self.format

    @cached_property
    def rows(self) -> RowSource:
        columns = None if self.wish.columns is None else list(self.wish.columns)
        return RowSource.of_manifest(self.manifest, columns)

    @cached_property
    def format(self) -> Format:
        corpus, rows = self.manifest.corpus, self.rows
        schema = _renamed(rows.schema.empty_table()).schema
        ending = corpus.shards[0].path.rsplit(".", 1)[-1].lower()
        packing = {"gz": "gz", "zst": "zst", "zstd": "zst"}.get(ending, "none")
        is_packed = corpus.format == "json" and self.wish.to == "jsonl"
        starts = np.cumsum([0, *(s.rows for s in corpus.shards)]).tolist()
        source = Source(
            schema.with_metadata(rows.schema.metadata),
            tuple(rows.columns),
            self.format_weight_kind,
            packing if is_packed else "none",
            tuple(starts),
        )
        options = {"packing": self.wish.packing} if self.wish.to == "jsonl" else {}
        return make_format(self.wish.to, source, options)

    @property
    def format_weight_kind(self) -> str:
        """What the exported weights mean: `none` where draws and repeats have been made."""
        kind = self.manifest.weight_kind
        if kind == "repeat" or (kind == "sampling" and self.wish.epoch is not None):
            return "repeat" if self.wish.repeats == "column" else "none"
        return kind

    @property
    def _has_draws(self) -> bool:
        """True where the epoch says how often a row is there, so that its weight is spent."""
        return self.manifest.weight_kind in ("sampling", "repeat")

    def file_names(self, unit: Unit, units: int) -> list[str]:
        names = self.format.file_names(unit.number, units)
        folder = "" if unit.count is None else f"{stream_name(unit.count)}/"
        return [folder + name for name in names]

    def plan(self) -> list[Unit]:
        """Return the units; a function of manifest and wish alone."""
        if self.wish.epoch is not None:
            return self._plan_epoch(self.wish.epoch)
        sizes = _rows_by_shard(self.rows.places)
        spans = list(_spans(sizes, self._unit_rows()))
        found: list[Unit] = []
        for start, stop in spans:
            for count, rows in self._counted(start, stop):
                found.append(Unit(len(found), start, stop, rows, count))
        if self.wish.repeats == "streams":
            streams = sorted({unit.count for unit in found if unit.count is not None})
            if len(streams) > MAX_STREAMS:
                raise ValueError(
                    f"{len(streams)} different repeat counts would be {len(streams)} streams, more "
                    f"than {MAX_STREAMS}; export with repeats as rows"
                )
            by_stream = sorted(found, key=lambda u: (u.count or 0, u.start))
            found = [replace(unit, number=i) for i, unit in enumerate(by_stream)]
        return found

    def _plan_epoch(self, epoch: int) -> list[Unit]:
        length = self.rows.plan(self.wish.seed, epoch).length
        step = self._unit_rows()
        starts = range(0, length, step)
        return [
            Unit(i, start, min(start + step, length), min(step, length - start))
            for i, start in enumerate(starts)
        ]

    def _counted(self, start: int, stop: int) -> Iterator[tuple[int | None, int]]:
        """Yield the rows that these positions give, for each repeat count where that matters."""
        if self.manifest.weight_kind != "repeat" or self.wish.repeats == "column":
            yield None, stop - start
            return
        weights = [piece.weight for piece in placed(self.rows.places, start, stop)]
        counts = np.concatenate(weights).astype(np.int64)
        if self.wish.repeats == "rows":
            if total := int(counts.sum()):
                yield None, total
            return
        for count in np.unique(counts[counts > 0]).tolist():
            yield int(count), int((counts == count).sum())

    def _unit_rows(self) -> int:
        if self.wish.unit_rows is not None:
            return self.wish.unit_rows
        if not self.format.reads_rows:
            return LISTED_ROWS
        corpus = self.manifest.corpus
        per_row = sum(shard.bytes for shard in corpus.shards) / corpus.rows
        return int(min(MAX_UNIT_ROWS, max(1, UNIT_BYTES // max(per_row, 1.0))))

    def tables(self, unit: Unit, identity: "Identity") -> Iterator[pa.Table]:
        """Yield the unit's rows with `weight`, and tell `identity` of each."""
        for table in self._read(unit):
            table = self._expanded(table, unit)
            identity.add(table)
            yield _renamed(table)

    def expected(self, unit: Unit) -> "Identity":
        """Return the identity of what the manifest says the unit holds; no row is read."""
        found = Identity()
        for piece in self._places(unit):
            found.add(self._expanded(piece, unit))
        return found

    def _read(self, unit: Unit) -> Iterator[pa.Table]:
        if not self.format.reads_rows:
            yield from self._places(unit)
        elif self.wish.epoch is None:
            yield from self.rows.stream(unit.start, unit.stop)
        else:
            yield from map(self.rows.take, self._positions(unit))

    def _places(self, unit: Unit) -> Iterator[pa.Table]:
        """Yield shard, row and weight alone."""
        places = self.rows.places
        if self.wish.epoch is None:
            yield from map(_listed, placed(places, unit.start, unit.stop))
        else:
            for positions in self._positions(unit):
                yield _at(places, positions)

    def _positions(self, unit: Unit) -> Iterator[Int64[ndarray, " n"]]:
        assert self.wish.epoch is not None
        plan = self.rows.plan(self.wish.seed, self.wish.epoch)
        for start in range(unit.start, unit.stop, TAKE_ROWS):
            yield plan.positions(start, min(start + TAKE_ROWS, unit.stop))

    def _expanded(self, table: pa.Table, unit: Unit) -> pa.Table:
        """Return the rows as often as they are written, their weight spent where that says it."""
        if not self._has_draws or self.wish.repeats == "column":
            return table
        at = table.column_names.index(WEIGHT)
        times = np.ones(table.num_rows, dtype=np.int64)
        if self.wish.epoch is None:
            if self.manifest.weight_kind == "sampling":
                return table
            times = table[WEIGHT].to_numpy().astype(np.int64)
        if unit.count is not None:
            times = (times == unit.count).astype(np.int64)
        rows = np.repeat(np.arange(table.num_rows), times)
        ones = pa.array(np.ones(len(rows), dtype=np.float32))
        return table.take(pa.array(rows)).set_column(at, table.schema.field(at), ones)


class Identity:
    """A digest over which rows were written, in order, with which weights."""

    def __init__(self) -> None:
        self.rows, self._hash = 0, hashlib.sha256()

    def add(self, table: pa.Table) -> None:
        # Every value is below 2^53, so it is itself as a float64.
        columns = [table[name].to_numpy().astype(np.float64) for name in (SHARD, ROW, WEIGHT)]
        self._hash.update(np.stack(columns, axis=1).tobytes())
        self.rows += table.num_rows

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def stream_name(count: int) -> str:
    """Return the folder of the rows that are repeated so often."""
    return f"repeat-{count:05d}"


def _listed(piece: Placed) -> pa.Table:
    return pa.table({SHARD: piece.shard, ROW: piece.row, WEIGHT: piece.weight})


def _at(places: Places, positions: Int64[ndarray, " n"]) -> pa.Table:
    """Return shard, row and weight at these positions, in their order."""
    groups = np.searchsorted(places.starts, positions, side="right") - 1
    shard, row = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
    weight = np.empty(len(positions), np.float32)
    for index in np.unique(groups):
        mine = groups == index
        piece, at = places.group(int(index)), positions[mine] - places.starts[index]
        shard[mine], row[mine], weight[mine] = piece.shard[at], piece.row[at], piece.weight[at]
    return _listed(Placed(shard, row, weight))


def _renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns({WEIGHT: "weight"})


def _rows_by_shard(places: Places) -> list[int]:
    """Return the number of selected rows of each shard that has some, in order."""
    found: list[int] = []
    last = -1
    for group in range(len(places.starts) - 1):
        shards, counts = np.unique(places.group(group).shard, return_counts=True)
        for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
            if shard == last:
                found[-1] += count
            else:
                found.append(count)
            last = shard
    return found


def _spans(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield position ranges: small shards together, a large one in equal parts."""
    start = held = 0
    for size in sizes:
        if held and held + size > most:
            yield start, start + held
            start, held = start + held, 0
        if size > most:
            parts = -(-size // most)
            cuts = [start + size * i // parts for i in range(parts + 1)]
            yield from pairwise(cuts)
            start += size
        else:
            held += size
    if held:
        yield start, start + held
