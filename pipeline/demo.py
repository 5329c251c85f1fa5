"""The whole job on scikit-learn's digits: train, score, select, evaluate, report.

The claim looked at is figure 1 of Paul et al. 2021 at a small scale: rows that a short proxy finds
hard (EL2N) are worth more than random ones, easy rows are worth less. Whatever comes out is said,
with its interval. Every stage is the public function behind the command of that name, so running
the demo again reuses what is finished.
"""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from curate.pipeline.evaluation.evaluate import evaluate, format_report
from curate.pipeline.evaluation.statistics import paired_test
from curate.pipeline.manifests.select import select
from curate.pipeline.reporting.report import write_report
from curate.pipeline.scoring.score import score
from curate.pipeline.storing.storage import Folder
from curate.pipeline.training.train import train

TRAIN_ROWS = 1300  # of 1797; the other 497 are the test set
SPLIT_SEED = 0
SCORERS = ("loss", "el2n", "grand", "entropy", "margin", "self_influence", "gwa", "forgetting",
           "aum")  # fmt: skip
HARD, QUARTER, EASY = "hardest-50", "hardest-25", "easiest-50"
SUBSETS: dict[str, tuple[str, float]] = {
    HARD: ("keep", 0.5),
    QUARTER: ("keep", 0.25),
    EASY: ("bottom", 0.5),
}
PROXY_EPOCHS = 5
EVALUATION_EPOCHS = 20  # of the full data; accuracy on all data has levelled off by then
log = logging.getLogger("curate.demo")


def run_demo(
    out: str | Path = "run", seeds: int = 10, trainings: int = 10, quick: bool = False
) -> dict[str, Any]:
    """Run everything into `out` and return what came out; `text` says it in words.

    `seeds` proxies are trained and averaged, every subset is trained `trainings` times. `quick` is
    for tests: two of each, few epochs; its numbers mean nothing.
    """
    if quick:
        seeds, trainings = 2, 2
    epochs = 2 if quick else EVALUATION_EPOCHS
    run = Folder(out)
    times: dict[str, float] = {}
    corpus, test = write_digits(run.child("data"))
    with _timed(times, "train"):
        train(corpus, model="mlp", seeds=seeds, epochs=PROXY_EPOCHS, save_epochs=[PROXY_EPOCHS],
              out=run.full_name("checkpoints"))  # fmt: skip
    with _timed(times, "score"):
        table = score(corpus, checkpoints=run.full_name("checkpoints"), scorers=list(SCORERS),
                      engine="local", out=run.full_name("scores"))  # fmt: skip
    with _timed(times, "select"):
        manifests = [
            select(table, by="el2n", method=method, budget=budget,
                   out=run.full_name(f"manifest-{name}")).path
            for name, (method, budget) in SUBSETS.items()
        ]  # fmt: skip
    with _timed(times, "evaluate"):
        evaluation = evaluate(corpus, manifests=manifests, model="mlp", test=test, seeds=trainings,
                              epochs=epochs, out=run.full_name("evaluate"))  # fmt: skip
    with _timed(times, "report"):
        report = write_report(run.uri)
    claims = check_claims(evaluation)
    return {
        "run": run.uri,
        "report": report,
        "seconds": times,
        "evaluation": evaluation,
        "claims": claims,
        "text": _text(evaluation, claims, times, report),
    }


def write_digits(folder: Folder) -> tuple[str, str]:
    """Write digits as two Parquet files with `id`, `image` (8 x 8 PNG) and `label`; return them.

    The split is stratified by class and fixed. Files that are there already are left alone.
    """
    digits = load_digits()
    everything = np.arange(len(digits.target))
    kept, held = train_test_split(
        everything, train_size=TRAIN_ROWS, stratify=digits.target, random_state=SPLIT_SEED
    )
    for name, rows in (("train", kept), ("test", held)):
        rows = np.sort(rows)
        table = pa.table(
            {
                "id": pa.array([f"digit-{i:04d}" for i in rows]),
                "image": pa.array([_png(digits.images[i]) for i in rows], IMAGE_TYPE),
                "label": pa.array(digits.target[rows], pa.int64()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=256)
        folder.create(f"{name}.parquet", sink.getvalue())
    return folder.full_name("train.parquet"), folder.full_name("test.parquet")


def check_claims(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what figure 1 of Paul et al. 2021 claims, and what these trainings say about it.

    Differences are paired by seed, with 95 % t intervals. A claim of being better or worse holds
    when its interval excludes zero on that side; "matches" holds when the interval does not lie
    below zero.
    """
    rows = {row["name"]: row for row in evaluation["rows"]}
    half = rows[f"manifest-{HARD}"]["kept"]
    full, random = rows["full"], rows[f"random-{half}"]
    hard, easy = rows[f"manifest-{HARD}"], rows[f"manifest-{EASY}"]
    return [
        _claim("the hardest 50 % match all data", hard, full, "at least as good"),
        _claim("the hardest 50 % beat a random 50 %", hard, random, "better"),
        _claim("the easiest 50 % are worse than a random 50 %", easy, random, "worse"),
    ]


def _claim(
    text: str, ours: dict[str, Any], theirs: dict[str, Any], expected: str
) -> dict[str, Any]:
    test = paired_test(ours["values"], theirs["values"])
    holds = {
        "at least as good": test.verdict != "worse",
        "better": test.verdict == "better",
        "worse": test.verdict == "worse",
    }[expected]
    return {"claim": text, "holds": holds, "difference": test.difference,
            "ci95": test.half_width, "p": test.p_t}  # fmt: skip


def _text(
    evaluation: dict[str, Any], claims: list[dict[str, Any]], times: dict[str, float], report: str
) -> str:
    """Return the results for the terminal."""
    spent = ", ".join(f"{stage} {seconds:g} s" for stage, seconds in times.items())
    said = [
        f"  {'yes' if c['holds'] else 'NO ':<4} {c['claim']}: difference {c['difference']:+.4f}"
        + ("" if c["ci95"] is None else f" ± {c['ci95']:.4f}")
        for c in claims
    ]
    return "\n".join(
        [format_report(evaluation), "", "Data Diet at a small scale (Paul et al. 2021, figure 1):",
         *said, "", f"report: {report}", f"took: {spent}"]
    )  # fmt: skip


IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _png(levels: np.ndarray) -> dict[str, bytes | None]:
    """Return an 8 x 8 image of levels 0 to 16 as `datasets` stores images."""
    out = io.BytesIO()
    Image.fromarray(np.rint(levels * (255 / 16)).astype(np.uint8)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    log.info("%s ...", stage)
    started = time.monotonic()
    yield
    times[stage] = round(time.monotonic() - started, 1)
