"""A selection for trainers that bring their own loaders: plain rows, `datasets`, Ray Data."""

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate.pipeline.manifests.row_source import ROW, SHARD, WEIGHT, RowSource

if TYPE_CHECKING:
    import datasets
    import ray.data

    from curate.pipeline.manifests.manifest import Manifest

SPAN_ROWS = 65_536  # rows that one Ray task reads


def as_rows(manifest: "Manifest", columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield each kept row once in corpus order: its columns, `__shard`, `__row` and `weight`."""
    for table in _named(RowSource.of_manifest(manifest, columns)).stream():
        yield from _with_weight(table).to_pylist()


def as_datasets(
    manifest: "Manifest", columns: Sequence[str] | None, cache: str | Path | None
) -> "datasets.Dataset":
    """Return the kept rows in corpus order, their columns and `weight`, memory-mapped.

    The rows are written once to an Arrow file below `cache` (by default the cache folder of
    `datasets`) and found again there while manifest and columns are the same. Memory: one batch.
    Every row is there once; an `EpochSampler` shows them as sampling weights, repeats or a schedule
    say (positions are the same).
    """
    import datasets

    source = _named(RowSource.of_manifest(manifest, columns))
    names = [*source.columns, "weight"]
    schema = pa.schema([_with_weight(source.schema.empty_table()).schema.field(n) for n in names])
    schema = schema.with_metadata(source.schema.metadata)
    # Keeps what `datasets` knows of the columns (class names, images) and adds the weight.
    schema = datasets.Features.from_arrow_schema(schema).arrow_schema
    home = Path(cache or os.path.join(datasets.config.HF_DATASETS_CACHE, "curate"))
    key = hashlib.sha256("\0".join([manifest.digest, *names]).encode()).hexdigest()[:32]
    path = home / f"{key}.arrow"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        draft = home / f"{key}-{uuid.uuid4().hex}.tmp"
        try:
            with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for table in source.stream():
                    writer.write_table(_with_weight(table).select(names).cast(schema))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def as_ray(
    manifest: "Manifest", columns: Sequence[str] | None, batch_rows: int
) -> "ray.data.Dataset":
    """Return a streaming Ray data set: columns, `__shard`, `__row` and `weight`.

    Tasks of SPAN_ROWS rows read the corpus; only positions pass through the driver. The nodes must
    see corpus and manifest under the same paths. Ray gives the blocks in any order unless
    `ray.data.DataContext.preserve_order` is set.
    """
    import ray.data

    _refuse_schedule(manifest)
    source = _named(RowSource.of_manifest(manifest, columns))
    spans = [
        {"start": start, "stop": min(start + SPAN_ROWS, len(source))}
        for start in range(0, len(source), SPAN_ROWS)
    ]

    def read(span: pa.Table) -> Iterator[pa.Table]:
        for start, stop in zip(*(span[n].to_pylist() for n in ("start", "stop")), strict=True):
            for table in source.stream(start, stop, batch_rows):
                yield _with_weight(table).replace_schema_metadata(None)

    listed = ray.data.from_items(spans, override_num_blocks=len(spans))
    return listed.map_batches(read, batch_size=1, batch_format="pyarrow")


def _refuse_schedule(manifest: "Manifest") -> None:
    """A stream of every row once would not be what the schedule says."""
    if manifest.content["schedule"] is not None:
        rule = manifest.content["schedule"]["rule"]
        raise ValueError(
            f"{manifest.path} has a schedule ({rule}), which Ray Data cannot follow; export an "
            "epoch with `curate export --epoch`, or use as_torch or as_map"
        )


def _named(source: RowSource) -> RowSource:
    if taken := {SHARD, ROW, WEIGHT, "weight"} & set(source.columns):
        raise ValueError(
            f"the corpus has a column {min(taken)!r} of its own, which the hand-off uses; "
            "leave it out with columns=[...]"
        )
    return source


def _with_weight(table: pa.Table) -> pa.Table:
    return table.rename_columns({WEIGHT: "weight"})
