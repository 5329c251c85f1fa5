"""gwa's aggregate: against scipy, merged exactly, whoever scored what; what stands in its notes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.scoring.aggregate import Moments, part_moments
from curate.pipeline.scoring.score import score
from curate.pipeline.training.train import train


def merged(values: np.ndarray, cuts: list[int]) -> Moments:
    total = Moments()
    for part in np.split(values, cuts):
        total += Moments.of(part)
    return total


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9999), st.integers(2, 200), st.lists(st.integers(0, 200), max_size=6))
def test_merged_moments_are_scipy_s(seed: int, rows: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    values = 0.3 + rng.standard_t(3, rows)
    found = merged(values, sorted(min(c, rows) for c in cuts))
    assert found.count == rows
    assert found.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
    kurtosis = scipy.stats.kurtosis(values)  # Fisher, biased
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-8, abs=1e-8)
    want = values.mean() / (kurtosis + 1.2)
    if kurtosis + 1.2 > 1e-3:
        assert found.gwa()["gwa"] == pytest.approx(want, rel=1e-4, abs=1e-8)
    elif kurtosis + 1.2 < 0:
        assert found.gwa()["gwa"] is None


def test_two_points_have_the_least_kurtosis_and_no_quotient() -> None:
    found = Moments.of(np.array([0.4, -0.2] * 10)).gwa()
    assert found["kurtosis"] == pytest.approx(-2) and found["denominator"] == pytest.approx(-0.8)
    assert found["gwa"] is None and found["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("values", [[], [0.3], [0.3] * 7, [np.nan, 0.3]])
def test_values_that_are_all_alike_have_no_kurtosis(values: list[float]) -> None:
    found = Moments.of(np.array(values)).gwa()
    assert found["kurtosis"] is None and found["gwa"] is None
    assert found["rows"] == sum(np.isfinite(values))


def test_a_receipt_holds_one_list_per_checkpoint() -> None:
    columns = {"gwa": np.array([[1.0, 0.0], [3.0, np.nan]], np.float32)}
    assert part_moments(columns) == {"gwa": [[2, 2.0, 2.0, 0.0, 2.0], [1, 0.0, 0.0, 0.0, 0.0]]}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gwa")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    table = pa.table({**{f"x{i}": x[:, i] for i in range(4)}, "label": (x[:, 0] > 0).astype(int)})
    (root / "data").mkdir()
    for i in range(2):
        pq.write_table(table.slice(30 * i, 30), root / "data" / f"{i}.parquet")
    train(
        str(root / "data"), model="mlp", model_options={"hidden": [8]}, epochs=3, seeds=[0, 1],
        save_epochs=[1, 3], task="tabular_classification", out=str(root / "checkpoints"), threads=1,
    )  # fmt: skip
    return root


def test_the_notes_are_those_of_the_columns(job: Path) -> None:
    notes = []
    for unit, keeps in ((7, True), (60, False)):
        table = score(
            job / "data", checkpoints=str(job / "checkpoints"), scorers="mine=gwa,loss",
            keep_checkpoints=keeps, unit_rows=unit, out=job / f"s{unit}", progress=False,
        )  # fmt: skip
        notes.append(table.notes["aggregates"]["mine"])
        if keeps:
            (column,) = pa.Table.from_batches(table.scan(["mine_by_checkpoint"])).columns
            values = np.array(column.to_pylist())
        else:
            assert "mine_by_checkpoint" not in table.schema.names
    names = ["seed0-epoch001", "seed0-epoch003", "seed1-epoch001", "seed1-epoch003"]
    assert [line["checkpoint"] for line in notes[0]] == names
    for k in range(4):
        kurtosis = scipy.stats.kurtosis(values[:, k])
        for lines in notes:  # γ in float32, one unit or nine
            assert lines[k]["kurtosis"] == pytest.approx(kurtosis, rel=1e-5)
            if kurtosis > -1.2:
                want = values[:, k].mean() / (kurtosis + 1.2)
                assert lines[k]["gwa"] == pytest.approx(want, rel=1e-4)


def test_it_is_printed_and_does_not_depend_on_what_was_killed(
    job: Path,
) -> None:
    settings = {"checkpoints": str(job / "checkpoints"), "scorers": "gwa", "unit_rows": 9}
    whole = score(job / "data", **settings, out=job / "whole", progress=False)
    (job / "whole" / "_SUCCESS.json").unlink()
    for name in ("part-00001.parquet", "part-00003.parquet"):
        (job / "whole" / name).unlink()
    again = score(job / "data", **settings, out=job / "whole", progress=False)
    assert again.success == whole.success
    shown = CliRunner().invoke(cli.app, ["inspect", str(job / "whole"), "--json"])
    lines = json.loads(shown.stdout)["aggregates"]
    assert [line["score"] for line in lines] == ["gwa"] * 4
    assert lines[0]["gwa"] == whole.notes["aggregates"]["gwa"][0]["gwa"]
