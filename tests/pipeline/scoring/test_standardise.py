"""Scores standardised by class or over the data set, as a last step that survives a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curate.pipeline.reporting.status import scores_status
from curate.pipeline.scoring import standardise
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.storing.storage import Folder

Make = Callable[..., str]
SCORERS = "raw=vog,by_class=vog(normalise=class),overall=vog(variant=var,normalise=dataset),el2n"
ROWS = (30, 17)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job(make_points: Make, points_checkpoints: Make) -> tuple[str, str]:
    return make_points(ROWS, labels={5: 7}), points_checkpoints(seeds=2, steps=(1, 4, 9))


def run(job: tuple[str, str], out: Path, scorers: str = SCORERS, **settings: Any) -> ScoreTable:
    table = score(
        job[0], checkpoints=job[1], scorers=scorers, out=str(out), progress=False,
        unit_rows=10, **settings,
    )  # fmt: skip
    assert isinstance(table, ScoreTable)
    return table


def frame(table: ScoreTable) -> dict[str, np.ndarray]:
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    return {n: whole.column(n).to_numpy(zero_copy_only=False) for n in whole.schema.names}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_values_are_the_raw_ones_less_their_mean_by_their_deviation(
    job: tuple[str, str], tmp_path: Path
) -> None:
    table = run(job, tmp_path / "s")
    found, plain = frame(table), frame(run(job, tmp_path / "p", "vog,var=vog(variant=var),el2n"))
    good = np.arange(sum(ROWS)) != 5
    assert found["error"][5] is not None and np.isnan(found["by_class"][5])
    assert (found["raw"][good] == plain["vog"][good]).all()
    assert (found["el2n"][good] == plain["el2n"][good]).all()
    assert (found["label"] == plain["label"]).all() and (found["row"] == plain["row"]).all()
    for label in (0, 1, 2):
        rows = good & (found["label"] == label)
        raw = plain["vog"][rows].astype(float)
        want = (raw - raw.mean()) / raw.std()
        np.testing.assert_allclose(found["by_class"][rows], want, rtol=1e-5, atol=1e-6)
        assert abs(found["by_class"][rows].astype(float).mean()) < 1e-6
        assert found["by_class"][rows].astype(float).std() == pytest.approx(1, abs=1e-6)
        spread = plain["vog_std"][rows] / raw.std()
        np.testing.assert_allclose(found["by_class_std"][rows], spread, rtol=1e-5)
        told = table.success["notes"]["standardised"]["by_class"]["of"][str(label)]
        assert told == {
            "rows": rows.sum(),
            "mean": pytest.approx(raw.mean()),
            "sd": pytest.approx(raw.std()),
        }
    raw = plain["var"][good].astype(float)
    want = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(found["overall"][good], want, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "s" / "raw").exists()


def test_a_run_that_is_killed_at_the_last_step_goes_on_to_the_same_bytes(
    job: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job, tmp_path / "whole")
    write, written = standardise.write_part, list[int]()

    def killed(folder: Folder, unit: int, *rest: Any) -> bool:
        if unit == 2:
            raise KeyboardInterrupt
        return write(folder, unit, *rest)

    def noted(folder: Folder, unit: int, *rest: Any) -> bool:
        written.append(unit)
        return write(folder, unit, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(standardise, "write_part", killed)
        run(job, tmp_path / "s")
    assert len(list((tmp_path / "s").glob("part-*"))) == 2
    status = scores_status(Folder(str(tmp_path / "s")))
    assert (status["units_done"], status["finished"]) == (5, False)
    with monkeypatch.context() as patch:
        patch.setattr(standardise, "write_part", noted)
        patch.setattr("curate.pipeline.scoring.score._check_model", lambda *_: pytest.fail("ran"))
        run(job, tmp_path / "s")
    assert written == [2, 3, 4]
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_a_run_that_is_killed_among_its_units_scores_the_others_only(
    job: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(job, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "curate.pipeline.scoring.score.standardise",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        run(job, tmp_path / "s")
    (tmp_path / "s" / "raw" / "part-00003.parquet").unlink()
    before = {p.name: p.stat().st_ino for p in (tmp_path / "s" / "raw").glob("part-*")}
    kept: dict[str, int] = {}

    def looked(folder: Folder) -> None:
        kept.update({p.name: p.stat().st_ino for p in (tmp_path / "s" / "raw").glob("part-*")})
        standardise.forget_raw(folder)

    monkeypatch.setattr("curate.pipeline.scoring.score.forget_raw", looked)
    run(job, tmp_path / "s")
    assert {n: kept[n] for n in before} == before and len(kept) == 5
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_values_that_are_all_alike_become_0(
    make_points: Make, points_checkpoints: Make, tmp_path: Path
) -> None:
    """One checkpoint: every value is 0. A class of one row has no deviation either."""
    labels = dict.fromkeys(range(20), 0) | {3: 1}
    corpus = make_points([20], labels=labels)
    one = frame(run((corpus, points_checkpoints(name="one")), tmp_path / "a"))
    assert not one["by_class"].any() and not one["overall"].any()
    several = frame(run((corpus, points_checkpoints(steps=(1, 4))), tmp_path / "b"))
    assert several["by_class"][3] == 0.0 and several["by_class"].any()


def test_rounding_is_no_deviation(job: tuple[str, str], tmp_path: Path) -> None:
    """As of a linear model, whose values depend on the label alone."""
    table = run(job, tmp_path / "s")
    path = tmp_path / "s" / table.parts[0]
    near = np.float32(0.3) * (1 + np.arange(10, dtype=np.float32) % 3 * np.float32(1.2e-7))
    rows = pq.read_table(path)
    near_table = rows.set_column(rows.schema.names.index("by_class"), "by_class", pa.array(near))

    class Work:
        standardised, label = {"by_class": "class"}, "label"

    groups = standardise._Groups(Work, "by_class")  # type: ignore[arg-type]
    for batch in near_table.to_batches():
        groups.add(batch)
    assert not groups.applied(near_table, with_std=False)["by_class"].to_numpy().any()


@pytest.mark.parametrize(("settings", "message"), [({"keep": []}, "name label in --keep")])
def test_labels_that_are_not_kept_are_asked_for(
    job: tuple[str, str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(job, tmp_path / "s", **settings)


def test_documents_have_no_classes(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"tokens": [[1, 2, 3], [2, 1]]}), tmp_path / "c" / "0.parquet")
    from curate.pipeline.training.train import train

    train(str(tmp_path / "c"), model="gpt", epochs=1, out=str(tmp_path / "k"), progress=False)
    with pytest.raises(ValueError, match="causal_lm has no classes: use normalise=dataset"):
        run((str(tmp_path / "c"), str(tmp_path / "k")), tmp_path / "s", "vog(normalise=class)")
