"""The demo's data and claims, and the demo itself in its quick form."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from curate.pipeline.demo import TRAIN_ROWS, check_claims, run_demo, write_digits
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.images import decode


def test_the_two_files_are_the_digits_split_in_two(tmp_path: Path) -> None:
    train, test = (pq.read_table(p) for p in write_digits(Folder(tmp_path)))
    digits = load_digits()
    assert (train.num_rows, test.num_rows) == (TRAIN_ROWS, len(digits.target) - TRAIN_ROWS)
    ids = train["id"].to_pylist() + test["id"].to_pylist()
    assert sorted(ids) == [f"digit-{i:04d}" for i in range(len(digits.target))]
    row = test.slice(11, 1).to_pylist()[0]
    index = int(row["id"].removeprefix("digit-"))
    assert row["label"] == digits.target[index]
    levels = decode(row["image"]["bytes"], "L")[0] * (16 / 255)
    np.testing.assert_allclose(levels, digits.images[index], atol=0.04)  # 8 bits for 17 levels


def test_the_split_is_stratified_fixed_and_left_alone(tmp_path: Path) -> None:
    first = [Path(p).read_bytes() for p in write_digits(Folder(tmp_path / "a"))]
    again = [Path(p).read_bytes() for p in write_digits(Folder(tmp_path / "b"))]
    assert first == again
    labels = pq.read_table(tmp_path / "a" / "train.parquet")["label"].to_numpy()
    assert np.ptp(np.bincount(labels)) <= 7  # as in the whole: 174 to 183 of each
    (tmp_path / "a" / "train.parquet").write_bytes(b"mine")
    write_digits(Folder(tmp_path / "a"))
    assert (tmp_path / "a" / "train.parquet").read_bytes() == b"mine"


def evaluation(full: float, hard: float, random: float, easy: float) -> dict[str, Any]:
    noise = [0.0, 0.001, -0.001, 0.002, -0.002]
    values = {"full": full, "manifest-hardest-50": hard, "random-650": random,
              "manifest-easiest-50": easy}  # fmt: skip
    return {
        "rows": [
            {"name": n, "kept": 650, "values": [v + noise[(i + k) % 5] for i in range(5)]}
            for k, (n, v) in enumerate(values.items())
        ]
    }


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [
        ((0.96, 0.97, 0.94, 0.80), [True, True, True]),
        ((0.96, 0.96, 0.94, 0.80), [True, True, True]),  # a match need not be a win
        ((0.97, 0.93, 0.95, 0.96), [False, False, False]),
        ((0.95, 0.95, 0.95, 0.95), [True, False, False]),  # no difference is no win
    ],
)
def test_claims_follow_the_intervals(
    accuracies: tuple[float, float, float, float], holds: list[bool]
) -> None:
    assert [c["holds"] for c in check_claims(evaluation(*accuracies))] == holds


@pytest.mark.slow
def test_the_quick_demo_runs_whole_and_is_reused(tmp_path: Path) -> None:
    first = run_demo(tmp_path / "run", quick=True)
    assert Path(first["report"]).stat().st_size > 50_000
    assert set(first["seconds"]) == {"train", "score", "select", "evaluate", "report"}
    assert len(first["claims"]) == 3 and "Data Diet" in first["text"]
    scores = tmp_path / "run" / "scores" / "_SUCCESS.json"
    before = (scores.read_bytes(), scores.stat().st_mtime_ns)
    again = run_demo(tmp_path / "run", quick=True)
    assert again["evaluation"] == first["evaluation"]
    assert before == (scores.read_bytes(), scores.stat().st_mtime_ns)
