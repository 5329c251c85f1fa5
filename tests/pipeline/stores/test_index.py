"""Indexes of stores: against brute force, on demand, refused when stale or damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.reporting.verify import verify
from curate.pipeline.stores.index import SIMILARITIES, build_index, open_index
from curate.pipeline.stores.store import open_store

RUNNER = CliRunner()


def vectors(folder: str, name: str, unit: bool) -> np.ndarray:
    store = open_store(folder, name, unit=unit)
    return np.concatenate(list(store.blocks())).astype(np.float64)


def test_a_flat_index_is_brute_force(points: Any, make_points: Any) -> None:
    points.corpus = make_points([30, 10], first={4: 661.0}, name="bad")
    table = points.score(store="embedding", unit_rows=15)
    rows = np.array([0, 39, 17])
    for similarity in SIMILARITIES:
        index = build_index(table.path, similarity=similarity)
        base = vectors(table.path, "embedding", similarity == "cosine")
        if similarity == "euclidean":
            exact = -np.linalg.norm(base[rows][:, None] - base[None], axis=2)
        else:
            exact = base[rows] @ base.T
        exact[:, 4] = -np.inf
        values, numbers = index.near(rows, 6)
        want = np.argsort(-exact, axis=1, kind="stable")[:, :6]
        np.testing.assert_array_equal(numbers, want)
        signed = -values if similarity == "euclidean" else values
        # FAISS's distances come from norms and products: their squares are off by float32's
        # rounding.
        np.testing.assert_allclose(signed, np.take_along_axis(exact, want, 1), atol=2e-3)
        assert index.said["vectors"] == 39 and index.said["rows"] == 40


def test_an_ivfpq_index_of_few_rows_finds_neighbours(points: Any, make_points: Any) -> None:
    points.corpus = make_points([300], name="few")
    table = points.score(store="embedding", batch_rows=256)
    coded = build_index(table.path, kind="ivfpq")
    base, rows = vectors(table.path, "embedding", unit=True), np.arange(0, 300, 10)
    want = np.argsort(-base[rows] @ base.T, axis=1)[:, :10]
    found = coded.near(rows, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(want, found, strict=True)])
    assert coded.said["kind"] == "ivfpq" and recall >= 0.7


@pytest.mark.slow
def test_beyond_the_memory_it_is_ivfpq_and_still_finds_neighbours(
    points: Any, make_points: Any
) -> None:
    points.corpus = make_points([3000], name="many")
    points.checkpoints += "/seed0-step000001"
    table = points.score(sketch="128", batch_rows=256)
    flat = build_index(table.path, "sketch")
    assert flat.said["kind"] == "flat"
    coded = build_index(table.path, "sketch", memory=1 << 20)  # 3000 x 128 x 4 is 1.5 MB
    said = coded.said
    assert (said["kind"], said["codes"], said["trained"]) == ("ivfpq", 64, (1 << 20) // 512)
    rows = np.arange(0, 3000, 60)
    exact, found = flat.near(rows, 10)[1], coded.near(rows, 10)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert recall >= 0.5
    again = build_index(table.path, "sketch", memory=1 << 20, overwrite=True)
    assert again.said == said  # the same sample, seed and bytes


def test_an_index_is_made_once(points: Any) -> None:
    table = points.score(store="embedding")
    first = build_index(table.path)
    file = Path(table.path, first.said["file"])
    made = file.stat().st_ino, file.stat().st_mtime_ns
    assert build_index(table.path).said == first.said
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == made
    build_index(table.path, checkpoints=[0])
    assert open_index(table.path).said["checkpoints"] == [0]
    assert verify(table.path)["problems"] == []


def test_a_stale_or_damaged_index_is_refused(points: Any) -> None:
    table = points.score(store="embedding")
    with pytest.raises(ValueError, match="has no cosine index of embedding; make it with"):
        open_index(table.path)
    index = build_index(table.path)
    file, described = (Path(table.path, index.said["file"]).with_suffix(s)
                       for s in (".faiss", ".json"))  # fmt: skip
    data = file.read_bytes()
    for harm in (data[:-9], data + b"x"):
        file.write_bytes(harm)
        with pytest.raises(ValueError, match=r"index-cosine\.faiss is damaged"):
            open_index(table.path)
    assert len(build_index(table.path).index) == 60 and file.read_bytes() == data  # made again
    file.write_bytes(b"x" * len(data))
    with pytest.raises(ValueError, match=r"index-cosine\.faiss is no index, or damaged"):
        open_index(table.path)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    file.write_bytes(bytes(changed))
    assert verify(table.path)["problems"] == [f"{file} was changed: another sha256"]
    file.write_bytes(data)
    said = json.loads(described.read_text())
    described.write_text(json.dumps(said | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match="of vectors that are no longer there"):
        open_index(table.path)
    assert "no longer there" in verify(table.path)["problems"][0]
    described.write_text('{"store": "embedding"}')
    assert "describes no index" in verify(table.path)["problems"][0]
    file.unlink()
    described.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"index-cosine\.faiss is missing"):
        open_index(table.path)
    assert len(verify(table.path)["problems"]) == 1


def test_the_command_shows_neighbours(points: Any) -> None:
    table = points.score(store="embedding", scorers="loss")
    command = ["index", table.path, "--near", "1:3", "-k", "3", "--json"]
    done = RUNNER.invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    base = vectors(table.path, "embedding", unit=True)
    order = np.argsort(-base @ base[43], kind="stable")
    want = [int(i) for i in order if i != 43][:3]
    got = [40 * line["shard"] + line["row"] for line in found["neighbors"]]
    assert got == want and found["index"] == "flat"
    for extra, said in (
        (["--near", "1:20"], "has no row 1:20"),
        (["--near", "3"], "write SHARD:ROW"),
        (["-k", "60"], "choose 1 to 59"),
        (["--store", "probs"], "no store 'probs'"),
    ):
        done = RUNNER.invoke(cli.app, [*command, *extra])
        assert isinstance(done.exception, ValueError) and said in str(done.exception)
