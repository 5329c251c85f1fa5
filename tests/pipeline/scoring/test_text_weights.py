"""DSIR of whole corpora, from the command line: brute force, oracles, kills, refusals."""

import json
import math
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from curate import cli
from curate.pipeline.reporting.report import write_report
from curate.pipeline.scoring import text_weights
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.stores.store import open_store
from curate.pipeline.training.train import train

WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()


def texts(rows: int, seed: int, first: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS[first : first + 5], rng.integers(1, 9))) + rng.choice([".", "!?"])
        for _ in range(rows)
    ]


def written(folder: Path, rows: list[Any], parts: int = 1, **columns: list[Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(rows, pa.string()), **columns})
    step = -(-len(rows) // parts)
    for i in range(parts):
        pq.write_table(table.slice(i * step, step), folder / f"{i}.parquet")
    return str(folder)


def brute(corpus: list[str], target: list[str], n: int = 2, buckets: int = 10_000) -> list[float]:
    """Return the weights by dictionaries of counts, as the paper has them."""

    def counts(text: str) -> Counter[int]:
        tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
        grams = [
            tuple(tokens[i : i + k]) for k in range(1, n + 1) for i in range(len(tokens) + 1 - k)
        ]
        return Counter(int(sha256(" ".join(g).encode()).hexdigest(), 16) % buckets for g in grams)

    def shares(rows: list[str]) -> dict[int, float]:
        total: Counter[int] = Counter()
        for row in rows:
            total += counts(row)
        return {bucket: count / total.total() for bucket, count in total.items()}

    p, q = shares(target), shares(corpus)
    return [
        sum(
            c * (math.log(p.get(b, 0) + 1e-8) - math.log(q.get(b, 0) + 1e-8))
            for b, c in counts(row).items()
        )
        for row in corpus
    ]


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return result


def column(folder: Path, name: str = "dsir") -> list[float | None]:
    batches = ScoreTable.open(folder).scan([name])
    return [v for batch in batches for v in batch.column(0).to_pylist()]


@pytest.mark.parametrize(
    ("request_", "n", "buckets"),
    [
        ("dsir", 2, 10_000),
        ("dsir=dsir(ngrams=3,buckets=50)", 3, 50),
        ("dsir=dsir(ngrams=1)", 1, 10_000),
    ],
)
def test_brute_force_without_a_checkpoint(
    tmp_path: Path, request_: str, n: int, buckets: int
) -> None:
    raw, wanted = texts(60, 0), texts(12, 1, first=3)
    corpus = written(tmp_path / "corpus", raw, parts=3)
    target = written(tmp_path / "target", wanted)
    out = tmp_path / "scores"
    result = run(
        "score", corpus, "--scorer", request_, "--target", target, "-o", out, "--unit-rows", 7
    )
    assert result.exit_code == 0, result.output
    # The table holds float32.
    np.testing.assert_allclose(column(out), brute(raw, wanted, n, buckets), rtol=1e-6, atol=1e-6)
    meta = ScoreTable.open(out).meta
    assert meta["checkpoints"] == [] and meta["target"]["rows"] == 12


def test_a_target_that_is_the_corpus_weighs_nothing(tmp_path: Path) -> None:
    raw = texts(40, 0)
    corpus = written(tmp_path / "corpus", raw, parts=2)
    target = written(tmp_path / "target", list(reversed(raw)))
    score(corpus, scorers="dsir", target=target, out=tmp_path / "scores", progress=False)
    assert column(tmp_path / "scores") == [0.0] * 40


def test_order_and_units_change_no_weight(tmp_path: Path) -> None:
    raw, order = texts(40, 0), np.random.default_rng(2).permutation(40)
    target = written(tmp_path / "target", texts(9, 1, first=2))
    for name, rows, parts, unit in (("a", raw, 1, None), ("b", [raw[i] for i in order], 4, 3)):
        corpus = written(tmp_path / name, rows, parts)
        score(
            corpus, scorers="dsir", target=target, out=tmp_path / f"s{name}", unit_rows=unit,
            progress=False,
        )  # fmt: skip
    assert column(tmp_path / "sb") == [column(tmp_path / "sa")[i] for i in order]


def test_resampling_takes_more_of_what_the_target_is_like(tmp_path: Path) -> None:
    like, unlike = texts(200, 0, first=3), texts(800, 1)
    corpus = written(tmp_path / "corpus", like + unlike)
    target = written(tmp_path / "target", texts(100, 2, first=3))
    assert (
        run("score", corpus, "--scorer", "dsir", "--target", target, "-o", tmp_path / "s").exit_code
        == 0
    )
    made = run(
        "select", tmp_path / "s", "--method", "gumbel", "--budget", 200, "-o", tmp_path / "m"
    )
    assert made.exit_code == 0, made.output
    rows = pq.read_table(tmp_path / "m" / "part-00000.parquet")["row"].to_numpy()
    assert (rows < 200).mean() > 0.9  # a fifth by chance


def test_rows_without_text_fail_alone_and_empty_ones_weigh_nothing(tmp_path: Path) -> None:
    raw = [*texts(6, 0), None, ""]
    corpus = written(tmp_path / "corpus", raw)
    target = written(tmp_path / "target", [*texts(5, 1, first=2), None])
    result = run("score", corpus, "--scorer", "dsir", "--target", target, "-o", tmp_path / "s")
    assert result.exit_code == 3
    values = column(tmp_path / "s")
    assert values[6] is None and values[7] == 0.0
    assert column(tmp_path / "s", "error")[6] == "the text is null"
    known = [t for t in raw if t]
    want = brute(known, texts(5, 1, first=2))
    np.testing.assert_allclose(np.array(values[:6], float), want, rtol=1e-6)


def test_a_label_is_kept_and_not_asked_of_the_target(tmp_path: Path) -> None:
    raw = texts(20, 0)
    corpus = written(tmp_path / "corpus", raw, label=[i % 2 for i in range(20)])
    target = written(tmp_path / "target", texts(5, 1))
    table = score(
        corpus, scorers="dsir", target=target, out=tmp_path / "run" / "scores", progress=False
    )
    assert "label" in table.schema.names and table.rows == 20
    assert "dsir" in Path(write_report(tmp_path / "run")).read_text()


def test_beside_stores_of_a_target(tmp_path: Path) -> None:
    # The target's vectors come from the same pass, and have no n-gram weights.
    raw, known = texts(12, 0), texts(5, 1, first=2)
    corpus, target = written(tmp_path / "corpus", raw), written(tmp_path / "target", known)
    small = {"layers": 1, "dim": 16, "heads": 2}
    made = train(
        corpus, model="gpt", model_options=small, seeds=[0], steps=1, out=tmp_path / "checkpoints"
    )
    table = score(
        corpus,
        checkpoints=[c.path for c in made],
        scorers=["loss", "dsir"],
        target=target,
        store=["embedding"],
        out=tmp_path / "s",
        progress=False,
    )
    assert table.success["bad_rows"] == 0
    np.testing.assert_allclose(
        np.array(column(tmp_path / "s"), float), brute(raw, known), rtol=1e-6
    )
    assert open_store(tmp_path / "s", "embedding", target=True).rows == 5


def test_killed_while_counting_or_scoring_it_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = written(tmp_path / "corpus", texts(50, 0), parts=2)
    target = written(tmp_path / "target", texts(9, 1, first=3))
    whole = score(
        corpus, scorers="dsir", target=target, out=tmp_path / "a", unit_rows=10, progress=False
    )
    counted = text_weights.gram_buckets
    for calls in (0, 20, 55, 80):
        left = iter(range(calls))

        def dying(*arguments: Any, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return counted(*arguments)

        monkeypatch.setattr(text_weights, "gram_buckets", dying)
        with pytest.raises(KeyboardInterrupt):
            score(
                corpus,
                scorers="dsir",
                target=target,
                out=tmp_path / "b",
                unit_rows=10,
                progress=False,
            )
        monkeypatch.undo()
    again = score(
        corpus, scorers="dsir", target=target, out=tmp_path / "b", unit_rows=10, progress=False
    )
    assert again.success["digest"] == whole.success["digest"]


def test_damaged_counts_are_refused(tmp_path: Path) -> None:
    corpus, target = written(tmp_path / "c", texts(9, 0)), written(tmp_path / "t", texts(5, 1))
    out = tmp_path / "s"
    score(corpus, scorers="dsir", target=target, out=out, progress=False)
    (out / "_SUCCESS.json").unlink()
    (out / "part-00000.parquet").unlink()
    counts = out / "ngrams" / "2-grams-10000.safetensors"
    data = bytearray(counts.read_bytes())
    data[-1] ^= 1
    counts.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: delete it and run the same command"):
        score(corpus, scorers="dsir", target=target, out=out, progress=False)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    corpus, target = written(tmp_path / "c", texts(9, 0)), written(tmp_path / "t", texts(5, 1))
    result = run(
        "plan", corpus, "--scorer", "dsir", "--target", target, "-o", tmp_path / "s", "--json"
    )
    plan = json.loads(result.stdout)
    assert plan["rows"] == 9 and plan["checkpoints"] == 0 and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "dsir compares rows with a target: name it by --target CORPUS"),
        ({"target_group": "text"}, "leave --target-group out"),
        ({"target": "blank"}, "the target has no words in its texts"),
        ({"target": "other"}, "has no column 'text' of text; it has: body"),
        ({"corpus": "tokens"}, "not text: name the text by --task-option"),
        ({"scorers": "dsir,el2n"}, "run/checkpoints"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "c", texts(9, 0))
    written(tmp_path / "t", texts(5, 1))
    written(tmp_path / "blank", ["", " "])
    for name, table in (
        ("other", pa.table({"body": ["x"]})),
        ("tokens", pa.table({"tokens": [[1, 2, 3], [2, 3]]})),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "a.parquet")
    given: dict[str, Any] = {"corpus": "c", "scorers": "dsir", "target": "t", **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        score(given.pop("corpus"), **given, out=tmp_path / "s", progress=False)
