"""Claims of the source papers on small real data, with intervals over splits.

    python benchmarks/reproduce.py                      all rows, 3 splits
    python benchmarks/reproduce.py --row 3 --splits 5
    python benchmarks/reproduce.py --quick              short trainings: to see that it runs

Everything goes through `curate.train`, `score`, `select` and `evaluate`. A row of the table is a
mean over splits of the data with its 95 % t interval; behind each split stand several trainings.
Digits: scikit-learn's 1797 images, 1300 to train on, MLP 64-128-64-10. Wrong-label detection by
every scorer, and on more data, is in `mislabels.py`.
"""

import argparse
import logging
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from small_data import Files, digits
from timing import machine

import curate
from curate.pipeline.manifests.select import select
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.training.train import train
from curate.selectors.gio_search import Descent, Objective, search
from curate.selectors.gio_stop import Limits

MLP = {"model": "mlp", "model_options": {"hidden": [128, 64]}}


@dataclass(frozen=True)
class Effort:
    splits: int = 3
    proxies: int = 10
    trainings: int = 5
    epochs: int = 20


Row = Callable[[Path, int, Effort], Iterator[tuple[str, float]]]


def hard_rows(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Rows 1 and 2: early EL2N, keep hard, against random, easy, CCS and k-center; equal steps.

    Paul et al. 2021, figure 1; Zheng et al. 2023 (CCS).
    """
    data = digits(folder, split)
    table = _scored(data.train, folder, ["el2n"], effort)
    chosen = {}
    for share in (0.5, 0.25, 0.1, 0.05):
        asked = {
            "EL2N hard": {"by": "el2n"},
            "EL2N easy": {"by": "el2n", "method": "bottom"},
            "CCS beta 0": {"by": "el2n", "method": "ccs"},
            "CCS beta 0.2": {"by": "el2n", "method": "ccs", "drop_top": 0.2},
            "k-center": {"method": "kcenter", "vectors": "column:features"},
        }
        for name, how in asked.items():
            if share > 0.1 and name not in ("EL2N hard", "EL2N easy"):
                continue
            out = folder / f"{share}-{name.replace(' ', '-')}"
            chosen[out.name] = f"{name}, keep {share:.0%}"
            select(table, budget=share, out=out, **how)
    yield from _accuracies(data, folder, chosen, effort)


def top_is_noise(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 3: with wrong labels the highest EL2N are the noise; dropping them helps.

    Paul et al. 2021, section 4. Long trainings, so that the wrong labels are memorised.
    """
    for flips in (0.2, 0.4):
        here = folder / f"{flips}"
        data = digits(here, split, flips=flips)
        few = Effort(proxies=max(2, effort.proxies // 2))
        table = _scored(data.train, here, ["el2n"], few, keep=["label", "is_wrong"])
        chosen = {}
        for name, how in {
            "without the highest EL2N": {"by": "el2n", "method": "bottom", "budget": 1 - flips},
            "without the lowest EL2N": {"by": "el2n", "method": "top", "budget": 1 - flips},
            "only right labels": {
                "by": "is_wrong",
                "method": "threshold",
                "params": {"at_most": 0},
            },
        }.items():
            out = here / name.replace(" ", "-")
            chosen[out.name] = f"{flips:.0%} wrong, {name}"
            select(table, out=out, **how)
        long = Effort(trainings=max(2, effort.trainings // 2), epochs=3 * effort.epochs)
        for name, value in _accuracies(data, here, chosen, long, random=False):
            yield name.replace("all rows", f"{flips:.0%} wrong, all rows"), value


def not_yet_memorised(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 3, short trainings: wrong labels that are not memorised yet cost little.

    The same with a quarter of the steps.
    """
    data = digits(folder, split, flips=0.2)
    few = Effort(proxies=max(2, effort.proxies // 2))
    table = _scored(data.train, folder, ["el2n"], few)
    select(table, by="el2n", method="bottom", budget=0.8, out=folder / "low")
    short = Effort(trainings=max(2, effort.trainings // 2), epochs=3 * effort.epochs // 4)
    chosen = {"low": "without the highest EL2N"}
    for name, value in _accuracies(data, folder, chosen, short, random=False):
        yield f"20% wrong, {short.epochs} epochs, {name}", value


def wrong_labels(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 4: AUROC of the scores at finding wrong labels, one in five.

    Paul et al. 2021; Pruthi et al. 2020; Pleiss et al. 2020; Hoelzl et al. 2025 (GWA); Evans et
    al. 2024 (DVGS: proxies trained on 200 clean rows by full-batch steps).
    """
    data = digits(folder, split, flips=0.2, clean=200)
    assert data.clean is not None, "asked for"
    scorers = {"el2n": "EL2N", "gwa": "GWA", "aum": "AUM", "grand": "GraNd",
               "self_influence": "self-influence"}  # fmt: skip
    found = _table(_scored(data.train, folder, list(scorers), effort), list(scorers))
    for column, name in scorers.items():
        wrong_end = -1 if column in ("gwa", "aum") else 1
        yield f"AUROC, {name}", roc_auc_score(data.wrong, wrong_end * found[column].to_numpy())
    made, epochs = folder / "on-target", 5 * effort.epochs
    train(data.clean, seeds=3, epochs=epochs, save_epochs=range(0, epochs + 1, epochs // 10),
          batch_size=200, lr=1e-3, schedule="constant", out=made, progress=False,
          **MLP)  # fmt: skip
    for group, name in (("none", "one group, as in the paper"), (None, "by class")):
        table = curate.score(data.train, checkpoints=str(made), target=data.clean,
                             target_group=group, scorers=["dvgs=grad_similarity(mode=dvgs)"],
                             engine="local", out=folder / name, progress=False)  # fmt: skip
        value = _table(table, ["dvgs"])["dvgs"].to_numpy()
        yield f"AUROC, DVGS, {name}", roc_auc_score(data.wrong, -value)


def norm_at_start(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 5: GraNd at initialisation is little more than the norm of the input (Kirsch 2023).

    And keeping what it ranks highest is no better than a random choice.
    """
    data = digits(folder, split)
    made = folder / "initial"
    train(data.train, seeds=effort.proxies, epochs=1, save_epochs=[0], out=made, progress=False,
          **MLP)  # fmt: skip
    table = curate.score(data.train, checkpoints=str(made / "seed*-epoch000"), scorers=["grand"],
                         keep=["features"], engine="local", out=folder / "initial-scores",
                         progress=False)  # fmt: skip
    rows = _table(table, ["grand", "features"])
    norms = np.linalg.norm(np.stack(rows["features"].to_numpy(zero_copy_only=False)), axis=1)
    found = stats.spearmanr(rows["grand"].to_numpy(), norms).statistic
    yield "Spearman of GraNd at step 0 and input norm", float(found)
    select(table, by="grand", budget=0.25, out=folder / "highest")
    chosen = {"highest": "GraNd at step 0 highest, keep 25%"}
    few = Effort(trainings=max(2, effort.trainings // 2), epochs=effort.epochs)
    yield from _accuracies(data, folder, chosen, few)


def shuffled_text(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 9: shuffled text has the larger self-influence (Thakkar et al. 2023, figure 1).

    A byte-level GPT, two seeds, on the standard library's modules; held-out stretches of 256 bytes,
    as they are and with their words in random order. The sign test is of one split's pairs.
    """
    rng = np.random.default_rng(split)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [files[i].read_text("utf-8", "ignore") for i in rng.permutation(len(files))]
    pieces = [t[i : i + 256] for t in texts for i in range(0, min(len(t), 8192) - 256, 256)]
    rng.shuffle(pieces)
    learnt, held = pieces[:1500], pieces[1500:1700]
    moved = [" ".join(rng.permutation(piece.split())) for piece in held]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": learnt}), folder / "train.parquet")
    pq.write_table(pa.table({"text": held + moved}), folder / "held.parquet")
    made = folder / "checkpoints"
    train(str(folder / "train.parquet"), model="gpt", task="causal_lm", seeds=2,
          model_options={"layers": 2, "dim": 64, "heads": 4},
          epochs=max(1, effort.epochs // 10), out=made, progress=False)  # fmt: skip
    scorers = ["loss", "si=self_influence(params=blocks.0)"]
    table = curate.score(str(folder / "held.parquet"), checkpoints=str(made), scorers=scorers,
                         engine="local", out=folder / "scores", progress=False)  # fmt: skip
    rows = _table(table, ["loss", "si"])
    for name in ("si", "loss"):
        value = rows[name].to_numpy()
        more = value[len(held) :] > value[: len(held)]
        called = "self-influence (first block)" if name == "si" else "loss"
        yield f"share of pairs where the shuffled text has the larger {called}", float(more.mean())
        p = stats.binomtest(int(more.sum()), len(more)).pvalue
        yield f"-log10 p of the sign test of that {called}", -float(np.log10(p))


def gio_consistency(folder: Path, split: int, effort: Effort) -> Iterator[tuple[str, float]]:
    """Row 6: GIO's checks of itself on Gaussians in the plane (Everaert and Potts 2024).

    From a pool of the target's own distribution it selects and the divergence falls; from a pool
    far away it selects nothing.
    """
    rng = np.random.default_rng(split)
    deviation = np.sqrt(0.5)
    target, pool = (rng.normal((3, 4), deviation, (100, 2)) for _ in range(2))
    far = rng.normal((300, 400), deviation, (100, 2))
    start = rng.uniform(0, 8, (100, 2))
    for name, rows in (("the target's law", pool), ("a law far away", far)):
        found = search(rows, target, start, Objective(), Descent(), Limits(), rng)
        yield f"GIO: selected of 100 rows of {name}", float(len(found.rows))
        yield f"GIO: divergence at the start, pool of {name}", found.trace[0]
        yield f"GIO: divergence at the end, pool of {name}", found.trace[-1]


ROWS: dict[str, Row] = {
    "1": hard_rows,
    "3": top_is_noise,
    "3b": not_yet_memorised,
    "4": wrong_labels,
    "5": norm_at_start,
    "6": gio_consistency,
    "9": shuffled_text,
}


def _scored(
    corpus: str, folder: Path, scorers: list[str], effort: Effort, keep: list[str] | None = None
) -> ScoreTable:
    """Return the scores of short proxies: 5 epochs, the end of each seed."""
    made = folder / "checkpoints"
    train(corpus, seeds=effort.proxies, epochs=5, save_epochs=[5], out=made, progress=False, **MLP)
    return curate.score(corpus, checkpoints=str(made), scorers=scorers, keep=keep, engine="local",
                        out=folder / "scores", progress=False)  # fmt: skip


def _accuracies(
    data: Files, folder: Path, chosen: dict[str, str], effort: Effort, random: bool = True
) -> Iterator[tuple[str, float]]:
    """Train on each selection, random ones of each size and all rows; yield mean accuracies."""
    report = curate.evaluate(data.train, manifests=[str(folder / name) for name in chosen],
                             test=data.test, seeds=effort.trainings, epochs=effort.epochs,
                             out=folder / "evaluate", progress=False, **MLP)  # fmt: skip
    rows = sum(1 for _ in data.wrong)
    seen = set()
    for row in report["rows"]:
        if row["kind"] == "full":
            yield "all rows", row["mean"]
        elif row["kind"] == "random":
            if random and row["kept"] not in seen:
                yield f"random, keep {row['kept'] / rows:.0%}", row["mean"]
            seen.add(row["kept"])
        else:
            yield chosen[Path(row["manifest"]).name], row["mean"]


def _table(scores: ScoreTable, columns: list[str]) -> pa.Table:
    return pa.Table.from_batches(list(scores.scan(columns)))


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t interval."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(spread)


def run(rows: list[str], effort: Effort) -> None:
    print(f"# {machine(torch.device('cpu'))}")
    print(f"# {effort}")
    for number in rows:
        found: dict[str, list[float]] = {}
        for split in range(effort.splits):
            with tempfile.TemporaryDirectory(prefix="curate-reproduce-") as folder:
                for name, value in ROWS[number](Path(folder), split, effort):
                    found.setdefault(name, []).append(value)
        print(f"\n## {(ROWS[number].__doc__ or '').splitlines()[0]}\n")
        print(f"{'':64} mean      ±   splits")
        for name, values in found.items():
            mean, half = interval(values)
            print(f"{name:64} {mean:.4f} {half:.4f} {len(values):5d}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="repeatable")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    effort = Effort(asked.splits)
    if asked.quick:
        effort = Effort(2, proxies=2, trainings=2, epochs=5)
    run(asked.row or sorted(ROWS), effort)


if __name__ == "__main__":
    main()
