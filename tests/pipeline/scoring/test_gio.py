"""`gio` from the command line: the column, the selection, kills in the last step, the report."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.reporting.report import write_report
from curate.pipeline.reporting.verify import verify
from curate.pipeline.scoring import standardise
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable

pytest.importorskip("faiss")
SETTINGS = "clusters=12,target_clusters=0,k=3,uniform_start_size=8,grad_desc_iter=10"
ROWS = 60


def near(rows: int, seed: int, centers: np.ndarray) -> list[np.ndarray]:
    """Vectors around the first center for every third row, else around the second."""
    draw = np.random.default_rng(seed)
    of = (np.arange(rows) % 3 > 0).astype(int)
    return list((centers[of] + 0.1 * draw.normal(size=(rows, 4))).astype(np.float32))


def more(rows: int, seed: int, centers: np.ndarray) -> dict[str, list[object]]:
    return {"e": near(rows, seed, centers), "text": ["a b"] * rows}


@pytest.fixture
def corpora(make_points: Callable[..., str]) -> tuple[str, str]:
    """60 rows in two shards with vectors `e`, one row of a label that is none; 15 target rows."""
    centers = np.array([[1.0, 0, 0, 0], [-4, 4, 4, 4]])
    pool = make_points([40, 20], labels={5: 7}, extra=more(ROWS, 0, centers))
    aim = make_points([15], name="target", extra=more(15, 1, centers[[0, 0]]))
    return pool, aim


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def column(path: Path, name: str = "gio") -> np.ndarray:
    batches = list(ScoreTable.open(path).scan([name]))
    return np.concatenate([b.column(0).to_numpy(zero_copy_only=False) for b in batches])


def chosen(manifest: Path) -> dict[int, int]:
    """Return rank by place in the corpus."""
    found = {}
    for batch in Manifest.read(manifest).batches(["shard", "row", "rank"]):
        rows = zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True)
        found |= {shard * 40 + row: rank for shard, row, rank in rows}
    return found


@pytest.mark.parametrize("variant", ["official", "l-nn"])
def test_the_column_is_the_order_of_the_selection(
    corpora: tuple[str, str], points_checkpoints: Callable[..., str], tmp_path: Path, variant: str
) -> None:
    pool, aim = corpora
    scores, manifest = tmp_path / "run" / "scores", tmp_path / "run" / "manifest"
    said = f"gio({SETTINGS},variant={variant}),loss"
    checkpoints = points_checkpoints(seeds=2)
    asked = ["--checkpoints", checkpoints, "--scorer", said, "--target", aim, "-o", str(scores)]
    run("score", pool, *asked, "--unit-rows", "25", code=3)  # 3: a row has an error
    steps, table = column(scores), ScoreTable.open(scores)
    assert table.schema.field("gio").type == pa.float32()
    # Two seeds, but one search over the whole table: there is nothing to have a deviation.
    assert table.schema.names == ["shard", "row", "label", "gio", "loss", "loss_std", "error"]
    assert not np.isnan(column(scores, "loss_std")[[0, 59]]).any()
    assert np.isnan(steps[5]) and (steps >= 0).any()
    assert not np.isnan(column(scores, "loss")[[0, 59]]).any()
    report = table.success["notes"]["gio"]["gio"]
    assert report["accepted_clusters"] == len(set(steps[~np.isnan(steps)]))

    params = [word for text in SETTINGS.split(",") for word in ("--param", text)]
    named = ["--vectors", "embedding", "--target-vectors", "embedding"]
    run(
        *("select", str(scores), "--method", "gio", *named, *params),
        *("--param", f"variant={variant}", "-o", str(manifest)),
    )
    ranks = chosen(manifest)
    assert set(ranks) == set(np.flatnonzero(steps >= 0))
    in_order = sorted(ranks, key=lambda place: ranks[place])
    assert (np.diff(steps[in_order]) >= 0).all()

    params_said = Manifest.read(manifest).content["selection"]["params"]
    assert params_said["kl_trace"] == pytest.approx(report["kl_trace"])
    page = Path(write_report(tmp_path / "run")).read_text()
    assert "Closer to the target, step by step" in page
    assert ("(ours)" in page) == (variant == "l-nn")
    assert verify(str(scores))


def test_columns_of_the_corpus_need_no_model(corpora: tuple[str, str], tmp_path: Path) -> None:
    pool, aim = corpora
    scores = tmp_path / "scores"
    asked = f"near=gio(vectors=column:e,{SETTINGS})"
    texts = ["--task", "text_classification", "--task-option", "inputs=text"]
    run("score", pool, "--scorer", asked, "--target", aim, "-o", str(scores), *texts)
    steps = column(scores, "near")
    # Every third row lies where the target does.
    assert (np.flatnonzero(steps >= 0) % 3 == 0).all() and (steps >= 0).sum() > 5
    manifest = tmp_path / "manifest"
    run("select", str(scores), "--by", "near", "--budget", "6", "-o", str(manifest))
    kept = list(chosen(manifest))
    assert steps[kept].max() <= np.sort(steps[steps >= 0])[5]


def test_a_kill_in_the_last_step_leads_to_the_same_bytes(
    corpora: tuple[str, str],
    points_checkpoints: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, aim = corpora
    checkpoints = points_checkpoints()

    def once(name: str) -> ScoreTable:
        return score(
            pool,
            checkpoints=checkpoints,
            scorers=f"gio({SETTINGS}),vog(normalise=dataset)",
            target=aim,
            unit_rows=15,
            out=tmp_path / name,
            progress=False,
        )

    whole = once("whole")
    write, left = standardise.write_part, [2]

    def killed(*arguments: object) -> bool:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(standardise, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        once("cut")
    monkeypatch.undo()
    cut = once("cut")
    assert cut.success["parts"] == whole.success["parts"]
    assert cut.success["notes"] == whole.success["notes"]
    assert not (tmp_path / "cut" / "raw").exists()
    assert json.dumps(cut.success["notes"]["gio"])


def test_what_cannot_work_is_said_before_anything_runs(
    corpora: tuple[str, str], points_checkpoints: Callable[..., str], tmp_path: Path
) -> None:
    pool, aim = corpora
    checkpoints = points_checkpoints()
    for asked, target, words in (
        ("gio", None, "gio compares rows with a target"),
        ("gio(k=20)", aim, "needs a target of more than k=20 rows, not 15"),
        ("gio(variant=ours)", aim, "unknown variant 'ours'"),
        ("gio(clusters=many)", aim, "scorer 'gio'"),
        ("gio(base=owned)", aim, "--keep owned"),
        ("gio(vectors=hidden)", aim, "'hidden' names no vectors"),
        ("gio(vectors=column:nowhere)", aim, "nowhere"),
    ):
        out = tmp_path / "scores"
        with pytest.raises(ValueError, match=words):
            score(pool, checkpoints=checkpoints, scorers=asked, target=target, out=out)
        assert not (out / "part-00000.parquet").exists() and not (out / "raw").exists()


def test_the_scorers_fields_are_the_selectors() -> None:
    from dataclasses import fields

    from curate.scorers.gio import GIO
    from curate.selectors.gio import Gio

    ours = {f.name: f.default for f in fields(GIO)}
    for name in ("vectors", "target_vectors", "seed"):
        del ours[name]
    assert ours == {f.name: f.default for f in fields(Gio)}
