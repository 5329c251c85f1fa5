"""What `curate score` costs beside one plain training pass over the same rows.

    python benchmarks/score_overhead.py                    512 rows of a small GPT-2, el2n and grand
    python benchmarks/score_overhead.py --out FILE         and the numbers as JSON

Three things on the same batches, in turns, the median of `--rounds`:

    plain     forward, mean loss, backward to all weights: what training pays, without the optimiser
    engine    the bare engine: loss, el2n and the exact gradient norm over all parameters
    score     `curate score --engine local`, a process of its own, from Parquet to a committed part

The process is run on all rows and on one batch; the slope between the two is its time per row, what
is left its start-up (imports, loading, the probe). Times are CPU seconds, user and system, of the
process: on a machine that others use they say more than the clock, which is kept beside them.
Nothing is printed unless the scores of the command and of the bare engine agree to 1e-4.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

import curate
from curate.pipeline.models.checkpoint import find_checkpoints, load_model
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.scoring.batch_plan import BatchPlan
from curate.pipeline.tasks.registry import make_task
from curate.pipeline.tasks.task import Task
from curate.scorers.engine import Engine
from curate.scorers.protocol import Batch, Signal

SIGNALS = (Signal("loss"), Signal("el2n"), Signal("grad_sq_norm"), Signal("tokens"))
COMMAND = "import sys; from curate.cli import main; sys.argv[0] = 'curate'; main()"


@dataclass
class Setting:
    """A model folder, a corpus and its batches, all of one length."""

    folder: str
    corpus: str
    first_batch: str
    task: Task
    batches: list[Batch]
    rows: int


def setting(place: Path, asked: argparse.Namespace) -> Setting:
    """Write the model and the corpora; return them with the batches that `score` would make."""
    torch.manual_seed(0)
    shape = {"n_layer": asked.layers, "n_embd": asked.width, "n_head": asked.width // 64}
    config = transformers.GPT2Config(
        vocab_size=asked.vocab, n_positions=asked.tokens, bos_token_id=0, eos_token_id=0, **shape
    )
    folder = str(place / "model")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    ids = np.random.default_rng(0).integers(1, asked.vocab, (asked.rows, asked.tokens + 1))
    table = pa.table({"input_ids": pa.array(list(ids.astype(np.int32)), pa.list_(pa.int32()))})
    pq.write_table(table, place / "corpus.parquet")
    corpus = str(place / "corpus.parquet")
    task = make_task("causal_lm", open_corpus(corpus), model=folder)
    encoded = task.encode(table)
    plan = BatchPlan().batches(task.cost(encoded), encoded.nbytes / asked.rows)
    pq.write_table(table.slice(0, len(plan[0])), place / "first.parquet")
    batches = [task.collate(encoded.take(pa.array(rows))) for rows in plan]
    return Setting(folder, corpus, str(place / "first.parquet"), task, batches, asked.rows)


def plain_pass(of: Setting) -> Callable[[], None]:
    """Return one pass of forward and backward over all batches, as training would."""
    model = load_model(find_checkpoints(of.folder)[0])

    def run() -> None:
        for batch in of.batches:
            of.task.outputs(model, batch).loss.mean().backward()
            model.zero_grad(set_to_none=True)

    return run


def engine_pass(of: Setting) -> Callable[[], np.ndarray]:
    """Return one pass of the engine over all batches, which gives grand; the probe is behind."""
    model = load_model(find_checkpoints(of.folder)[0])
    engine = Engine(model, of.task.outputs, SIGNALS)
    engine.verify(of.batches[0].select_rows([0, 1, 2]))

    def run() -> np.ndarray:
        found = [engine(batch)[Signal("grad_sq_norm")] for batch in of.batches]
        return np.asarray(torch.cat(found).sqrt())

    return run


def score_process(of: Setting, corpus: str, out: Path, threads: int) -> None:
    """Run the command as a user would."""
    options = ["--checkpoints", of.folder, "--task", "causal_lm", "--scorer", "el2n,grand"]
    options += ["--engine", "local", "--threads", str(threads), "-o", str(out), "--overwrite"]
    command = [sys.executable, "-c", COMMAND, "score", corpus, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().split("\n")[-1])


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of this process and its children, and the seconds on the clock."""

    def now() -> np.ndarray:
        spent = os.times()
        return np.array([sum(spent[:4]), spent.elapsed])

    start = now()
    call()
    cpu, clock = now() - start
    return float(cpu), float(clock)


def measure(
    of: Setting, place: Path, rounds: int, threads: int
) -> dict[str, list[tuple[float, float]]]:
    """Return what each took, per round.

    Raises:
        RuntimeError: the command and the bare engine give other scores.
    """
    plain, engine, out = plain_pass(of), engine_pass(of), place / "scores"
    score_process(of, of.corpus, out, threads)
    parts = [pq.read_table(part, columns=["grand"]) for part in sorted(out.glob("part-*.parquet"))]
    scored = pa.concat_tables(parts)["grand"].to_numpy()
    if not np.allclose(scored, engine(), rtol=1e-4):
        raise RuntimeError("the command and the bare engine disagree; no speed is worth printing")
    plain()
    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "engine": engine,
        "first batch": lambda: score_process(of, of.first_batch, out, threads),
        "all rows": lambda: score_process(of, of.corpus, out, threads),
    }
    rows = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: [row[name] for row in rows] for name in calls}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"rows": 512, "layers": 4, "width": 256, "tokens": 128}.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--note", help="What to know of the machine.")
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        of = setting(Path(folder), asked)
        times = measure(of, Path(folder), asked.rounds, asked.threads)
    middle = {name: statistics.median(cpu for cpu, _ in each) for name, each in times.items()}
    first = of.batches[0].rows
    per_row = (middle["all rows"] - middle["first batch"]) / (of.rows - first)
    score, start_up = per_row * of.rows, middle["first batch"] - per_row * first
    result = {
        "shape": {k: getattr(asked, k) for k in ("rows", "layers", "width", "tokens", "vocab")},
        "cpu_seconds": {"plain": middle["plain"], "engine": middle["engine"], "score": score},
        "start_up_cpu_seconds": start_up,
        "ratios": {
            "engine / plain": middle["engine"] / middle["plain"],
            "score / engine": score / middle["engine"],
            "score / plain": score / middle["plain"],
        },
        "rounds_cpu_and_clock": times,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {asked.threads} threads",
        "note": asked.note,
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "curate": curate.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
