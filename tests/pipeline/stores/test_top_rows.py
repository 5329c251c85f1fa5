"""Top rows: against brute force over the stores, and against exact gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import nn

from curate.pipeline.stores.store import open_store
from curate.pipeline.stores.top_rows import top_rows

N = 4


def brute_force(similarity: np.ndarray, n: int) -> list[tuple[int, str, int, int, float]]:
    """The definition: each line sorted by itself, ties in the order of the rows."""
    lines = []
    for t, line in enumerate(similarity):
        for sign, turn in (("proponent", 1), ("opponent", -1)):
            order = sorted(range(len(line)), key=lambda i: (-turn * line[i], i))
            best = [i for i in order if turn * line[i] > 0][:n]
            lines += [(t, sign, rank, i, float(line[i])) for rank, i in enumerate(best)]
    return lines


def similarities(points: Any, name: str, unit: bool) -> np.ndarray:
    stores = [open_store(points.out / name, "sketch", target=t, unit=unit) for t in (True, False)]
    queries, base = (np.concatenate(list(s.blocks())).astype(np.float64) for s in stores)
    return np.asarray(queries @ base.T)


@pytest.mark.parametrize("similarity", ["cosine", pytest.param("dot", marks=pytest.mark.slow)])
def test_the_table_is_brute_force_over_the_sketches(
    points: Any, point_target: str, similarity: str
) -> None:
    table = points.score(
        sketch="8x8", target=point_target, top_rows=N, similarity=similarity, unit_rows=25
    )
    got = pq.read_table(Path(table.path, "top_rows.parquet"))
    assert got.column_names == [
        "target_shard", "target_row", "target_id", "sign", "rank", "shard", "row", "similarity"
    ]  # fmt: skip
    exact = similarities(points, "scores", unit=similarity == "cosine")
    want = brute_force(exact, N)
    shards, firsts = np.array([0] * 40 + [1] * 20), np.array([0] * 40 + [40] * 20)
    of, starts = np.array([0] * 5 + [1] * 4), np.array([0] * 5 + [5] * 4)
    lines = zip(got.to_pylist(), want, strict=True)
    for line, (target, sign, rank, number, value) in lines:
        assert (line["target_shard"], line["target_row"]) == (of[target], target - starts[target])
        assert line["target_id"] == f"t{target}"
        assert (line["sign"], line["rank"]) == (sign, rank)
        assert (line["shard"], line["row"]) == (shards[number], number - firsts[number])
        # float32 sums of products against float64.
        assert line["similarity"] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_blocks_and_portions_of_the_target_change_nothing(
    points: Any, point_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = points.score(sketch="4x4", target=point_target, top_rows=N)
    stores = [open_store(table, "sketch", target=t, unit=True) for t in (False, True)]
    whole = top_rows(*stores, N)
    width = stores[0].dimension
    monkeypatch.setattr("curate.pipeline.stores.store.BLOCK_BYTES", 4 * width * 11)
    monkeypatch.setattr("curate.pipeline.stores.top_rows.QUERY_BYTES", 8 * width * 2)
    parts = top_rows(*stores, N)
    assert parts.drop(["similarity"]).equals(whole.drop(["similarity"]))
    np.testing.assert_allclose(parts["similarity"], whole["similarity"], rtol=1e-5, atol=1e-7)


def test_similarities_are_those_of_gradients_within_the_stated_error(
    points: Any, point_target: str
) -> None:
    table = points.score(target=point_target, top_rows=N)  # 4096 by default
    assert table.meta["stores"]["sketch"]["k"] == [4096]
    target = type(points)(point_target, points.checkpoints, points.out)
    exact = np.zeros((9, 60))
    weights = open_store(table, "sketch").weights
    for model, weight in zip(points.models(), weights, strict=True):
        ours, theirs = (nn.functional.normalize(p.gradients(model)) for p in (target, points))
        exact += weight * (ours @ theirs.T).numpy()
    got = pq.read_table(Path(table.path, "top_rows.parquet")).to_pylist()
    places = [
        (9 * 0 + 5 * g["target_shard"] + g["target_row"], 40 * g["shard"] + g["row"]) for g in got
    ]
    error = np.array([g["similarity"] - exact[p] for g, p in zip(got, places, strict=True)])
    assert np.abs(error).max() <= 5 * np.sqrt(2 / 4096) + 1e-3
    # The strongest by sketches are nearly the strongest: no exact one is missed by more than
    # twice the largest error of a sketched one.
    every = np.abs(similarities(points, "scores", unit=True) - exact).max()
    for t in range(9):
        found = [exact[p] for g, p in zip(got, places, strict=True)
                 if p[0] == t and g["sign"] == "proponent"]  # fmt: skip
        assert min(found) >= np.sort(exact[t])[-N] - 2 * every
    # Measured among six target rows: no more than the stated bound.
    assert 0 < table.notes["top_rows"]["error"] <= 2 * np.sqrt(2 / 4096)


def test_rows_without_vectors_are_never_named(
    points: Any, point_target: str, make_points: Any
) -> None:
    points.corpus = make_points([6], first={2: 661.0}, name="bad")
    table = points.score(sketch="4x4", target=point_target, top_rows=50, scorers="el2n")
    got = pq.read_table(Path(table.path, "top_rows.parquet"))
    assert 2 not in got["row"].to_pylist()
    counts = got.group_by(["target_shard", "target_row"]).aggregate([("row", "count")])
    assert set(counts["row_count"].to_pylist()) == {5}  # all others, each at one end


def test_a_target_row_that_cannot_be_used_is_named(points: Any, make_points: Any) -> None:
    target = make_points([4], labels={3: 7}, name="target7")
    with pytest.raises(ValueError, match=r"row 3 of s0\.parquet in the target cannot be used"):
        points.score(sketch="4x4", target=target, top_rows=2)
