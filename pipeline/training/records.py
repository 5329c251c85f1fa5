"""`records.parquet`: what training saw, one line per seed and row, sorted by (seed, shard, row)."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder
from curate.pipeline.training.observations import FoldedRows

RECORDS = "records.parquet"
RECORD_SCHEMA = pa.schema(
    [
        ("seed", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("forgetting", pa.float32()),  # events; never learned: the presentations
        ("never_learned", pa.bool_()),
        ("aum", pa.float32()),
        ("last_loss", pa.float32()),
        ("seen", pa.int32()),  # presentations
    ]
)
GROUP_ROWS = 1 << 16
"""Rows of a row group, whose statistics let a reader skip what it does not need."""

Place = tuple[np.ndarray, np.ndarray]
"""Shards and rows of some positions."""


def record_batch(seed: int, places: Place, rows: FoldedRows) -> pa.RecordBatch:
    """Return the lines of these rows; `places` are their shards and row numbers."""
    shard, row = places
    columns = {
        "seed": np.full(len(row), seed),
        "shard": shard,
        "row": row,
        **{name: getattr(rows, name) for name in RECORD_SCHEMA.names[3:]},
    }
    arrays = [
        pa.array(columns[f.name], f.type, from_pandas=pa.types.is_floating(f.type))
        for f in RECORD_SCHEMA
    ]
    return pa.record_batch(arrays, schema=RECORD_SCHEMA)


def write_records(folder: Folder, batches: Iterable[pa.RecordBatch], seeds: Sequence[int]) -> None:
    """Write `records.parquet` of these seeds, whole or not at all; memory is a row group.

    No row group spans two seeds, so the file of several seeds is the same bytes however it came
    together. (On an object store the file passes through memory.)
    """
    schema = RECORD_SCHEMA.with_metadata({"seeds": ",".join(map(str, seeds))})
    with (
        _Replaced(folder, RECORDS) as sink,
        pq.ParquetWriter(sink, schema, compression="zstd", version="2.6") as writer,
    ):
        for group in _groups(batches):
            writer.write_table(group.replace_schema_metadata(schema.metadata), GROUP_ROWS)


def recorded_seeds(folder: Folder) -> list[int]:
    """Return the seeds in the folder's records, none if there are none yet."""
    if not folder.exists(RECORDS):
        return []
    with open_parquet(folder, RECORDS) as file:
        metadata = file.schema_arrow.metadata or {}
    return [int(s) for s in metadata.get(b"seeds", b"").decode().split(",") if s]


def merge_records(into: Folder, parts: dict[int, Folder]) -> None:
    """Write the records of all seeds: those already in `into`, and `parts` by seed."""
    sources = dict.fromkeys(recorded_seeds(into), into) | parts
    with ExitStack() as files:
        opened = {
            folder: files.enter_context(open_parquet(folder, RECORDS))
            for folder in set(sources.values())
        }
        batches = (b for s in sorted(sources) for b in _lines_of(opened[sources[s]], s))
        write_records(into, batches, sorted(sources))


def read_records(
    path: str | os.PathLike[str], shard: int, start: int, rows: int
) -> dict[int, dict[str, np.ndarray]]:
    """Return each seed's columns for rows [start, start + rows) of a shard, aligned with them.

    Rows that a seed did not see have NaN (`forgetting`, `aum`, `last_loss`), False and 0. Only
    row groups that may hold these rows are read.

    Raises:
        ValueError: the file is no records file, or cannot be read.
    """
    name = Path(path).name
    folder = Folder(str(path)[: -len(name)] or ".")
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open_parquet(folder, name))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; `curate train` writes it") from None
        except pa.ArrowInvalid as broken:
            raise ValueError(f"{path} is not a whole Parquet file: {broken}") from None
        if not set(RECORD_SCHEMA.names) <= set(file.schema_arrow.names):
            raise ValueError(f"{path} holds no training records; `curate train` writes them")
        seeds = (file.schema_arrow.metadata or {}).get(b"seeds", b"").decode().split(",")
        result = {int(s): _unseen(rows) for s in seeds if s}
        for group in _groups_with(file, shard, start, rows):
            _fill(result, file.read_row_group(group), shard, start, rows)
    return result


def _unseen(rows: int) -> dict[str, np.ndarray]:
    floats = {n: np.full(rows, np.nan, np.float32) for n in ("forgetting", "aum", "last_loss")}
    return floats | {"never_learned": np.zeros(rows, bool), "seen": np.zeros(rows, np.int32)}


def _groups_with(file: pq.ParquetFile, shard: int, start: int, rows: int) -> Iterator[int]:
    """Yield the row groups whose statistics allow a row of [start, start + rows) of the shard."""
    shard_column = file.schema_arrow.get_field_index("shard")
    row_column = file.schema_arrow.get_field_index("row")
    for group in range(file.metadata.num_row_groups):
        meta = file.metadata.row_group(group)
        shards, in_shard = meta.column(shard_column).statistics, meta.column(row_column).statistics
        if shards is None or not shards.min <= shard <= shards.max:
            continue
        # Rows of several shards in one group: its row numbers say nothing about one shard.
        one_shard = shards.min == shards.max
        if one_shard and (in_shard.max < start or in_shard.min >= start + rows):
            continue
        yield group


def _fill(
    result: dict[int, dict[str, np.ndarray]], group: pa.Table, shard: int, start: int, rows: int
) -> None:
    wanted = pc.and_(
        pc.equal(group["shard"], shard),
        pc.and_(pc.greater_equal(group["row"], start), pc.less(group["row"], start + rows)),
    )
    lines = group.filter(wanted)
    of_seed = lines["seed"].to_numpy()
    at = lines["row"].to_numpy() - start
    for seed in np.unique(of_seed):
        mine = of_seed == seed
        for name, column in result[int(seed)].items():
            column[at[mine]] = lines[name].to_numpy()[mine]


def _lines_of(file: pq.ParquetFile, seed: int) -> Iterator[pa.RecordBatch]:
    """Yield one seed's lines; a row group is of one seed."""
    for group in range(file.metadata.num_row_groups):
        if file.metadata.row_group(group).column(0).statistics.min == seed:
            yield from file.read_row_group(group).to_batches()


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Cut a stream into tables of GROUP_ROWS lines, each of one seed."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        if waiting and batch.num_rows and batch["seed"][0] != waiting[0]["seed"][0]:
            yield pa.Table.from_batches(waiting)
            waiting, held = [], 0
        while batch.num_rows:
            head = batch.slice(0, GROUP_ROWS - held)
            waiting.append(head)
            held += head.num_rows
            batch = batch.slice(head.num_rows)
            if held == GROUP_ROWS:
                yield pa.Table.from_batches(waiting)
                waiting, held = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


class _Replaced:
    """A binary file that appears under its name when closed without an error."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._final = folder.local_path(name)

    def __enter__(self) -> BinaryIO:
        if self._final is None:
            self._file: BinaryIO = io.BytesIO()
        else:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._final.with_suffix(".tmp").open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._final is None:
            if kind is None:
                self._file.seek(0)
                self._folder.replace(self._name, self._file.read())
            return
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None:
            os.replace(self._final.with_suffix(".tmp"), self._final)
        else:
            self._final.with_suffix(".tmp").unlink()
