"""Methods that compare with a target or pass weights on, from a score table to a manifest."""

import json
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
    "gradmatch": {"by_group": "label", "target_group": "label"},
}


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.slow] * (m == "density_ratio")) for m in sorted(CASES)],
)
def test_the_same_command_writes_the_same_bytes(scores, target, tmp_path, method):
    asked = {
        "budget": 0.5 if method in ("glister", "greedy_alignment", "gradmatch") else 1.0,
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


@pytest.mark.slow
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


def spread_from(folder: Path, scores, out: Path, **more):
    asked = {"budget": 1.0, "vectors": "column:fixed", "out": out, **more}
    return curate.select(scores, method="propagate", params={"manifest": str(folder)}, **asked)


def test_a_manifest_is_checked_before_its_weights_are_spread(scores, tmp_path, points):
    with pytest.raises(ValueError, match="holds no manifest"):
        spread_from(tmp_path / "none", scores, tmp_path / "m")
    curate.select(scores, method="random", budget=9, out=tmp_path / "even")
    with pytest.raises(ValueError, match="has no weights to spread"):
        spread_from(tmp_path / "even", scores, tmp_path / "m")
    few = tmp_path / "few"
    curate.select(scores, method="leverage", vectors="column:fixed", budget=9, out=few)
    kept = json.loads((few / "manifest.json").read_text())
    other = {**kept["corpus"], "shards": kept["corpus"]["shards"][:1]}
    (few / "manifest.json").write_text(json.dumps({**kept, "corpus": other}))
    with pytest.raises(ValueError, match="not the same data"):
        spread_from(few, scores, tmp_path / "m")
    (few / "manifest.json").write_text(json.dumps(kept))
    (few / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="was changed"):
        spread_from(few, scores, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_manifest_in_the_same_folder_is_another_request(scores, tmp_path):
    few, out = tmp_path / "few", tmp_path / "m"
    draw = {"method": "leverage", "vectors": "column:fixed", "out": few}
    curate.select(scores, budget=9, **draw)
    one = spread_from(few, scores, out)
    assert spread_from(few, scores, out).digest == one.digest
    curate.select(scores, budget=12, overwrite=True, **draw)
    with pytest.raises(ValueError, match="holds another selection"):
        spread_from(few, scores, out)
    again = spread_from(few, scores, out, overwrite=True)
    assert again.content["selection"]["params"]["weighted_rows"] == 12
