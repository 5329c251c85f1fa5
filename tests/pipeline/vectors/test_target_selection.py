"""Methods that compare with a target or pass weights on, from a score table to a manifest."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate

pytest.importorskip("faiss")


@pytest.fixture
def target(tmp_path: Path, points: np.ndarray) -> str:
    """Another corpus: points with classes and two groups, one row without a vector."""
    (tmp_path / "val").mkdir()
    rows = 30
    vectors = [None if i == 4 else (points[i] + 0.5).tolist() for i in range(rows)]
    columns = {
        "lists": pa.array(vectors, pa.list_(pa.float32())),
        "label": np.arange(rows) % 3,
        "place": ["near" if i % 2 else "far" for i in range(rows)],
    }
    pq.write_table(pa.table(columns), tmp_path / "val" / "0.parquet")
    return str(tmp_path / "val")


def weights_of(folder: Path) -> np.ndarray:
    parts = [pq.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(parts)["weight"].to_numpy(zero_copy_only=False)


CASES = {
    "kmm": {"points": 20, "D": 2.0},
    "density_ratio": {"sample": 50},
    "gsr": {"label": "label", "group": "place", "steps": 3},
    "glister": {"rounds": 4},
    "greedy_alignment": {},
}


@pytest.mark.parametrize("method", sorted(CASES))
def test_the_same_command_writes_the_same_bytes(scores, target, tmp_path, method):
    asked = {
        "budget": 0.5 if method in ("glister", "greedy_alignment") else 1.0,
        "vectors": "column:fixed",
        "target_vectors": "column:lists",
        "target": target,
        "params": CASES[method],
    }
    for name in ("a", "b"):
        manifest = curate.select(scores, method=method, out=tmp_path / name, **asked)
    assert len(manifest) == (50 if asked["budget"] == 0.5 else 99)
    one, two = (sorted((tmp_path / name).glob("*.*[nt]")) for name in ("a", "b"))
    assert [file.name for file in one] == [file.name for file in two]
    assert {file.suffix for file in one} == {".json", ".parquet"}
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    if asked["budget"] == 1.0:
        assert manifest.content["weight_kind"] == "loss"
        assert weights_of(tmp_path / "a").mean() == pytest.approx(1, rel=1e-5)


def test_a_target_column_that_is_not_there_is_named(scores, target, tmp_path):
    with pytest.raises(ValueError, match="has no column 'region'; it has: lists, label, place"):
        curate.select(
            scores,
            method="gsr",
            budget=1.0,
            vectors="column:fixed",
            target_vectors="column:lists",
            target=target,
            params={"label": "label", "group": "region"},
            out=tmp_path / "m",
        )
    assert not list((tmp_path / "m").glob("*")) or not (tmp_path / "m" / "manifest.json").exists()


def test_weights_of_a_coreset_reach_all_rows(scores, target, tmp_path):
    """Coreset, weights on it, all rows: the chain of "The power of few"."""
    few = curate.select(
        scores,
        method="density_ratio",
        budget=30,
        vectors="column:fixed",
        target_vectors="column:lists",
        target=target,
        out=tmp_path / "few",
    )
    everything = curate.select(
        scores,
        method="propagate",
        budget=1.0,
        vectors="column:fixed",
        params={"manifest": str(tmp_path / "few"), "neighbors": 3},
        out=tmp_path / "all",
    )
    assert (len(few), len(everything)) == (30, 99)
    assert everything.content["selection"]["params"]["weighted_rows"] == 30
    spread = weights_of(tmp_path / "all")
    assert 0 < spread.std() <= weights_of(tmp_path / "few").std() * 1.5
