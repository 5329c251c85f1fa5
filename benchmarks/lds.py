"""Linear datamodeling score: do summed influences foretell what a subset of the data teaches?

    python benchmarks/lds.py                               ours
    python benchmarks/lds.py --python PEERS/bin/python     beside TRAK and Bergson; peers.py says
                                                           how to make their environment

A small GPT-2 of bytes (`lds_model.py`) is trained on random halves of stretches of the standard
library's modules, and its loss on held-out stretches of the same modules is taken. For each method
and held-out stretch: Spearman's correlation, over the halves, of the loss with the sum of the
influences of the half's rows (Ilyas et al. 2022, Park et al. 2023, section 2). Means over stretches
with 95 % t intervals. Everybody scores with the same checkpoints of trainings on all rows: `ends`
methods with each seed's last, averaged over seeds; `run` methods with all of a run. DVGS alone asks
for a proxy trained on the target, here the held-out stretches.
"""

import argparse
import logging
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lds_model import TOKENS
from reproduce import interval
from scipy import stats
from timing import machine

import curate
from curate.pipeline.training.train import train

HERE = Path(__file__).resolve().parent
ROWS, QUERIES = 200, 30
TRAINING: dict[str, Any] = {
    "model": f"{HERE / 'lds_model.py'}:gpt2",
    "task": "causal_lm",
    "task_options": {"context": TOKENS, "vocab_size": 256},
    "epochs": 8,
    "batch_size": 8,
    "lr": 2e-3,
    "schedule": "constant",
    "match": "epochs",
    "progress": False,
}
OURS = {
    "ends": {
        "gradient, dot": "grad_similarity(similarity=dot)",
        "gradient, cosine": "grad_similarity",
        "influence, Adam": "influence(curvature=adam)",
        "influence, root Adam": "influence(curvature=adam_root)",
        "influence, diagonal": "influence(curvature=diagonal)",
        "influence, K-FAC": "influence(curvature=kfac)",
        "influence, EK-FAC": "influence(curvature=ekfac)",
    },
    "run": {
        "TracIn (dot over the run)": "grad_similarity(similarity=dot)",
        "cosine over the run": "grad_similarity",
        "LESS": "grad_similarity(mode=less)",
    },
    "target": {"DVGS (run on the held-out rows)": "grad_similarity(mode=dvgs)"},
}
PEERS = {"TRAK": "trak_scores.py", "Bergson": "bergson_scores.py"}


