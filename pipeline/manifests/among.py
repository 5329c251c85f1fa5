"""A score table of which only the rows that an earlier selection kept may be chosen."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64
from numpy import ndarray

from curate.pipeline.manifests.algebra import same_data
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.merge import row_keys
from curate.pipeline.scoring.score_table import ScoreTable
from curate.selectors.protocol import Table


class Among:
    """The table with an error in each row that the manifest leaves out; memory is one batch.

    Both are in corpus order and read side by side. Rows keep their places, so vectors and groups
    are the table's.

    Raises:
        ValueError: while it is read: the manifest has rows that the table lacks.
    """

    def __init__(self, table: Table, manifest: Manifest) -> None:
        self._table, self._manifest = table, manifest

    @property
    def rows(self) -> int:
        return self._table.rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in corpus order."""
        if "error" not in columns:
            yield from self._table.scan(columns)
            return
        kept = _Kept(self._manifest)
        for batch in self._table.scan(list(dict.fromkeys([*columns, "shard", "row"]))):
            is_kept = pa.array(kept.among(row_keys(batch)))
            error = pc.if_else(is_kept, batch.column("error"), "left out before")
            place = batch.schema.get_field_index("error")
            yield batch.set_column(place, "error", error).select(list(columns))
        kept.check_end()


class _Kept:
    """The rows of a manifest, read as far as somebody asks."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._found = manifest, 0
        self._batches = manifest.batches(["shard", "row"])
        self._keys = np.empty(0, dtype=np.int64)

    def among(self, keys: Int64[ndarray, " n"]) -> Bool[ndarray, " n"]:
        """Tell which of these rows, that follow on those before, the manifest has."""
        found = np.zeros(len(keys), dtype=bool)
        while len(keys):
            if not len(self._keys):
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._keys = row_keys(batch)
                continue
            found |= np.isin(keys, self._keys, assume_unique=True)
            if self._keys[-1] > keys[-1]:
                self._keys = self._keys[np.searchsorted(self._keys, keys[-1], side="right") :]
                break
            self._keys = self._keys[:0]
        self._found += int(found.sum())
        return found

    def check_end(self) -> None:
        if lacking := len(self._manifest) - self._found:
            raise ValueError(
                f"the manifest {self._manifest.path} keeps {lacking} rows that the score table "
                "lacks"
            )


def manifest_of(path: str, scores: ScoreTable) -> Manifest:
    """Return the manifest in this folder if it selects from the data of the score table.

    Raises:
        ValueError: there is no manifest, a part was changed, or it selects from other data.
    """
    manifest = Manifest.read(path)
    if not same_data(manifest.content["corpus"], scores.corpus):
        raise ValueError(
            f"the manifest {path} selects from {manifest.content['corpus']['uri']} and the scores "
            f"are of {scores.corpus['uri']}: not the same data"
        )
    manifest.check_files()
    return manifest
