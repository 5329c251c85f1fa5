"""The manifest format: a golden file, equal bytes, digests, changed and moved data."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.manifests import manifest as module
from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.storing.storage import Folder

GOLDEN = Path(__file__).parents[2] / "golden" / "manifest-v1"
KEPT = [(0, 1), (0, 2), (0, 7), (2, 0), (2, 5)]
IDS = ["b", "c", "h", "r", "w"]
RANKS = [3, 0, 4, 1, 2]
WEIGHTS = [0.5, 1.5, 1.0, 1.25, 0.75]


def batches(kept=KEPT, size=2, weights=WEIGHTS, ranks=RANKS, ids=IDS):
    columns = {
        "shard": pa.array([s for s, _ in kept], pa.int32()),
        "row": pa.array([r for _, r in kept], pa.int64()),
        "weight": pa.array(weights or [None] * len(kept), pa.float32()),
        "rank": pa.array(ranks or [None] * len(kept), pa.int32()),
    }
    if ids:
        columns["id"] = pa.array(ids)
    return pa.table(columns).to_batches(max_chunksize=size)


def content(files, corpus=None, **changes):
    shards = [
        {"path": f"s{i}.parquet", "rows": 8, "bytes": 99, "fingerprint": f"sha256:{i}"}
        for i in range(3)
    ]
    default = {"uri": "/data", "format": "parquet", "rows": 24, "shards": shards}
    return {
        "corpus": corpus or default,
        "selection": {
            "method": "keep",
            "by": "el2n",
            "direction": "high",
            "budget": {"kind": "rows", "value": 5},
            "selected": 5,
            "seed": 0,
            "params": {"drop_top": 0, "ties": {"rule": "row order", "at_cut": 2}},
        },
        "weight_kind": "loss",
        "schedule": None,
        "groups": {"cat": {"of": 14, "kept": 3}, "dog": {"of": 10, "kept": 2}},
        "scores": [{"run": "r", "digest": "d", "scorers": {"el2n": {"name": "el2n"}}}],
        "files": files,
        **changes,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for i in range(3):
        pq.write_table(pa.table({"x": np.arange(8) + 10 * i}), tmp_path / f"data/s{i}.parquet")
    return tmp_path / "data"


@pytest.fixture
def manifest(tmp_path: Path, corpus: Path) -> Path:
    folder = Folder(tmp_path / "m")
    files, _ = write_parts(folder, batches())
    write_manifest(folder, content(files, open_corpus(str(corpus)).describe()))
    return tmp_path / "m"


def test_the_golden_manifest_reads_as_it_was_written():
    found = Manifest.read(GOLDEN)
    found.check_files()
    assert found.content == {
        **content(found.content["files"]),
        "format": "curate.manifest",
        "version": 1,
    }
    rows = pa.Table.from_batches(list(found.batches()))
    assert [(f.name, str(f.type)) for f in rows.schema] == [
        ("shard", "int32"),
        ("row", "int64"),
        ("id", "string"),
        ("weight", "float"),
        ("rank", "int32"),
    ]
    assert list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True)) == KEPT
    assert rows["id"].to_pylist() == IDS
    assert rows["weight"].to_pylist() == WEIGHTS
    assert rows["rank"].to_pylist() == RANKS


def test_writing_the_same_gives_the_golden_bytes(tmp_path):
    written_by = pq.read_metadata(GOLDEN / "part-00000.parquet").created_by
    files, rows = write_parts(Folder(tmp_path), batches())
    if pq.read_metadata(tmp_path / "part-00000.parquet").created_by == written_by:
        write_manifest(Folder(tmp_path), content(files))
        for name in ("manifest.json", "part-00000.parquet"):
            assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    else:  # another pyarrow may pack differently; the rows are the same
        golden = pq.read_table(GOLDEN / "part-00000.parquet")
        assert pq.read_table(tmp_path / "part-00000.parquet").equals(golden)
    assert rows == 5


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 300), size=st.integers(1, 300), data=st.data())
def test_parts_are_cut_by_rows_not_by_batches(tmp_path_factory, rows, size, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", 16)
        patch.setattr(module, "GROUPS_PER_PART", 3)
        kept = [(0, i) for i in range(rows)]
        written = []
        for cut in (size, rows):
            folder = tmp_path_factory.mktemp("m")
            plain = batches(kept, cut, weights=None, ranks=None, ids=None)
            files, total = write_parts(Folder(folder), plain)
            assert total == rows
            written.append({name: (folder / name).read_bytes() for name in files})
            tables = [pq.read_table(folder / name) for name in sorted(files)]
        assert written[0] == written[1]
        assert len(written[0]) == -(-rows // 48)
        whole = pa.concat_tables(tables)
        assert whole["row"].to_pylist() == list(range(rows))
        assert whole.column_names == ["shard", "row", "weight"]
        assert set(whole["weight"].to_pylist()) == {1.0}


def test_rows_are_delta_packed_small(tmp_path):
    n = 200_000
    chosen = np.sort(np.random.default_rng(0).permutation(2 * n)[:n])
    table = pa.table(
        {
            "shard": pa.array(np.zeros(n), pa.int32()),
            "row": pa.array(chosen),
            "weight": pa.nulls(n, pa.float32()),
            "rank": pa.nulls(n, pa.int32()),
        }
    )
    write_parts(Folder(tmp_path), table.to_batches())
    footer = pq.read_metadata(tmp_path / "part-00000.parquet").row_group(0)
    assert "DELTA_BINARY_PACKED" in footer.column(1).encodings
    assert os.path.getsize(tmp_path / "part-00000.parquet") < 0.45 * n  # bytes a row


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(tmp_path, weight):
    with pytest.raises(ValueError, match="1 weights are negative or not finite"):
        write_parts(Folder(tmp_path), batches(weights=[1, 1, weight, 1, 1]))


def test_opening_checks_parts_and_data(manifest, corpus):
    opened = load_manifest(manifest)
    assert len(opened) == 5 and opened.corpus.rows == 24
    shard = corpus / "s2.parquet"
    pq.write_table(pa.table({"x": np.arange(8) + 21}), shard)
    with pytest.raises(ValueError, match=r"s2\.parquet"):
        load_manifest(manifest)


def test_moved_data_is_found_where_it_is_said_to_be(manifest, corpus, tmp_path):
    shutil.move(corpus, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="if the data moved, say where"):
        load_manifest(manifest)
    moved = load_manifest(manifest, corpus=str(tmp_path / "elsewhere"))
    assert [row["x"] for row in moved.rows()] == [1, 2, 7, 20, 25]
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "other")
    (tmp_path / "other" / "s1.parquet").unlink()
    with pytest.raises(ValueError, match=r"s1\.parquet|s2\.parquet"):
        load_manifest(manifest, corpus=str(tmp_path / "other"))


def test_damage_is_named(manifest, tmp_path):
    part = manifest / "part-00000.parquet"
    good = part.read_bytes()
    part.write_bytes(good[:-1] + b"x")
    with pytest.raises(ValueError, match=r"part-00000\.parquet was changed"):
        load_manifest(manifest)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00000\.parquet is missing"):
        load_manifest(manifest)
    with pytest.raises(ValueError, match="holds no manifest"):
        load_manifest(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, expected curate.manifest version 1 or 2"),
        ({"format": "curate.scores"}, "holds curate.scores version 1"),
        ({"weight_kind": "odd"}, "weights of kind 'odd'"),
        ({"files": None}, "lacks files"),
    ],
)
def test_other_formats_are_refused(manifest, change, message):
    path = manifest / "manifest.json"
    changed = {**json.loads(path.read_text()), **change}
    path.write_text(
        json.dumps({k: v for k, v in changed.items() if v is not None or k == "schedule"})
    )
    with pytest.raises(ValueError, match=message):
        load_manifest(manifest)


def test_the_run_folder_is_enough(manifest, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(manifest, tmp_path / "run" / "manifest")
    assert len(load_manifest(tmp_path / "run")) == 5
