"""Scores with a curvature through `score`: values by brute force, cost, and what changes no byte.

Shapes: N rows of the corpus, n of the sample, M groups of the target.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.models.checkpoint import find_checkpoints, load_model
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring import curvature_factors, target_gradients
from curate.pipeline.scoring.corpus_sample import evenly_spaced
from curate.pipeline.scoring.curvature_factors import CurvatureFactors
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.scorers.readouts import TwoSidedSketch

Make = Callable[..., str]
REQUESTS = (
    "influence(labels=data,rows=11,groups=max),mean=influence(labels=data,rows=11,damping=0.01),"
    "kfac=self_influence(curvature=kfac,labels=data),"
    "diagonal=self_influence(curvature=diagonal,labels=data,damping=0.01),"
    "self_influence"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def settings(make_points: Make, points_checkpoints: Make) -> dict[str, Any]:
    return {
        "corpus": make_points([50, 40, 30]),
        "target": make_points([17, 8], name="target"),
        "checkpoints": points_checkpoints(steps=(1, 2)),
        "scorers": "influence,si=self_influence(curvature=ekfac,damping=0.01),"
        "kfac=self_influence(curvature=kfac,rows=50),diagonal=self_influence(curvature=diagonal)",
        "batch_rows": 16,
        "unit_rows": 30,
        "progress": False,
    }


def whole(out: Path) -> pa.Table:
    table = ScoreTable.open(out)
    return pa.Table.from_batches(list(table.scan()), table.schema)


def files(folder: Path) -> dict[str, bytes]:
    found = [*folder.iterdir(), *(folder / "curvature").iterdir()]
    return {p.name: p.read_bytes() for p in found if p.is_file() and p.name != "_lock.json"}


# -- values


def points(folder: str) -> tuple[Tensor, Tensor]:
    corpus = open_corpus(folder)
    reads = [pa.Table.from_batches([b]) for s in range(len(corpus.shards)) for b in corpus.read(s)]
    table = pa.concat_tables(reads)
    return torch.tensor(table["x"].to_pylist()).double(), torch.tensor(table["label"].to_pylist())


def layer_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return inputs with 1 appended, output gradients, and their products of both linear layers,
    by the chain rule written out."""
    first, _, last = model.double().children()
    hidden = torch.tanh(first(x)).detach()
    error = (last(hidden).softmax(1) - nn.functional.one_hot(y, 3)).detach()
    below = (error @ last.weight * (1 - hidden**2)).detach()
    pairs = [(nn.functional.pad(a, (0, 1), value=1.0), d) for a, d in ((x, below), (hidden, error))]
    return [(a, d, d[:, :, None] * a[:, None]) for a, d in pairs]


def expected(settings: dict[str, Any], kind: str, damping: float | None, rows: int) -> Any:
    """Return self-influences [N] and influences [N, M], summed over the checkpoints of a run."""
    own, cross = 0.0, 0.0
    x, y = points(settings["corpus"])
    tx, ty = points(settings["target"])
    sample = torch.arange(rows) * len(x) // rows
    checkpoints = find_checkpoints(settings["checkpoints"])
    rates = np.array([c.lr for c in checkpoints])
    for checkpoint, weight in zip(checkpoints, rates / rates.sum(), strict=True):
        model = load_model(checkpoint)
        on, mine, theirs = (
            layer_gradients(model, *some) for some in ((x[sample], y[sample]), (x, y), (tx, ty))
        )
        for (a, d, g), (_, _, all_g), (_, _, target_g) in zip(on, mine, theirs, strict=True):
            on_a, right = torch.linalg.eigh(a.T @ a / rows)
            on_s, left = torch.linalg.eigh(d.T @ d / rows)
            if kind == "diagonal":
                left, right = torch.eye(len(left)).double(), torch.eye(len(right)).double()
            groups = torch.stack([target_g[ty == c].mean(0) for c in ty.unique()])
            g, all_g, groups = (left.T @ v @ right for v in (g, all_g, groups))
            scale = on_s[:, None] * on_a if kind == "kfac" else g.square().mean(0)
            scale = scale + (0.1 * scale.mean() if damping is None else damping)
            own = own + weight * (all_g**2 / scale).sum((1, 2))
            cross = cross + weight * torch.einsum("noi,moi->nm", all_g / scale, groups)
    return own, cross


