"""Counting n-grams on Ray: the bytes of one process, whoever counts, and through deaths."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.scoring import ngram_tasks, text_weights
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_unit import RunError
from curate.pipeline.scoring.text_weights import TextWeights

pytestmark = pytest.mark.usefixtures("ray_session", "kept_ledger")

count = ngram_tasks._counted


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """40 rows in three shards and 9 of a target, counted seven at a time: nine portions."""
    rng = np.random.default_rng(5)
    for name, parts in (("corpus", (20, 4, 16)), ("target", (9,))):
        (tmp_path / name).mkdir()
        for i, rows in enumerate(parts):
            texts = [" ".join(rng.choice(list("abcdef"), rng.integers(0, 9))) for _ in range(rows)]
            texts[1] = None  # type: ignore[call-overload]
            pq.write_table(pa.table({"text": texts}), tmp_path / name / f"{i}.parquet")
    monkeypatch.setattr(text_weights, "PORTION_ROWS", 7)
    return {
        "corpus": str(tmp_path / "corpus"),
        "target": str(tmp_path / "target"),
        "scorers": "dsir,three=dsir(ngrams=3,buckets=50)",
        "unit_rows": 15,
        "progress": False,
    }


def results(folder: Path) -> dict[str, bytes]:
    """All files but the ledger's, which tells who did what."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*.*") if p.is_file()}
    return {n: p.read_bytes() for n, p in files.items() if not n.startswith("attempts/")}


def test_workers_count_what_one_process_counts(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, engine="local", out=tmp_path / "local")
    whole = results(tmp_path / "local")
    assert {"ngrams/2-grams-10000.safetensors", "ngrams/3-grams-50.safetensors"} <= set(whole)
    seen: list[text_weights.Portion] = []
    got = ngram_tasks._got

    def noted(ref: Any, portion: text_weights.Portion) -> Any:
        seen.append(portion)
        return got(ref, portion)

    def refused(*arguments: Any) -> Any:
        raise AssertionError("this process counts nothing")

    monkeypatch.setattr(ngram_tasks, "_got", noted)
    monkeypatch.setattr(TextWeights, "counted", refused)
    for workers in (1, 2):
        seen.clear()
        score(**settings, engine="ray", workers=workers, out=tmp_path / f"{workers}")
        assert results(tmp_path / f"{workers}") == whole
        rows = {of: sum(p.rows for p in seen if p.of == of) for of in ("corpus", "target")}
        assert rows == {"corpus": 40, "target": 9} and len(seen) == 3 + 1 + 3 + 2


@pytest.mark.slow
def test_a_portion_whose_worker_dies_is_counted_once_all_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(**settings, engine="local", out=tmp_path / "local")
    marker, ours = tmp_path / "died", count

    def dying(work: Any, portion: Any) -> Any:
        if portion.start == 14 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ours(work, portion)

    monkeypatch.setattr(ngram_tasks, "_counted", dying)
    score(**settings, engine="ray", workers=2, out=tmp_path / "ray")
    assert marker.exists() and results(tmp_path / "ray") == results(tmp_path / "local")


def test_what_a_worker_says_stops_the_run_and_leaves_no_counts(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kind, words in (
        (ValueError("shard 1.parquet is damaged"), ValueError, "^shard 1.parquet is damaged$"),
        (KeyError("x"), RunError, "counting n-grams failed"),
    ):

        def failing(work: Any, portion: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(ngram_tasks, "_counted", failing)
        with pytest.raises(kind, match=words):
            score(**settings, engine="ray", workers=1, out=tmp_path / "ray")
        assert not (tmp_path / "ray" / "ngrams").exists()
