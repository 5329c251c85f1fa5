"""A folder as `datasets.save_to_disk` writes it, for `datasets.load_from_disk`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import pyarrow as pa

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.exporting.parquet_format import described, regrouped
from curate.pipeline.storing.storage import Folder, canonical_json

BATCH_ROWS = 1000  # as `datasets` itself writes


@dataclass(frozen=True)
class DatasetsFormat:
    """`data-00000-of-00001.arrow` …, `dataset_info.json`, `state.json`; all kinds of weights."""

    source: Source
    refuses: dict[str, str] = field(default_factory=dict, init=False)
    reads_rows: bool = field(default=True, init=False)

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        return [f"data-{unit:05d}-of-{units:05d}.arrow"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as writer:
            for table in regrouped(rows, BATCH_ROWS):
                writer.write_table(table.select(self._schema.names).cast(self._schema))
        return [sink.getvalue().to_pybytes()]

    def count(self, files: Sequence[bytes]) -> int:
        with pa.ipc.open_stream(pa.BufferReader(files[0])) as reader:
            return sum(batch.num_rows for batch in reader)

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        import datasets

        features = datasets.Features.from_arrow_schema(self._schema)
        info = asdict(datasets.DatasetInfo(features=features))
        info = {k: v for k, v in info.items() if v is not None} | {"features": features.to_dict()}
        files = [name for unit in units for name in unit.files]
        state = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": datasets.fingerprint.Hasher.hash(files),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        whole = json.loads(json.dumps(info, default=str))
        return {"dataset_info.json": canonical_json(whole), "state.json": canonical_json(state)}

    @cached_property
    def _schema(self) -> pa.Schema:
        import datasets

        return datasets.Features.from_arrow_schema(described(self.source)).arrow_schema
