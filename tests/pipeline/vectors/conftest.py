"""A score table over a small corpus with vectors, texts and labels, and a tiny encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.scoring.score_table import (
    META,
    SUCCESS,
    UNITS,
    ScoreTable,
    parquet_bytes,
    score_schema,
    write_part,
)
from curate.pipeline.storing.storage import Folder, canonical_json

SHARDS = [40, 1, 59]
SENTENCES = [f"the {a} {b} a {c}" for a in ("cat", "dog") for b in ("sees", "likes") for c in "xyz"]


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(sum(SHARDS), 6)).astype(np.float32)


@pytest.fixture
def corpus(tmp_path: Path, points: np.ndarray) -> str:
    """Shards with `fixed` and `lists` of the points, some of the latter null, and texts."""
    starts = np.cumsum([0, *SHARDS])
    (tmp_path / "data").mkdir()
    for i in range(len(SHARDS)):
        mine = points[starts[i] : starts[i + 1]]
        at = np.arange(starts[i], starts[i + 1])
        table = pa.table(
            {
                "fixed": pa.FixedSizeListArray.from_arrays(pa.array(mine.ravel()), 6),
                "lists": [
                    None if k in (0, 1, 41, 77) else mine[k - starts[i]].tolist() for k in at
                ],
                "text": [
                    None if k == 5 else " ".join(SENTENCES[k % 12].split()[: 2 + k % 4]) for k in at
                ],
                "label": at % 3,
                "ragged": [[1.0] * (3 if k == 60 else 2) for k in at],
            }
        )
        pq.write_table(table, tmp_path / "data" / f"s{i}.parquet", row_group_size=16)
    return str(tmp_path / "data")


@pytest.fixture
def scores(tmp_path: Path, corpus: str) -> ScoreTable:
    """A finished score table: one unit a shard but two for the last; row 3 failed."""
    opened, folder = open_corpus(corpus), Folder(str(tmp_path / "scores"))
    units = [(0, 0, 40), (1, 0, 1), (2, 0, 30), (2, 30, 29)]
    schema = score_schema(["el2n"], keep=[pa.field("label", pa.int64())])
    for unit, (shard, start, rows) in enumerate(units):
        row = np.arange(start, start + rows)
        at = row + sum(SHARDS[:shard])
        failed = at == 3
        values: dict[str, Any] = {
            "shard": np.full(rows, shard),
            "row": row,
            "label": at % 3,
            "el2n": pa.array((at * 37 % 101).astype(np.float32), mask=failed),
            "error": ["broken" if bad else None for bad in failed],
        }
        table = pa.table([pa.array(values[f.name], f.type) for f in schema], schema=schema)
        write_part(folder, unit, table, {"rows": rows})
    names = ("unit", "shard", "row_start", "rows")
    columns = zip(*((u, *where) for u, where in enumerate(units)), strict=True)
    folder.replace(UNITS, parquet_bytes(pa.table(dict(zip(names, columns, strict=True)))))
    meta = {
        "format": "curate.scores",
        "version": 1,
        "run": "r1",
        "corpus": opened.describe(),
        "task": {"columns": {"inputs": ["text"], "label": "label"}},
        "scorers": {"el2n": {"name": "el2n", "params": {}}},
        "target": None,
    }
    folder.replace(META, canonical_json(meta))
    success = {"rows": opened.rows, "units": len(units), "digest": "d1", "run": "r1"}
    folder.replace(SUCCESS, canonical_json(success))
    return ScoreTable.open(tmp_path / "scores")


@pytest.fixture(scope="session")
def encoder_folder(
    tmp_path_factory: pytest.TempPathFactory, make_bert: Callable[[Path, list[str], int], str]
) -> str:
    return make_bert(tmp_path_factory.mktemp("encoder"), SENTENCES, 80)
