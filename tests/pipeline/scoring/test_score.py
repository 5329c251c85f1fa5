"""Scores of a corpus: values against brute force, and everything that must not change them."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from curate.pipeline.models.checkpoint import find_checkpoints, load_model
from curate.pipeline.scoring.score import ScorePlan, score
from curate.pipeline.scoring.score_progress import Progress, duration
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.training.records import read_records
from curate.pipeline.training.train import train

SHARDS = (150, 90, 60)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits in three shards, with an id, and checkpoints of two seeds at epochs 0, 1, 2."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("digits")
    found = load_digits()
    images = (found.data[:300] / 16).astype(np.float32)
    table = pa.table(
        {
            "id": [f"row-{i}" for i in range(300)],
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 64),
            "label": found.target[:300],
        }
    )
    (root / "corpus").mkdir()
    start = 0
    for i, rows in enumerate(SHARDS):
        path = root / "corpus" / f"s{i}.parquet"
        pq.write_table(table.slice(start, rows), path, row_group_size=40)
        start += rows
    train(
        str(root / "corpus"),
        model="mlp",
        seeds=2,
        epochs=2,
        save_epochs=[0, 1, 2],
        out=str(root / "checkpoints"),
        progress=False,
    )
    return root


def run(root: Path, out: Path, scorers: str = "loss,el2n,grand", **settings: Any) -> ScoreTable:
    settings.setdefault("checkpoints", str(root / "checkpoints"))
    table = score(str(root / "corpus"), scorers=scorers, out=str(out), progress=False, **settings)
    assert isinstance(table, ScoreTable)
    return table


def frame(table: ScoreTable) -> dict[str, np.ndarray]:
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    return {name: whole.column(name).to_numpy(zero_copy_only=False) for name in whole.schema.names}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def brute_force(root: Path) -> dict[str, np.ndarray]:
    """Loss, EL2N, GraNd, entropy and TracIn's self-influence row by row in float64, [S, K, N]."""
    data = load_digits()
    images = torch.from_numpy((data.data[:300] / 16).astype(np.float32)).double()
    labels = torch.from_numpy(data.target[:300])
    found: dict[str, list[list[list[float]]]] = {n: [[], []] for n in ("loss", "el2n", "grand")}
    for checkpoint in find_checkpoints(str(root / "checkpoints")):
        model = load_model(checkpoint).double()
        rows: dict[str, list[float]] = {"loss": [], "el2n": [], "grand": []}
        for image, label in zip(images, labels, strict=True):
            logits = model(image.reshape(1, 1, 8, 8))
            loss = torch.nn.functional.cross_entropy(logits, label[None])
            grads = torch.autograd.grad(loss, [p for p in model.parameters()])
            error = torch.softmax(logits, 1)[0] - torch.nn.functional.one_hot(label, 10)
            rows["loss"].append(loss.item())
            rows["el2n"].append(error.norm().item())
            rows["grand"].append(math.sqrt(sum((g**2).sum().item() for g in grads)))
        for name, values in rows.items():
            found[name][checkpoint.seed].append(values)
    return {name: np.array(values) for name, values in found.items()}


def test_scores_equal_a_brute_force_loop_in_float64(digits: Path, tmp_path: Path) -> None:
    table = frame(run(digits, tmp_path / "s", "loss,el2n,grand,self_influence"))
    truth = brute_force(digits)
    for name in ("el2n", "grand"):
        by_seed = truth[name].mean(1)
        np.testing.assert_allclose(table[name], by_seed.mean(0), rtol=1e-4, atol=1e-6)
        spread = by_seed.std(0, ddof=1)
        np.testing.assert_allclose(table[f"{name}_std"], spread, rtol=1e-3, atol=1e-5)
    checkpoints = find_checkpoints(str(digits / "checkpoints"))
    rates = np.array([c.lr or 0.0 for c in checkpoints]).reshape(2, 3)
    weights = rates / rates.sum(1, keepdims=True)
    influence = (weights[:, :, None] * truth["grand"] ** 2).sum(1).mean(0)
    np.testing.assert_allclose(table["self_influence"], influence, rtol=1e-4, atol=1e-6)


