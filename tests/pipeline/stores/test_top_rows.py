"""Top rows: against plain autograd, and what is retrieved against brute force over the stores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import nn

from curate.pipeline.scoring.top_rows_exact import ExactPairs
from curate.pipeline.stores.store import open_store
from curate.pipeline.stores.top_rows import MORE

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


def sketched(points: Any, name: str, unit: bool) -> np.ndarray:
    stores = [open_store(points.out / name, "sketch", target=t, unit=unit) for t in (True, False)]
    queries, base = (np.concatenate(list(s.blocks())).astype(np.float64) for s in stores)
    return np.asarray(queries @ base.T)


def exact(points: Any, target: str, unit: bool, params: slice = slice(None)) -> np.ndarray:
    """Every pair by plain autograd in float64: mean over two seeds of Σ_k w_k, w ~ 0.05, 0.1/3."""
    theirs = type(points)(target, points.checkpoints, points.out)
    total = np.zeros((len(theirs.y), len(points.y)))
    rates = np.array([0.05, 0.1 / 3])
    for model, weight in zip(points.models(), np.tile(rates / rates.sum() / 2, 2), strict=True):
        pair = [p.gradients(model)[:, params] for p in (theirs, points)]
        if unit:
            pair = [nn.functional.normalize(g) for g in pair]
        total += weight * (pair[0] @ pair[1].T).numpy()
    return total


def lines(table: Any, name: str = "similarity") -> list[tuple[int, str, int, int, float]]:
    got = pq.read_table(Path(table.path, "top_rows.parquet")).to_pylist()
    return [
        (5 * g["target_shard"] + g["target_row"], g["sign"], g["rank"],
         40 * g["shard"] + g["row"], g[name])
        for g in got
    ]  # fmt: skip


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_similarities_are_those_of_gradients_and_estimates_those_of_sketches(
    points: Any, point_target: str, similarity: str
) -> None:
    is_cosine = similarity == "cosine"
    # Twice 16 of 60 rows at either end: all but the few in the middle are retrieved.
    table = points.score(
        sketch="8x8", target=point_target, top_rows=16, similarity=similarity, unit_rows=25
    )
    got = pq.read_table(Path(table.path, "top_rows.parquet"))
    assert got.column_names == [
        *("target_shard", "target_row", "target_id", "sign", "rank", "shard", "row"),
        *("similarity", "estimate"),
    ]
    assert got["target_id"].to_pylist() == [f"t{line[0]}" for line in lines(table)]
    truth, rough = exact(points, point_target, is_cosine), sketched(points, "scores", is_cosine)
    want = brute_force(truth, 16)
    assert [line[:4] for line in lines(table)] == [line[:4] for line in want]
    scale = np.abs(truth).max()
    for (*_, value), (target, *_, number, true) in zip(lines(table), want, strict=True):
        # float32 sums of a hundred products, of gradients that float32 passes made.
        assert value == pytest.approx(true, rel=1e-5, abs=2e-6 * scale), (target, number)
    for target, _, _, number, value in lines(table, "estimate"):
        assert value == pytest.approx(rough[target, number], rel=1e-4, abs=1e-6 * scale)
    assert np.abs(rough - truth).max() > 0.01 * scale  # the sketches alone would not do
    said = table.notes["top_rows"]
    assert said["exact"] and said["estimates_because"] is None and said["candidates"] == 32
    metadata = pq.read_schema(Path(table.path, "top_rows.parquet")).metadata
    assert json.loads(metadata[b"curate.top_rows"])["exact"]


def test_among_what_a_rough_sketch_retrieves_exact_values_decide(
    points: Any, point_target: str
) -> None:
    table = points.score(sketch="4x4", target=point_target, top_rows=N)
    truth, rough = (
        exact(points, point_target, unit=True), sketched(points, "scores", unit=True)
    )  # fmt: skip
    for t in range(9):
        order = np.argsort(-rough[t], kind="stable")
        retrieved = np.concatenate([order[: MORE * N], order[-MORE * N :]])
        best = retrieved[np.argsort(-truth[t, retrieved])]
        ours = [line for line in lines(table) if line[0] == t]
        assert [x[3] for x in ours if x[1] == "proponent"] == [
            i for i in best[:N] if truth[t, i] > 0
        ]
        assert [x[3] for x in ours if x[1] == "opponent"] == [
            i for i in best[::-1][:N] if truth[t, i] < 0
        ]


@pytest.mark.parametrize(
    "limit",
    ["top_rows_exact.TARGET_BYTES", "top_rows_exact.BATCH_BYTES", "signal_pass.RESIDENT_BYTES"],
)
def test_portions_change_nothing(
    points: Any, point_target: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Two target rows at a time; or two rows to a batch; or one model for all checkpoints."""
    whole = points.score("whole", sketch="4x4", target=point_target, top_rows=N)
    width = sum(p.numel() for p in points.models()[0].parameters())
    monkeypatch.setattr(f"curate.pipeline.scoring.{limit}", 8 * width + 4)
    monkeypatch.setattr("curate.pipeline.stores.top_rows.QUERY_BYTES", 8 * 100)
    monkeypatch.setattr("curate.pipeline.stores.store.BLOCK_BYTES", 4000)
    parts = points.score("parts", sketch="4x4", target=point_target, top_rows=N)
    assert [x[:4] for x in lines(parts)] == [x[:4] for x in lines(whole)]
    for name in ("similarity", "estimate"):
        ours, theirs = ([x[4] for x in lines(t, name)] for t in (parts, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_that_do_not_fit_leave_estimates_and_say_so(
    points: Any, point_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curate.pipeline.scoring.top_rows_exact.TARGET_BYTES", 10)
    table = points.score(sketch="8x8", target=point_target, top_rows=N, scorers="el2n")
    said = table.notes["top_rows"]
    assert not said["exact"] and "the gradient of one row takes" in said["estimates_because"]
    assert lines(table) == lines(table, "estimate")
    want = brute_force(sketched(points, "scores", unit=True), N)
    assert [line[:4] for line in lines(table)] == [line[:4] for line in want]
    # One-sided k = 4096: a standard deviation of at most √(2/k), and 0.001 of float16.
    monkeypatch.undo()
    fine = points.score("fine", target=point_target, top_rows=N)  # 4096 by default
    assert fine.meta["stores"]["sketch"]["k"] == [4096]
    error = [a[4] - b[4] for a, b in zip(lines(fine), lines(fine, "estimate"), strict=True)]
    assert 0 < np.abs(error).max() <= 5 * np.sqrt(2 / 4096) + 1e-3
    assert 0 < fine.notes["top_rows"]["error"] <= 2 * np.sqrt(2 / 4096)


def test_a_kill_while_rows_are_compared_leads_to_the_same_bytes(
    points: Any, point_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sketch": "4x4(params=weight)", "target": point_target, "top_rows": N}
    whole = points.score("whole", **settings)
    block = ExactPairs._block

    def killed(self: ExactPairs, k: int, *rest: Any) -> Any:
        if k == 2:
            raise KeyboardInterrupt
        return block(self, k, *rest)

    monkeypatch.setattr(ExactPairs, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        points.score("cut", **settings)
    assert not Path(points.out, "cut", "top_rows.parquet").exists()
    monkeypatch.undo()
    cut = points.score("cut", **settings)
    assert cut.notes["top_rows"] == whole.notes["top_rows"]
    # Of the parameters that the sketch is of, and no others.
    names = [n for n, p in points.models()[0].named_parameters() for _ in range(p.numel())]
    some = np.flatnonzero([n.endswith("weight") for n in names])
    truth = exact(points, point_target, unit=True, params=some)  # type: ignore[arg-type]
    for target, _, _, number, value in lines(cut):
        assert value == pytest.approx(truth[target, number], rel=1e-5, abs=2e-6)


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