def write_rows(folder: Path) -> None:
    """Write `train.parquet` and `queries.parquet`: stretches of 96 bytes of 36 modules."""
    rng = np.random.default_rng(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    rows = []
    for i in rng.permutation(len(files))[:36]:
        text = files[i].read_bytes()
        rows += [text[at : at + TOKENS] for at in range(1000, min(len(text), 9000) - TOKENS, 1000)]
    rng.shuffle(rows)
    kind = pa.list_(pa.int32())
    for name, part in (
        ("train", rows[:ROWS]),
        ("queries", rows[ROWS : ROWS + QUERIES]),
    ):
        ids = [f"{i:03d}" for i in range(len(part))]
        table = pa.table({"id": ids, "input_ids": pa.array([list(row) for row in part], kind)})
        pq.write_table(table, folder / f"{name}.parquet")


def halves(folder: Path, subsets: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows each half holds [S, n], and the loss of each query after it [S, q]."""
    kept = folder / f"halves-{subsets}-{seeds}.npz"
    if kept.exists():
        with np.load(kept) as found_before:
            return found_before["inside"], found_before["losses"]
    rng = np.random.default_rng(1)
    inside = np.zeros((subsets, ROWS), dtype=bool)
    losses = np.zeros((subsets, QUERIES))
    everything = pq.read_table(folder / "train.parquet")
    for s in range(subsets):
        inside[s, rng.choice(ROWS, ROWS // 2, replace=False)] = True
        with tempfile.TemporaryDirectory(dir=folder) as place:
            half = Path(place)
            pq.write_table(everything.filter(pa.array(inside[s])), half / "half.parquet")
            last = train(str(half / "half.parquet"), seeds=seeds, save_epochs=[TRAINING["epochs"]],
                         out=half / "made", **TRAINING)  # fmt: skip
            found = _columns(folder, [c.path for c in last], {"loss": "loss"}, half / "scores",
                             corpus="queries")  # fmt: skip
            losses[s] = found["loss"].to_numpy()
    np.savez(kept, inside=inside, losses=losses)
    return inside, losses


def ours(folder: Path, seeds: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each method's influence of every row on every query, [n, q]."""
    for which, asked in OURS.items():
        made = [str(folder / "all")]
        if which == "ends":
            made = [str(p) for p in _ends(folder)]
        elif which == "target":
            made = [str(folder / "on-queries")]
        found = _columns(folder, made, asked, folder / f"scores-{which}", keep_groups=True,
                         target=str(folder / "queries.parquet"), target_group="id")  # fmt: skip
        for name in asked:
            yield name, np.stack(found[f"{name}_by_group"].to_numpy(zero_copy_only=False))


def peers(folder: Path, python: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what the other libraries say, each in a process of their environment."""
    for name, script in PEERS.items():
        out = folder / f"{name}.npz"
        command = [python, str(HERE / "peers" / script), str(folder), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            print(f"{name}: failed: {ran.stderr.strip().splitlines()[-1]}")
            continue
        with np.load(out) as found:
            for way in found.files:
                yield f"{name}, {way}", found[way]


def _ends(folder: Path) -> list[Path]:
    return sorted((folder / "all").glob(f"seed*-epoch{TRAINING['epochs']:03d}"))


def _columns(
    folder: Path,
    checkpoints: list[str],
    asked: dict[str, str],
    out: Path,
    corpus: str = "train",
    **extra: Any,
) -> dict[str, Any]:
    aliases = {name: f"s{i}" for i, name in enumerate(asked)}
    table = curate.score(str(folder / f"{corpus}.parquet"), checkpoints=checkpoints, out=out,
                         scorers=[f"{aliases[name]}={text}" for name, text in asked.items()],
                         task="causal_lm", engine="local", progress=False, **extra)  # fmt: skip
    rows = pa.Table.from_batches(list(table.scan(list(table.schema.names))))
    plain = {name: rows[alias] for name, alias in aliases.items()}
    by_group = {
        f"{name}_by_group": rows[f"{alias}_by_group"]
        for name, alias in aliases.items()
        if f"{alias}_by_group" in rows.column_names
    }
    return plain | by_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="of the peers' environment; without it, ours alone")
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where all of it is kept; a temporary one else")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="curate-lds-") as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder)
        for rows, run in (("train", "all"), ("queries", "on-queries")):
            train(str(folder / f"{rows}.parquet"), seeds=asked.seeds, save_epochs=[2, 5, 8],
                  save_moments=True, out=folder / run, **TRAINING)  # fmt: skip
        inside, losses = halves(folder, asked.subsets, asked.seeds)
        print(f"# {machine(torch.device('cpu'))}")
        print(
            f"# {asked.subsets} halves of {ROWS} rows, {QUERIES} held-out rows, {asked.seeds} seeds"
        )
        methods = list(ours(folder, asked.seeds))
        if asked.python:
            methods += peers(folder, asked.python)
        print(f"{'':36} LDS     ±")
        for name, influence in methods:
            foretold = inside @ np.nan_to_num(influence)
            # More influence, less loss.
            found = [
                float(stats.spearmanr(foretold[:, q], -losses[:, q]).statistic)
                for q in range(QUERIES)
            ]
            mean, half = interval(found)
            print(f"{name:36} {mean:.3f} {half:.3f}", flush=True)


if __name__ == "__main__":
    main()