def test_rows_stand_in_corpus_order_with_their_id_and_label(digits: Path, tmp_path: Path) -> None:
    scores = run(digits, tmp_path / "s", "loss", unit_rows=70)
    table = frame(scores)
    assert scores.success["units"] == len(scores.parts) == 6  # 3 + 2 + 1
    assert table["shard"].tolist() == [i for i, n in enumerate(SHARDS) for _ in range(n)]
    assert table["row"].tolist() == [i for n in SHARDS for i in range(n)]
    assert table["id"].tolist() == [f"row-{i}" for i in range(300)]
    assert table["label"].tolist() == load_digits().target[:300].tolist()
    assert not any(table["error"])


def test_the_mean_over_seeds_is_the_arithmetic_mean_of_single_runs(
    digits: Path, tmp_path: Path
) -> None:
    last = [str(p) for p in sorted((digits / "checkpoints").glob("seed*-epoch002"))]
    alone = [
        frame(run(digits, tmp_path / f"s{i}", "loss,el2n", checkpoints=[path]))
        for i, path in enumerate(last)
    ]
    both = frame(run(digits, tmp_path / "both", "loss,el2n", checkpoints=last))
    for name in ("loss", "el2n"):
        runs = np.stack([a[name].astype(np.float64) for a in alone])
        assert both[name].tobytes() == runs.mean(0).astype(np.float32).tobytes()
        assert both[f"{name}_std"].tobytes() == runs.std(0, ddof=1).astype(np.float32).tobytes()


def test_unit_and_batch_sizes_change_no_row(digits: Path, tmp_path: Path) -> None:
    usual = frame(run(digits, tmp_path / "a"))
    for i, settings in enumerate(
        [{"unit_rows": 1}, {"unit_rows": 41}, {"batch_rows": 1}, {"batch_rows": 7, "unit_rows": 90}]
    ):
        other = frame(run(digits, tmp_path / f"b{i}", **settings))
        for name in ("shard", "row", "id", "label"):
            assert (other[name] == usual[name]).all()
        for name in ("loss", "el2n", "grand"):
            np.testing.assert_allclose(other[name], usual[name], rtol=1e-4, atol=1e-6)


