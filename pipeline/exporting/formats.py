"""What an export format is: how a unit's rows become a file, and which weights it can carry."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import pyarrow as pa

from curate.pipeline.storing.storage import Folder
from curate.selectors.settings import did_you_mean

FORMATS = {
    "parquet": "curate.pipeline.exporting.parquet_format:ParquetFormat",
    "jsonl": "curate.pipeline.exporting.jsonl_format:JsonlFormat",
    "datasets": "curate.pipeline.exporting.datasets_format:DatasetsFormat",
    "mds": "curate.pipeline.exporting.mds_format:MdsFormat",
    "webdataset": "curate.pipeline.exporting.tar_format:TarFormat",
    "megatron": "curate.pipeline.exporting.megatron_format:MegatronFormat",
}


@dataclass(frozen=True)
class Source:
    """What is exported: the columns and `weight`, beside `__shard` and `__row` of each row.

    `input_packing` is the ending of packed JSON lines that the corpus has: gz, zst or none.
    """

    schema: pa.Schema
    columns: tuple[str, ...]
    weight_kind: str
    input_packing: str
    shard_starts: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """A committed unit."""

    unit: int
    files: tuple[str, ...]
    rows: int
    bytes: int


class Format(Protocol):
    """A frozen dataclass made with the source and the options asked for."""

    refuses: dict[str, str]
    """Kinds of weights that the format cannot carry, each with the reason."""

    reads_rows: bool
    """False where identity and weight of the rows are enough."""

    def file_names(self, unit: int, units: int) -> Sequence[str]: ...

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        """Return the content of the unit's files.

        Equal rows give equal bytes. Raises ValueError for a value that the format cannot hold.
        """
        ...

    def count(self, files: Sequence[bytes]) -> int:
        """Return how many rows the files hold, read back from their bytes."""
        ...

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        """Return the index files that make the whole readable by its library."""
        ...


def make_format(to: str, source: Source, options: dict[str, Any]) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: there is none, or it cannot carry the columns or the weights.
    """
    if to not in FORMATS:
        raise ValueError(
            f"unknown format {to!r}; choose one of: {', '.join(FORMATS)}{did_you_mean(to, FORMATS)}"
        )
    module, _, name = FORMATS[to].partition(":")
    made: Format = getattr(import_module(module), name)(source, **options)
    if source.weight_kind in made.refuses:
        raise ValueError(
            f"format {to} cannot carry weights of kind {source.weight_kind!r}: "
            f"{made.refuses[source.weight_kind]}"
        )
    return made
