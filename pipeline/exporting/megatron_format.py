"""Arrays for trainers that read documents by number, such as Megatron: ids and weights as .npy."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from curate.pipeline.exporting.formats import Source, Written
from curate.pipeline.storing.storage import Folder


@dataclass(frozen=True)
class MegatronFormat:
    """`documents-00000.npy` int64 and `weights-00000.npy` float32 …, equally long; no rows copied.

    A document's id is its place when all rows of the corpus are counted through in order: what
    `preprocess_data` numbers when it is given the shards in that order. `documents.json` says where
    each shard begins. Repeated documents are in the list as often. All kinds of weights.
    """

    source: Source
    refuses: dict[str, str] = field(default_factory=dict, init=False)
    reads_rows: bool = field(default=False, init=False)

    def file_names(self, unit: int, units: int) -> Sequence[str]:
        return [f"documents-{unit:05d}.npy", f"weights-{unit:05d}.npy"]

    def encode(self, rows: Iterable[pa.Table]) -> list[bytes]:
        starts = np.array(self.source.shard_starts, dtype=np.int64)
        ids, weights = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for table in rows:
            ids.append(starts[table["__shard"].to_numpy()] + table["__row"].to_numpy())
            weights.append(table["weight"].to_numpy().astype(np.float32))
        return [_npy(np.concatenate(ids)), _npy(np.concatenate(weights))]

    def count(self, files: Sequence[bytes]) -> int:
        ids, weights = (np.load(io.BytesIO(data), allow_pickle=False) for data in files)
        assert len(ids) == len(weights), "a weight for each document"
        return len(ids)

    def finish(self, folder: Folder, units: Sequence[Written]) -> dict[str, bytes]:
        index = {
            "documents": [unit.files[0] for unit in units],
            "weights": [unit.files[1] for unit in units],
            "rows": [unit.rows for unit in units],
            "weight_kind": self.source.weight_kind,
            "shard_starts": list(self.source.shard_starts),
        }
        return {"documents.json": json.dumps(index, indent=2).encode() + b"\n"}


def _npy(array: "np.ndarray[tuple[int], np.dtype[np.int64 | np.float32]]") -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()