def test_the_same_command_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "a", unit_rows=100)
    run(digits, tmp_path / "b", unit_rows=100)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_swapped_weights_give_the_same_bytes_as_resident_models(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(digits, tmp_path / "resident")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.RESIDENT_BYTES", 0)
    run(digits, tmp_path / "cached")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.CACHED_BYTES", 0)
    run(digits, tmp_path / "read")
    assert files(tmp_path / "resident") == files(tmp_path / "cached") == files(tmp_path / "read")


def test_a_finished_run_is_not_run_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(digits, tmp_path / "s")
    before = {p.name: p.stat() for p in (tmp_path / "s").iterdir() if p.is_file()}
    monkeypatch.setattr("curate.pipeline.scoring.score._run", lambda *_: pytest.fail("it ran"))
    again = run(digits, tmp_path / "s")
    assert again.success == first.success
    for name, stat in before.items():
        now = (tmp_path / "s" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_committed_part_is_never_scored_again(
    digits: Path, tmp_path: Path, kept_ledger: None
) -> None:
    run(digits, tmp_path / "whole", unit_rows=60)
    run(digits, tmp_path / "s", unit_rows=60)
    for name in ("_SUCCESS.json", "errors.parquet", "part-00001.parquet", "part-00003.parquet"):
        (tmp_path / "s" / name).unlink()
    before = {p.name: p.stat().st_ino for p in (tmp_path / "s").glob("part-*")}
    tries = {p.name for p in (tmp_path / "s" / "attempts").glob("0*")}
    run(digits, tmp_path / "s", unit_rows=60)
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert {n: (tmp_path / "s" / n).stat().st_ino for n in before} == before
    now = {p.name for p in (tmp_path / "s" / "attempts").glob("0*")}
    assert now - tries == {"00001-001.json", "00003-001.json"}


def test_every_checkpoint_has_its_value(digits: Path, tmp_path: Path) -> None:
    table = run(digits, tmp_path / "s", "el2n,self_influence,aum", keep_checkpoints=True)
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    truth = brute_force(digits)
    values = np.array(whole.column("el2n_by_checkpoint").to_pylist())
    np.testing.assert_allclose(values.T.reshape(2, 3, 300), truth["el2n"], rtol=1e-4, atol=1e-6)
    values = np.array(whole.column("self_influence_by_checkpoint").to_pylist())
    squares = truth["grand"] ** 2
    np.testing.assert_allclose(values.T.reshape(2, 3, 300), squares, rtol=1e-4, atol=1e-6)
    assert "aum_by_checkpoint" not in whole.schema.names  # one value per run


def test_training_records_become_scores_without_a_model(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "curate.pipeline.scoring.signal_pass.load_model", lambda *_: pytest.fail("loaded")
    )
    table = frame(run(digits, tmp_path / "s", "forgetting,aum", unit_rows=70))
    records = [
        read_records(digits / "checkpoints" / "records.parquet", shard, 0, rows)
        for shard, rows in enumerate(SHARDS)
    ]
    for name in ("forgetting", "aum"):
        seeds = [np.concatenate([r[seed][name] for r in records]) for seed in (0, 1)]
        mean = np.stack(seeds).astype(np.float64).mean(0)
        assert table[name].tobytes() == mean.astype(np.float32).tobytes()
    assert table["label"].tolist() == load_digits().target[:300].tolist()


def test_grand_at_step_zero_warns_and_tells_its_rank_correlation(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = [str(p) for p in sorted((digits / "checkpoints").glob("seed*-epoch000"))]
    with caplog.at_level(logging.WARNING, "curate.score"):
        table = run(digits, tmp_path / "s", "grand,el2n", checkpoints=start)
    assert "Kirsch 2023" in caplog.text
    norms = np.linalg.norm(load_digits().data[:300] / 16, axis=1)
    values = frame(table)["grand"]
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (norms, values)]
    rho = np.corrcoef(ranks)[0, 1]  # no ties among 300 norms and scores, so this is Spearman's
    assert table.success["notes"]["input_norm_correlation"] == {
        "grand": pytest.approx(rho, abs=2e-3)
    }
    assert f"rank correlation with the input norm is {rho:.2f} over 300 rows" in caplog.text


def test_grand_after_training_does_not_warn(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = str(digits / "checkpoints" / "seed0-epoch002")
    run(digits, tmp_path / "s", "grand", checkpoints=last)
    assert "Kirsch" not in caplog.text


def test_dry_run_says_what_would_run_and_writes_nothing(digits: Path, tmp_path: Path) -> None:
    plan = score(
        str(digits / "corpus"),
        checkpoints=str(digits / "checkpoints"),
        scorers="el2n,grand",
        out=str(tmp_path / "s"),
        unit_rows=60,
        dry_run=True,
    )
    assert isinstance(plan, ScorePlan)
    assert (plan.rows, plan.rows_done, plan.units, plan.checkpoints) == (300, 0, 6, 6)
    assert plan.engine == "local" and plan.seconds > 0 and plan.tokens is None
    assert not (tmp_path / "s").exists()


def test_scores_can_be_written_to_an_object_store(digits: Path, tmp_path: Path) -> None:
    out = f"memory://scores-{tmp_path.name}"
    table = score(
        str(digits / "corpus"),
        checkpoints=str(digits / "checkpoints"),
        scorers="loss,el2n,grand",
        out=out,
        unit_rows=100,
        progress=False,
    )
    run(digits, tmp_path / "local", unit_rows=100)
    local = files(tmp_path / "local")
    for name in table.folder.names():
        assert table.folder.read(name) == local[name], name
    assert set(table.folder.names()) == set(local)


def test_the_rate_counts_only_what_this_process_scored() -> None:
    now = [0.0]
    progress = Progress(1000, 600, show=False, clock=lambda: now[0])
    assert progress.seconds_left is None
    now[0] = 10.0
    progress.add(100)
    assert progress.rate == 10.0 and progress.seconds_left == 30.0
    assert progress.line() == "scored 700 of 1,000 rows, 10 rows/s, 30 s left"
    progress.add(-50)
    assert progress.done == 650
    assert [duration(s) for s in (59.4, 60, 3599, 7500)] == [
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_points_of_a_user_task_are_scored(
    make_points: Callable[..., str], points_checkpoints: Callable[..., str], tmp_path: Path
) -> None:
    corpus, checkpoints = make_points([20, 13]), points_checkpoints(seeds=1, steps=(0, 5))
    table = score(
        corpus, checkpoints=checkpoints, scorers="loss", out=str(tmp_path / "s"), progress=False
    )
    first, second = (load_model(c) for c in find_checkpoints(checkpoints))
    rows = pa.concat_tables([pq.read_table(f"{corpus}/s{i}.parquet") for i in (0, 1)])
    x, y = torch.tensor(rows["x"].to_pylist()), torch.tensor(rows["label"].to_pylist())
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(m(x), y, reduction="none") for m in (first, second)
        ]
    np.testing.assert_allclose(frame(table)["loss"], torch.stack(losses).mean(0), rtol=1e-5)
