"""The honest comparison: selected subsets, random ones of the same size, and all the data."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curate.pipeline.evaluation.evaluate_arm import Arm, Plan, release_rows, run_arm
from curate.pipeline.evaluation.evaluate_report import FORMAT, VERSION, draw, evaluation_report
from curate.pipeline.evaluation.evaluate_report import format_report as format_report
from curate.pipeline.manifests.algebra import same_data
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.training.train import (
    check_engine,
    check_gpus_asked,
    seed_numbers,
    settings_for,
)
from curate.pipeline.training.train_progress import evaluation_progress
from curate.pipeline.training.train_settings import (
    TrainSettings,
    differences,
)

CONFIG, REPORT, DRAWING, TEXT = "config.json", "evaluation.json", "evaluation.svg", "evaluation.txt"

log = logging.getLogger("curate.evaluate")


def evaluate(
    corpus: str | Sequence[str] | Corpus | None = None,
    *,
    manifests: Sequence[str | os.PathLike[str]],
    model: str,
    test: str | Sequence[str] | Corpus,
    seeds: int | Sequence[int] = 5,
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    epochs: int = 10,
    steps: int | None = None,
    match: str = "steps",
    batch_size: int | None = None,
    lr: int | float | None = None,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup: int | float | None = None,
    weight_decay: int | float | None = None,
    clip_norm: int | float | None = None,
    precision: str | None = None,
    device: str | None = None,
    pack: bool = False,
    threads: int | None = None,
    num_gpus: int | float | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    out: str | os.PathLike[str] = "run/evaluate",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on each manifest, on random subsets of their sizes and on all; return the report.

    `corpus` is all the data; where none is named, what the manifests select from. Every arm is
    trained once per seed with the same settings and, unless `match="epochs"`, for the same steps,
    then tested on `test`: accuracy for classification, mean loss per token for language. A random
    subset is drawn anew for each seed. The report has each result, means with 95 % t intervals, and
    paired tests over seeds against random and against all data; it is also written to `out` as
    JSON, text and a drawing. `format_report` turns it into text.

    Results are kept as they come: a run that was killed goes on when called again, and manifests
    and seeds can be added.

    Raises:
        ValueError: something given is wrong, or `out` holds another configuration or something
            else.
    """
    opened = _read(manifests)
    settings = settings_for(
        _common_corpus(opened) if corpus is None else corpus,
        model=model,
        task=task,
        task_options=task_options,
        model_options=model_options,
        epochs=epochs,
        steps=steps,
        save_steps=(),
        match=match,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        precision=precision,
        device=device,
        pack=pack,
        threads=threads,
        records=False,
        out=out,
    )
    check_engine(engine)
    check_gpus_asked(num_gpus)
    tested = test if isinstance(test, Corpus) else open_corpus(test)
    _check_test(settings, tested)
    plan = Plan(settings, tested, settings.out)
    arms = arms_of(settings, opened)
    numbers = seed_numbers(seeds)
    folder = Folder(plan.out)
    is_ours = _refuse_other(folder, _config(plan), overwrite)
    if is_ours and overwrite and engine == "ray":
        from curate.pipeline.ray_cluster import check_cluster

        check_cluster(ray_address, num_gpus, "a training", plan.out)
    with RunLock(folder):
        if is_ours and overwrite:  # not before: another process may be at work there
            _clear(Path(plan.out))
        folder.write_json(CONFIG, _config(plan))
        missing = [
            (plan, arm, seed)
            for seed in numbers
            for arm in arms
            if not folder.exists(arm.result_name(seed))
        ]
        try:
            _run(missing, settings, engine, ray_address, num_gpus, progress)
        finally:
            release_rows()
        shutil.rmtree(f"{plan.out}/training", ignore_errors=True)  # all that is left is empty
        report = _written_report(plan, arms, numbers)
    return report


def _read(manifests: Sequence[str | os.PathLike[str]]) -> list[Manifest]:
    if not manifests:
        raise ValueError("evaluate needs at least one manifest; make one with `curate select`")
    return [Manifest.read(os.fspath(path)) for path in manifests]


def _common_corpus(manifests: Sequence[Manifest]) -> Corpus:
    """Return the corpus that all manifests select from.

    Raises:
        ValueError: they select from different data, or the data changed or is missing.
    """
    first = manifests[0].content["corpus"]
    for other in manifests[1:]:
        if not same_data(first, theirs := other.content["corpus"]):
            raise ValueError(
                f"{manifests[0].path} selects from {first['uri']} and {other.path} from "
                f"{theirs['uri']}: compare selections of the same data"
            )
    return manifests[0].corpus


