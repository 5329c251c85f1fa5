"""Random subsets of a corpus as manifests: the baseline beside every evaluated selection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curate.pipeline.manifests.manifest import NAME, Manifest, write_manifest, write_parts
from curate.pipeline.manifests.places import CorpusPlaces, placed
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.storing.storage import Folder
from curate.selectors.keyed import stream_key
from curate.selectors.protocol import Budget
from curate.selectors.random import Random


@dataclass(frozen=True)
class CorpusTable:
    """A corpus as the table that selectors read: shards and row numbers, and no errors."""

    corpus: Corpus

    @property
    def rows(self) -> int:
        return self.corpus.rows

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([("shard", pa.int32()), ("row", pa.int64()), ("error", pa.string())])

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in corpus order."""
        places = CorpusPlaces([shard.rows for shard in self.corpus.shards])
        for piece in placed(places, 0, self.rows):
            nulls = pa.nulls(len(piece.row), pa.string())
            made = {"shard": pa.array(piece.shard), "row": pa.array(piece.row), "error": nulls}
            yield pa.record_batch([made[name] for name in columns], list(columns))


def random_manifest(corpus: Corpus, rows: int, seed: int, folder: Folder) -> Manifest:
    """Return the manifest of a uniform sample of `rows` rows, written to `folder` if need be.

    A function of (seed, shard, row); samples of different sizes are drawn independently.
    """
    if not folder.exists(NAME):
        rng = np.random.default_rng(stream_key(seed, rows))
        chosen = Random(ranked=False).select(CorpusTable(corpus), Budget("rows", rows), rng)
        files, kept = write_parts(folder, chosen.batches)
        assert kept == rows, f"{kept} rows were drawn instead of {rows}"
        write_manifest(folder, _content(corpus, rows, seed, files))
    return Manifest.read(folder.uri)


def _content(corpus: Corpus, rows: int, seed: int, files: dict[str, str]) -> dict[str, object]:
    return {
        "corpus": corpus.describe(),
        "selection": {
            "method": "random",
            "by": None,
            "direction": None,
            "budget": {"kind": "rows", "value": rows},
            "selected": rows,
            "seed": seed,
            "params": {},
        },
        "weight_kind": "none",
        "schedule": None,
        "groups": None,
        "scores": [],
        "files": files,
    }
