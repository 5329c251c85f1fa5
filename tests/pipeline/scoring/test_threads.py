"""The threads of a scoring process: the user's, kept for a run, and no part of what a run is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from curate.pipeline.scoring import score as module
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_setup import Setup, threads_for
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.work import Work

LARGE = 1_000_000


@pytest.mark.parametrize(
    ("said", "threads"),
    [
        ("3", 3),
        ("12", 12),  # the user's word, also beyond our own eight
        (" 2 ,4", 2),  # a list is by level of nesting
        ("", None),
        ("0", None),
        ("-2", None),
        ("many", None),
    ],
)
def test_a_large_model_takes_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert threads_for(LARGE) == (threads or min(8, os.cpu_count() or 1))
    assert threads_for(LARGE - 1) == 1
    # In a job of Ray's the variable is Ray's, not the user's.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert threads_for(LARGE) == min(8, os.cpu_count() or 1)


def test_threads_are_no_part_of_a_run(
    make_points: Callable[..., str],
    points_checkpoints: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus, checkpoints = make_points([20]), points_checkpoints()
    used: list[int] = []
    run = module._run
    monkeypatch.setattr(module, "parameter_count", lambda work: LARGE)

    def noted(setup: Setup, *rest: object) -> None:
        work: Work = setup.work
        used.append(work.threads)
        run(setup, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_run", noted)

    def once(name: str, said: str | None, threads: int | None = None) -> ScoreTable:
        if said is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        return score(
            corpus, checkpoints=checkpoints, scorers="loss,grand", threads=threads,
            engine="local", out=tmp_path / name, progress=False,
        )  # fmt: skip

    try:
        tables = [once("a", "1"), once("b", "2"), once("c", None), once("d", "2", threads=1)]
        assert used == [1, 2, min(8, os.cpu_count() or 1), 1]
    finally:
        torch.set_num_threads(1)
    # So small a model is computed alike by any number of threads: whole tables are equal.
    assert len({table.meta["run"] for table in tables}) == 1
    assert all(table.meta["config"] == tables[0].meta["config"] for table in tables)
    assert len({table.success["digest"] for table in tables}) == 1
    # A run that was stopped goes on as it began, whatever is said elsewhere, but for --threads.
    for threads, expected in ((None, 1), (3, 3)):
        for name in ("_SUCCESS.json", "part-00000.parquet"):
            (tmp_path / "a" / name).unlink()
        again = once("a", "2", threads=threads)
        assert (used[-1], again.success["digest"]) == (expected, tables[0].success["digest"])
