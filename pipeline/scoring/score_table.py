"""The score table: one row per corpus row, one column per scorer, in parts of one unit each.

A folder `RUN/scores/` holds `_meta.json` (what was asked), `units.parquet` (the plan),
`part-00000.parquet` ... (one per unit, in corpus order, its footer is its receipt),
`errors.parquet` and, last, `_SUCCESS.json`. Equal inputs give equal bytes: nothing in these files
tells the time, the machine or how often the run was killed.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

FORMAT, VERSION = "curate.scores", 1
META, SUCCESS, UNITS, ERRORS = "_meta.json", "_SUCCESS.json", "units.parquet", "errors.parquet"
RAW = "raw"
"""Folder of the units' parts while a table is made whose scores are standardised at the end."""
ROW_GROUP = 65_536
RECEIPT_KEY = b"curate.receipt"
RESERVED = frozenset({"shard", "row", "id", "tokens", "error", "unit", "weight", "rank"})
ERROR_FIELDS = (
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("unit", pa.int32(), nullable=False),
    pa.field("error", pa.string(), nullable=False),
)


def score_schema(
    aliases: Iterable[str],
    *,
    id_type: pa.DataType | None = None,
    keep: Sequence[pa.Field] = (),
    with_std: Collection[str] = (),
    with_checkpoints: Collection[str] = (),
    with_groups: Collection[str] = (),
    with_tokens: bool = False,
) -> pa.Schema:
    """Return the columns of a part: identity, kept columns, scores, tokens, error.

    Raises:
        ValueError: a kept column has the name of a column of the table.
    """
    columns = [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
    if id_type is not None:
        columns.append(pa.field("id", id_type))
    scores: list[pa.Field] = []
    for alias in aliases:
        scores.append(pa.field(alias, pa.float32()))
        if alias in with_std:
            scores.append(pa.field(f"{alias}_std", pa.float32()))
        if alias in with_checkpoints:
            scores.append(pa.field(f"{alias}_by_checkpoint", pa.list_(pa.float32())))
        if alias in with_groups:
            scores.append(pa.field(f"{alias}_by_group", pa.list_(pa.float32())))
    names = [field.name for field in scores]
    for field in scores:
        if field.name in RESERVED or names.count(field.name) > 1:
            raise ValueError(
                f"a scorer cannot be called {field.name!r}, the score table uses that name; "
                f"rename it with ALIAS=..."
            )
    for field in keep:
        if field.name in RESERVED or field.name in names:
            raise ValueError(
                f"column {field.name!r} cannot be kept under its own name, the score table "
                f"has a column of that name; leave it out of --keep or rename it in the corpus"
            )
        columns.append(field.remove_metadata().with_nullable(True))
    tail = [pa.field("tokens", pa.int32())] if with_tokens else []
    return pa.schema([*columns, *scores, *tail, pa.field("error", pa.string())])


def part_name(unit: int) -> str:
    """Return the file name of a unit's part."""
    return f"part-{unit:05d}.parquet"


def parquet_bytes(table: pa.Table, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
    """Return the table as Parquet, the same bytes for the same table (one pyarrow version)."""
    table = table.replace_schema_metadata(metadata or None)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd", version="2.6")
    return sink.getvalue()


def write_part(folder: Folder, unit: int, table: pa.Table, receipt: dict[str, Any]) -> bool:
    """Commit a unit's rows with their receipt; False where another worker committed it first.

    The bytes are decoded again and compared before they are committed: a part is whole or absent.
    """
    text = json.dumps(receipt, sort_keys=True, separators=(",", ":")).encode()
    data = parquet_bytes(table.combine_chunks(), {RECEIPT_KEY: text})
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        back = file.read(use_threads=False)
    assert back.num_rows == table.num_rows == receipt["rows"], "a part lost rows while written"
    assert back.schema.equals(table.schema), "a part changed its columns while written"
    return folder.create(part_name(unit), data)


def read_receipt(folder: Folder, unit: int) -> dict[str, Any]:
    """Return the receipt in the footer of a unit's part.

    Raises:
        ValueError: the file is no part of a score table.
    """
    name = part_name(unit)
    try:
        with open_parquet(folder, name) as file:
            metadata = file.metadata.metadata or {}
    except pa.ArrowInvalid:
        metadata = {}
    if RECEIPT_KEY not in metadata:
        raise ValueError(f"{folder.uri}/{name} is damaged: delete it and run the same command")
    receipt: dict[str, Any] = json.loads(metadata[RECEIPT_KEY])
    return receipt


def digest_of_parts(sums: Mapping[str, str]) -> str:
    """Return one sha256 over the names and sums of all parts."""
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()


class ScoreTable:
    """A finished score table, read in streams and always in corpus order."""

    def __init__(self, folder: Folder, meta: dict[str, Any], success: dict[str, Any]) -> None:
        self.folder, self.meta, self.success = folder, meta, success
        self.path: str = folder.uri
        self.rows: int = success["rows"]
        self.corpus: dict[str, Any] = meta["corpus"]
        with open_parquet(folder, UNITS) as file:
            self.units: pa.Table = file.read(use_threads=False)
        with open_parquet(folder, part_name(0)) as file:
            self.schema: pa.Schema = file.schema_arrow.remove_metadata()
        known: dict[str, dict[str, Any]] = meta["scorers"]
        self.scorers = {name: known[name] for name in self.schema.names if name in known}

    @classmethod
    def open(cls, path: str | Path) -> "ScoreTable":
        """Return the table in `path` (the scores folder, or the run folder that holds it).

        Raises:
            ValueError: there is no score table, or it is not finished.
        """
        folder = Folder(str(path))
        if not folder.exists(META) and folder.child("scores").exists(META):
            folder = folder.child("scores")
        if not folder.exists(META):
            raise ValueError(f"{path} holds no score table; make one with `curate score`")
        meta = folder.read_json(META)
        if meta.get("format") != FORMAT or meta.get("version") != VERSION:
            found = f"{meta.get('format')} version {meta.get('version')}"
            raise ValueError(f"{path} holds {found}, expected {FORMAT} version {VERSION}")
        if not folder.exists(SUCCESS):
            done = sum(name.startswith("part-") for name in folder.names())
            raise ValueError(
                f"the score table in {path} is not finished ({done} parts committed): "
                f"run the same `curate score` command again"
            )
        return cls(folder, meta, folder.read_json(SUCCESS))

    @property
    def notes(self) -> dict[str, Any]:
        """What the run found out beside the scores; {} where it noted nothing."""
        return dict(self.success.get("notes") or {})

    @property
    def parts(self) -> list[str]:
        """Names of the parts in corpus order."""
        return [part_name(unit) for unit in range(self.success["units"])]

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield these columns (None: all) in corpus order; memory is one row group.

        Raises:
            ValueError: the table has no such column.
        """
        wanted = self.schema.names if columns is None else list(columns)
        for name in wanted:
            if name not in self.schema.names:
                have = ", ".join(self.schema.names)
                raise ValueError(
                    f"the score table {self.path} has no column {name!r}; it has: {have}"
                )
        return self._batches(wanted)

    def errors(self) -> pa.Table:
        """Return the rows that could not be scored: shard, row, unit, error."""
        with open_parquet(self.folder, ERRORS) as file:
            return file.read(use_threads=False)

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for unit in range(self.success["units"]):
            with open_parquet(self.folder, part_name(unit)) as file:
                for batch in file.iter_batches(ROW_GROUP, columns=columns, use_threads=False):
                    yield batch.select(columns)