def test_scores_equal_brute_force(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["score", settings["corpus"], "--checkpoints", settings["checkpoints"]]
    arguments += ["--target", settings["target"], "--scorer", REQUESTS]
    arguments += ["--batch-rows", "16", "--unit-rows", "30", "-o", str(tmp_path / "s")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    found = whole(tmp_path / "s")
    values = {
        "influence": expected(settings, "ekfac", None, 11)[1].amax(1),
        "mean": expected(settings, "ekfac", 0.01, 11)[1].mean(1),
        "kfac": expected(settings, "kfac", None, 120)[0],
        "diagonal": expected(settings, "diagonal", 0.01, 120)[0],
    }
    for name, value in values.items():
        # float32 passes against float64; damping keeps the division from enlarging it much.
        np.testing.assert_allclose(
            found[name].to_numpy(), value.detach().numpy(), rtol=2e-4, atol=2e-4, err_msg=name
        )
    assert found["error"].null_count == 120
    success = json.loads((tmp_path / "s" / "_SUCCESS.json").read_text())
    notes = success["notes"]["curvature"]
    assert sorted(note["rows"] for note in notes.values()) == [11, 11, 120, 120, 120, 120]
    assert {note["labels"] for note in notes.values()} == {"data"}
    assert verify(tmp_path / "s")["problems"] == []


def test_one_row_per_group_gives_pairwise_scores(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    ids = [f"t{i}" for i in range(5)]
    settings: dict[str, Any] = {
        "corpus": make_points([30]), "checkpoints": points_checkpoints(steps=(1, 2)),
        "target": make_points([5], name="target", extra={"id": ids}),
    }  # fmt: skip
    score(
        **settings, target_group="id", scorers="influence(labels=data,damping=0.01)",
        keep_groups=True, progress=False, out=tmp_path / "s",
    )  # fmt: skip
    found = np.array(whole(tmp_path / "s")["influence_by_group"].to_pylist())
    x, y = points(settings["target"])
    assert found.shape == (30, 5)
    for m in range(5):  # each alone as the whole target
        alone = dict(settings, target=str(tmp_path / f"alone{m}"))
        Path(alone["target"]).mkdir()
        table = pa.table({"x": [x[m].float().tolist()], "label": [int(y[m])]})
        pa.parquet.write_table(table, Path(alone["target"]) / "one.parquet")
        _, cross = expected(alone, "ekfac", 0.01, 30)
        np.testing.assert_allclose(found[:, m], cross[:, 0].detach(), rtol=2e-4, atol=2e-4)


# -- cost


def test_the_scoring_pass_takes_one_forward_and_one_backward_per_batch_and_checkpoint(
    settings: dict[str, Any], tmp_path: Path, passes_seen: list[tuple[int, int, int]]
) -> None:
    more = ",el2n,grand,grad_similarity,tracin=influence(curvature=none)"
    asked = settings | {"scorers": settings["scorers"] + more, "unit_rows": 120}
    score(**asked, out=tmp_path / "s")
    batches = -(-120 // 16)
    assert passes_seen == [(batches, 2 * batches, 2 * batches)]


def test_factors_are_made_once_per_checkpoint_and_shared_between_dampings(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], CurvatureFactors._made
    monkeypatch.setattr(
        CurvatureFactors, "_made", lambda self, *rest: made.append(1) or make(self, *rest)
    )
    score(**settings, out=tmp_path / "s")
    assert len(made) == 2 * 3  # ekfac is asked for twice
    assert len(list((tmp_path / "s" / "curvature").iterdir())) == 6
    (tmp_path / "s" / "_SUCCESS.json").unlink()
    (tmp_path / "s" / "part-00001.parquet").unlink()
    score(**settings, out=tmp_path / "s")
    assert len(made) == 6


def test_a_dry_run_estimates_from_few_rows_and_writes_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(curvature_factors, "TRIAL_ROWS", 5)
    with caplog.at_level("INFO"):
        score(**settings, out=tmp_path / "s", dry_run=True)
    assert "from 5 rows" in caplog.text
    assert not (tmp_path / "s" / "curvature").exists()


# -- what must not change a byte


@pytest.mark.slow
def test_swapped_weights_and_reread_factors_give_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, out=tmp_path / "resident")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.RESIDENT_BYTES", 0)
    score(**settings, out=tmp_path / "cached")
    monkeypatch.setattr("curate.pipeline.scoring.signal_pass.CACHED_BYTES", 0)
    monkeypatch.setattr("curate.pipeline.scoring.curvature_factors.MOST_BYTES", 0)
    score(**settings, out=tmp_path / "read")
    assert files(tmp_path / "resident") == files(tmp_path / "cached") == files(tmp_path / "read")


@pytest.mark.parametrize(
    "when", ["between", *(pytest.param(w, marks=pytest.mark.slow) for w in ("first", "scoring"))]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    score(**settings, out=tmp_path / "whole")
    calls = Counter[str]()
    make, call = CurvatureFactors._made, SignalPass.__call__

    def making(self: Any, *rest: Any) -> Any:
        calls["made"] += 1
        found = make(self, *rest)
        if when == "first" or (when == "between" and calls["made"] == 4):
            raise KeyboardInterrupt
        return found

    def scoring(self: Any, *rest: Any) -> Any:
        calls["scored"] += 1
        if calls["scored"] == 2:
            raise KeyboardInterrupt
        return call(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(CurvatureFactors, "_made", making)
        if when == "scoring":
            patched.setattr(SignalPass, "__call__", scoring)
        with pytest.raises(KeyboardInterrupt):
            score(**settings, out=tmp_path / "cut")
    score(**settings, out=tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.slow
def test_ray_workers_give_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, ray_session: None
) -> None:
    score(**settings, out=tmp_path / "here")
    score(**settings, engine="ray", workers=2, out=tmp_path / "ray")
    assert files(tmp_path / "here") == files(tmp_path / "ray")


# -- rows and files at fault


def test_rows_that_cannot_be_scored_are_left_out_of_the_estimate_and_counted(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One is refused when encoded, one makes the model fail, one has a loss that is not finite."""
    checkpoints = points_checkpoints()
    spells = {3: 661.0, 40: 662.0, 50: float("nan")}
    scorers = "si=self_influence(curvature=ekfac,damping=0.01,labels=data)"
    score(make_points([60], first=spells, name="bad"), checkpoints=checkpoints, scorers=scorers,
          progress=False, out=tmp_path / "s")  # fmt: skip
    found = whole(tmp_path / "s")
    assert [i for i, e in enumerate(found["error"].to_pylist()) if e] == [3, 40, 50]
    notes = json.loads((tmp_path / "s" / "_SUCCESS.json").read_text())["notes"]["curvature"]
    assert [(n["rows"], n["refused"]) for n in notes.values()] == [(57, 3)]
    assert "without 3 rows that cannot be scored, the first is row 3: x is refused" in caplog.text
    good = make_points([60], name="good")
    kept = [i for i in range(60) if i not in spells]
    x, y = points(good)
    (checkpoint,) = find_checkpoints(checkpoints)
    total = 0.0
    for a, d, g in layer_gradients(load_model(checkpoint), x[kept], y[kept]):
        _, right = torch.linalg.eigh(a.T @ a)
        _, left = torch.linalg.eigh(d.T @ d)
        turned = left.T @ g @ right
        total = total + (turned**2 / (turned.square().mean(0) + 0.01)).sum((1, 2))
    np.testing.assert_allclose(found["si"].to_numpy()[kept], total.detach(), rtol=2e-4, atol=1e-5)


def test_where_no_row_can_be_used_the_first_says_why(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    """Row 0 is the whole sample."""
    corpus = make_points([60], first={0: 661.0})
    with pytest.raises(ValueError, match="for the curvature; row 0 says: x is refused"):
        score(corpus, checkpoints=points_checkpoints(), progress=False, out=tmp_path / "s",
              scorers="self_influence(curvature=diagonal,rows=1)")  # fmt: skip


@pytest.mark.slow
def test_a_batch_that_does_not_fit_in_memory_is_taken_in_halves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, out=tmp_path / "whole")
    add = curvature_factors.CurvatureEstimate.add

    def small(self: Any, batch: Any, numbers: Any) -> Any:
        if batch.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add(self, batch, numbers)

    monkeypatch.setattr(curvature_factors.CurvatureEstimate, "add", small)
    monkeypatch.setattr(curvature_factors.gc, "collect", lambda: 0)  # slow
    score(**settings, out=tmp_path / "split")
    split, plain = (whole(tmp_path / n) for n in ("split", "whole"))
    for name in ("influence", "si", "kfac", "diagonal"):
        np.testing.assert_allclose(
            split[name].to_numpy(), plain[name].to_numpy(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("how", ["changed", pytest.param("cut short", marks=pytest.mark.slow)])
def test_damaged_factors_are_refused_by_name(
    settings: dict[str, Any], tmp_path: Path, how: str
) -> None:
    out = tmp_path / "s"
    score(**settings, out=out)
    (out / "_SUCCESS.json").unlink()
    (out / "part-00000.parquet").unlink()
    name = min((out / "curvature").iterdir())
    content = bytearray(name.read_bytes())
    content[-3] ^= 1
    name.write_bytes(bytes(content[: len(content) // 2] if how == "cut short" else content))
    with pytest.raises(ValueError, match=r"curvature/seed0-.* is damaged: delete it"):
        score(**settings, out=out)
    name.unlink()
    score(**settings, out=out)


@pytest.mark.slow
def test_other_settings_are_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    score(**settings, out=tmp_path / "s")
    other = settings | {"scorers": settings["scorers"].replace("0.01", "0.02")}
    with pytest.raises(ValueError, match="scorers"):
        score(**other, out=tmp_path / "s")
    score(**other, out=tmp_path / "s", overwrite=True)


def test_a_curvature_needs_the_targets_gradients_themselves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_gradients, "MOST_BYTES", 700)
    monkeypatch.setattr(target_gradients, "SKETCH", TwoSidedSketch(0, (2, 2)))
    with pytest.raises(ValueError, match="needs the target's gradients themselves"):
        score(**settings, out=tmp_path / "s")


def test_a_sample_is_evenly_spaced() -> None:
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 100).tolist() == [0, 1, 2]
    assert evenly_spaced(7, 1).tolist() == [0]
    many = evenly_spaced(10_000_001, 100_000)
    assert len(many) == 100_000
    assert set(np.diff(many).tolist()) <= {100, 101}