def arms_of(settings: TrainSettings, manifests: Sequence[Manifest]) -> list[Arm]:
    """Return all that is compared: everything, each manifest, random subsets of their sizes.

    Raises:
        ValueError: a manifest keeps nothing, is of another corpus, or twice there.
    """
    names = _short_names([m.path for m in manifests])
    rows = settings.corpus.rows
    arms = [Arm("full", "full", rows, "full")]
    for name, manifest in zip(names, manifests, strict=True):
        settings.on_manifest(manifest.path)  # refuses other corpora and empty selections
        arms.append(
            Arm(name, "subset", len(manifest), _method(manifest), manifest.path, manifest.digest)
        )
    twice = [a.name for i, a in enumerate(arms) if a.key in {b.key for b in arms[:i]}]
    if twice:
        raise ValueError(f"manifest {twice[0]} is the same selection as another one given")
    sizes = sorted({a.kept for a in arms if a.kind == "subset"}, reverse=True)
    return arms + [Arm(f"random-{size}", "random", size, "random") for size in sizes]


def _method(manifest: Manifest) -> str:
    selection = manifest.content["selection"]
    by = selection.get("by")
    return f"{selection['method']} by {by}" if by else str(selection["method"])


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the ends of the paths, as long as it takes to tell them apart."""
    parts = [Path(p.replace("://", "/")).parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _check_test(settings: TrainSettings, test: Corpus) -> None:
    if not test.rows:
        raise ValueError(f"the test corpus {test.uri} has no rows")
    try:
        task_from_description(settings.task, test).columns(test.schema)
    except ValueError as problem:
        raise ValueError(f"{test.uri} is no test corpus for this: {problem}") from None
    if test.digest == settings.corpus.digest:
        log.warning("the test corpus is the training corpus: results say nothing about new data")


def _config(plan: Plan) -> dict[str, Any]:
    trained = plan.settings.to_json()
    for per_arm in ("selected", "save_epochs", "save_steps", "manifest_digest", "records"):
        del trained[per_arm]
    test = {"digest": plan.test.digest, "rows": plan.test.rows}
    return {"format": f"{FORMAT}_config", "version": VERSION, **trained, "test": test}


def _refuse_other(out: Folder, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether `out` holds an evaluation: this one, or any that may be overwritten.

    Raises:
        ValueError: it holds another one, or something else.
    """
    ours = out.exists(CONFIG)
    others = [n for n in (*out.names(), *out.folders()) if not n.startswith((".", "_lock"))]
    if others and not ours:
        raise ValueError(f"{out.uri} holds something else ({others[0]}); choose another folder")
    if ours and not overwrite and (changed := differences(out.read_json(CONFIG), config)):
        raise ValueError(
            f"{out.uri} was evaluated with another configuration ({'; '.join(changed)}); "
            "choose another folder, or --overwrite"
        )
    return ours


def _clear(out: Path) -> None:
    """Remove what would be taken for this evaluation's: results, samples, half-trained models."""
    for folder in (out / "results", out / "random", out / "training"):
        if folder.exists():
            shutil.rmtree(folder)


def _run(
    jobs: Sequence[tuple[Plan, Arm, int]],
    settings: TrainSettings,
    engine: str,
    address: str | None,
    num_gpus: int | float | None,
    progress: bool,
) -> None:
    if not jobs:
        return
    with evaluation_progress(len(jobs), progress) as said:
        if engine == "ray":
            from curate.pipeline.training.ray_training import RayShare, results_on_ray

            share = RayShare.of(settings, num_gpus, address)
            for (_, arm, seed), result in results_on_ray(run_arm, jobs, share):
                said(f"{arm.name} seed {seed}: {result['value']:.4f}")
            return
        for plan, arm, seed in jobs:
            result = run_arm(plan, arm, seed)
            said(f"{arm.name} seed {seed}: {result['value']:.4f}")


def _written_report(plan: Plan, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, Any]:
    folder = Folder(plan.out)
    results = {arm.key: [folder.read_json(arm.result_name(s)) for s in seeds] for arm in arms}
    report = evaluation_report(plan, arms, seeds, results)
    folder.write_json(REPORT, report)
    folder.replace(TEXT, format_report(report).encode() + b"\n")
    folder.replace(DRAWING, draw(report).encode())
    return report
