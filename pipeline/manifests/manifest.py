"""The manifest: which rows to train on, with which weights, and of which data.

A folder with `part-00000.parquet` ... and, written last, `manifest.json`. Parts hold the kept rows
sorted by (shard, row): `shard` int32, `row` int64 (delta-packed), `id` where the score table has
one, `weight` float32 (1 everywhere when `weight_kind` is "none": dictionary-encoded, so it costs
nothing and readers need no special case), `rank` int32 where the method orders rows (0 is kept
first, so a smaller budget is a prefix) and `group` int32 where a schedule needs it. It is a
keep-list: what is not in it is not trained on.

Version 2 is version 1 with a mixture of corpora (`corpus.parts`) or the column `group`; what has
neither is written as version 1.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from curate.pipeline.manifests.mixed_corpus import open_described
from curate.pipeline.manifests.places import GROUP_ROWS
from curate.pipeline.manifests.selection_summary import summary_text
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder, canonical_json

if TYPE_CHECKING:
    import datasets
    import ray.data

    from curate.pipeline.manifests.map_rows import MapRows
    from curate.pipeline.manifests.schedules import Schedule
    from curate.pipeline.manifests.torch_rows import TorchRows

FORMAT, VERSIONS, NAME = "curate.manifest", (1, 2), "manifest.json"
GROUPS_PER_PART = 16  # parts of about 4 million rows
WeightKind = Literal["none", "loss", "sampling", "repeat"]
WEIGHT_KINDS = ("none", "loss", "sampling", "repeat")


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def is_part(name: str) -> bool:
    """True for the names of parts, also of a selection that was interrupted."""
    return name.startswith("part-") and name.endswith(".parquet")


def write_parts(folder: Folder, batches: Iterable[pa.RecordBatch]) -> tuple[dict[str, str], int]:
    """Write the kept rows; return the sha256 of each part and the number of rows.

    Equal rows give equal bytes (with one pyarrow version), however they are cut into batches. An
    all-null `weight` is written as 1, an all-null `rank` not at all. Memory: one encoded part.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    digests: dict[str, str] = {}
    rows = 0
    groups = _regrouped(batches)
    group = next(groups, None)
    while group is not None:
        sink = io.BytesIO()
        schema = _part_schema(group)
        with pq.ParquetWriter(sink, schema, **_encoding(schema)) as writer:
            for _ in range(GROUPS_PER_PART):
                writer.write_table(_as_part(group, schema), row_group_size=GROUP_ROWS)
                rows += group.num_rows
                group = next(groups, None)
                if group is None:
                    break
        data, name = sink.getvalue(), part_name(len(digests))
        folder.replace(name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests, rows


def write_manifest(folder: Folder, content: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json`, which makes the selection whole; return what it holds."""
    missing = KEYS - content.keys() - {"format", "version"}
    assert not missing, f"a manifest without {sorted(missing)}"
    schedule = content["schedule"]
    has_groups = schedule is not None and "groups" in schedule["params"]
    version = 2 if has_groups or "parts" in content["corpus"] else 1
    whole = {**content, "format": FORMAT, "version": version}
    folder.replace(NAME, canonical_json(whole))
    return whole


KEYS = frozenset("format version corpus selection weight_kind schedule groups scores files".split())


class Manifest:
    """A selection and where it came from; what a trainer opens."""

    def __init__(
        self, folder: Folder, content: dict[str, Any], corpus: Corpus | None = None
    ) -> None:
        self.folder, self.content, self._corpus = folder, content, corpus
        self.path: str = folder.uri
        self.summary: dict[str, Any] | None = None
        """What `select` found out about the kept rows beside random ones; None when opened."""

    @classmethod
    def open(cls, path: str | Path, corpus: str | None = None) -> "Manifest":
        """Return the manifest in `path` after checking its files and the corpus behind it.

        `corpus` says where the data is now, if it moved; it must be the same data.

        Raises:
            ValueError: there is no manifest, a part was changed, or the corpus is missing or
                was changed (the shard is named).
        """
        manifest = cls.read(path)
        manifest.check_files()
        manifest._corpus = _same_corpus(manifest, corpus)
        return manifest

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Return the manifest in `path` without looking at its parts or at the corpus."""
        folder = Folder(str(path))
        if not folder.exists(NAME) and folder.child("manifest").exists(NAME):
            folder = folder.child("manifest")
        if not folder.exists(NAME):
            raise ValueError(f"{path} holds no manifest; make one with `curate select`")
        content = folder.read_json(NAME)
        version = content.get("version")
        if content.get("format") != FORMAT or version not in VERSIONS:
            expected = " or ".join(map(str, VERSIONS))
            raise ValueError(
                f"{path} holds {content.get('format')} version {version}, "
                f"expected {FORMAT} version {expected}"
            )
        if missing := sorted(KEYS - content.keys()):
            raise ValueError(f"{path}/{NAME} lacks {', '.join(missing)}; select again")
        if content["weight_kind"] not in WEIGHT_KINDS:
            kinds = ", ".join(WEIGHT_KINDS)
            raise ValueError(
                f"{path} has weights of kind {content['weight_kind']!r}, expected one of: {kinds}"
            )
        return cls(folder, content)

    def __len__(self) -> int:
        return int(self.content["selection"]["selected"])

    def __str__(self) -> str:
        return summary_text(self.describe())

    @property
    def weight_kind(self) -> WeightKind:
        kind: WeightKind = self.content["weight_kind"]
        return kind

    @property
    def schedule(self) -> "Schedule | None":
        """What says which rows each epoch shows; None where every epoch shows all."""
        from curate.pipeline.manifests.schedules import read_schedule

        return read_schedule(self.content["schedule"], self.weight_kind)

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in order."""
        return sorted(self.content["files"])

    @cached_property
    def digest(self) -> str:
        """Return what identifies this selection: it changes with any row, weight or setting."""
        return hashlib.sha256(canonical_json(self.content)).hexdigest()

    @property
    def corpus(self) -> Corpus:
        """The data behind the selection, opened and compared on first use."""
        if self._corpus is None:
            self._corpus = _same_corpus(self, None)
        return self._corpus

    def describe(self) -> dict[str, Any]:
        """Return the content of `manifest.json`, the path, and the summary if there is one."""
        extra = {} if self.summary is None else {"summary": self.summary}
        return {**self.content, "path": self.path, **extra}

    def check_files(self) -> None:
        """Compare every part with its digest.

        Raises:
            ValueError: a part is missing or was changed.
        """
        for name, digest in self.content["files"].items():
            if not self.folder.exists(name):
                raise ValueError(f"{self.path}/{name} is missing; run `curate select` again")
            if hashlib.sha256(self.folder.read(name)).hexdigest() != digest:
                raise ValueError(f"{self.path}/{name} was changed; run `curate select` again")

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the manifest's own columns in order: `shard`, `row`, `id`, `weight`, `rank`,
        `group`; those it has."""
        for name in self.parts:
            with open_parquet(self.folder, name) as file:
                yield from file.iter_batches(GROUP_ROWS, columns=columns)

    def as_torch(
        self,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        uneven: Literal["drop", "pad"] = "drop",
        collate: Callable[[pa.Table], Any] | None = None,
        columns: list[str] | None = None,
    ) -> "TorchRows":
        """Return a torch IterableDataset of this rank's batches; see `TorchRows`."""
        from curate.pipeline.manifests.row_source import RowSource
        from curate.pipeline.manifests.torch_rows import Reading, TorchRows

        reading = Reading(rank, world_size, batch_size, seed, epoch, uneven)
        return TorchRows(RowSource.of_manifest(self, columns), reading, collate)

    def as_map(
        self, columns: list[str] | None = None, row: Callable[[pa.Table], Any] | None = None
    ) -> "MapRows":
        """Return a map-style torch Dataset with a `sampler(...)`; see `MapRows`."""
        from curate.pipeline.manifests.map_rows import MapRows
        from curate.pipeline.manifests.row_source import RowSource

        return MapRows(RowSource.of_manifest(self, columns), row)

    def as_datasets(
        self, columns: list[str] | None = None, cache: str | Path | None = None
    ) -> "datasets.Dataset":
        """Return a memory-mapped `datasets.Dataset`: the columns and the `weight`."""
        from curate.pipeline.manifests.hand_off import as_datasets

        return as_datasets(self, columns, cache)

    def as_ray(
        self, columns: list[str] | None = None, batch_rows: int = 1024
    ) -> "ray.data.Dataset":
        """Return a streaming `ray.data.Dataset`: columns, `__shard`, `__row` and `weight`."""
        from curate.pipeline.manifests.hand_off import as_ray

        return as_ray(self, columns, batch_rows)

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield each kept row once in corpus order: columns, `__shard`, `__row`, `weight`."""
        from curate.pipeline.manifests.hand_off import as_rows

        return as_rows(self, columns)


def _same_corpus(manifest: Manifest, moved_to: str | None) -> Corpus:
    description = manifest.content["corpus"]
    try:
        return open_described(description, moved_to)
    except ValueError as problem:
        hint = "" if moved_to else "; if the data moved, say where (corpus=, --corpus)"
        raise ValueError(f"the data of {manifest.path} is not usable: {problem}{hint}") from None


def _regrouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the rows as tables of GROUP_ROWS rows, the last one smaller."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows >= GROUP_ROWS:
            table = pa.Table.from_batches(held)
            while table.num_rows >= GROUP_ROWS:
                yield table.slice(0, GROUP_ROWS)
                table = table.slice(GROUP_ROWS)
            held, rows = table.to_batches(), table.num_rows
    if rows:
        yield pa.Table.from_batches(held)


def _part_schema(group: pa.Table) -> pa.Schema:
    fields = [pa.field("shard", pa.int32(), False), pa.field("row", pa.int64(), False)]
    if "id" in group.column_names:
        fields.append(pa.field("id", group.schema.field("id").type))
    fields.append(pa.field("weight", pa.float32(), False))
    if group["rank"].null_count < group.num_rows:
        fields.append(pa.field("rank", pa.int32(), False))
    if "group" in group.column_names:
        fields.append(pa.field("group", pa.int32(), False))
    return pa.schema(fields)


def _as_part(group: pa.Table, schema: pa.Schema) -> pa.Table:
    weight = group["weight"].fill_null(1.0).to_numpy()
    if bad := int((~(weight >= 0) | (weight == float("inf"))).sum()):
        raise ValueError(f"{bad} weights are negative or not finite; no manifest is written")
    columns = {**{n: group[n] for n in group.column_names}, "weight": pa.array(weight)}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    # Sorted rows delta-pack to about 0.3 bytes each at 50 % kept.
    packed = [n for n in ("shard", "row", "rank", "group") if n in schema.names]
    return {
        "version": "2.6",
        "compression": "zstd",
        "use_dictionary": ["weight"],
        "column_encoding": dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
        "store_schema": False,
    }
