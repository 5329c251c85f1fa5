"""Training: short proxy runs over seeds, and the downstream training on a manifest."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.manifest import NAME as MANIFEST
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.models.checkpoint import Checkpoint, find_checkpoints
from curate.pipeline.models.models import absolute_model, make_model, model_args
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder, absolute
from curate.pipeline.tasks.causal_lm import CausalLM
from curate.pipeline.tasks.guess import guess_aloud
from curate.pipeline.tasks.registry import make_task
from curate.pipeline.tasks.task import Task
from curate.pipeline.training.encoded_rows import CHUNK_ROWS, BadRows, encode
from curate.pipeline.training.records import RECORDS, merge_records, recorded_seeds
from curate.pipeline.training.reproducible import reproducible
from curate.pipeline.training.train_progress import train_progress
from curate.pipeline.training.train_settings import (
    TrainSettings,
    default_device,
    default_precision,
    default_rate,
    default_threads,
    differences,
    recipe,
)
from curate.pipeline.training.trainer import (
    SeedReceipt,
    TrainingRows,
    is_finished,
    seed_folder,
    train_seed,
)

CONFIG = "train.json"
FORMAT, VERSION = "curate.training", 1
Engine = Literal["local", "ray"]

log = logging.getLogger("curate.train")


def train(
    corpus: str | Sequence[str] | Corpus | None = None,
    *,
    model: str,
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    seeds: int | Sequence[int] = 3,
    epochs: int = 10,
    steps: int | None = None,
    save_epochs: Sequence[int] | None = None,
    save_steps: Sequence[int] | None = None,
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
    save_moments: bool = False,
    null_input: bool = False,
    threads: int | None = None,
    num_gpus: int | float | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    out: str | os.PathLike[str] = "run/checkpoints",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Checkpoint]:
    """Train `model` once per seed and return the checkpoints, ordered by seed and step.

    With a manifest, on its rows (of its own corpus or mixture where none is named): as many steps
    as the whole corpus would take (`match="steps"`), or `epochs` over the selection
    (`match="epochs"`). Step 0 is `save_epochs=[0]`; by default checkpoints stand at a fifth, a half
    and the end. What is not given is usual for the model:
    `train_settings.recipe`. `model_options` are the model's own arguments. `pack` puts documents
    end to end (then nothing is recorded per row). With `null_input` every row's input is the task's
    empty one: a reference for the score pvi. `save_moments` writes Adam's moments beside the
    weights of each checkpoint, which mode=less and curvature=adam need. `num_gpus` is what a seed
    takes of a Ray node's GPUs. `threads` are CPU threads; by default CURATE_THREADS, or one for
    models so small that several only wait for each other, else torch's number.

    A run that was killed goes on when called again, and ends with the same bytes; finished seeds
    are not trained again; more seeds can be added. `overwrite` starts afresh.

    Raises:
        ValueError: something given is wrong, `out` holds another configuration (the difference is
            in the message) or something else, or the loss stops being finite.
    """
    settings = settings_for(
        corpus,
        model=model,
        task=task,
        task_options=task_options,
        model_options=model_options,
        manifest=None if manifest is None else os.fspath(manifest),
        epochs=epochs,
        steps=steps,
        save_epochs=save_epochs,
        save_steps=save_steps,
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
        save_moments=save_moments,
        null_input=null_input,
        threads=threads,
        out=out,
    )
    return run_training(
        settings,
        seed_numbers(seeds),
        engine=engine,
        ray_address=ray_address,
        num_gpus=num_gpus,
        overwrite=overwrite,
        progress=progress,
    )


def settings_for(
    corpus: str | Sequence[str] | Corpus | None,
    *,
    model: str,
    out: str | os.PathLike[str],
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    manifest: str | None = None,
    epochs: int = 10,
    steps: int | None = None,
    save_epochs: Sequence[int] | None = None,
    save_steps: Sequence[int] | None = None,
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
    save_moments: bool = False,
    null_input: bool = False,
    threads: int | None = None,
    records: bool = True,
) -> TrainSettings:
    """Return checked settings with every default filled in. Nothing is written.

    One batch goes through the model here, so that a model that does not fit the task is refused
    before anything starts.
    """
    opened = _opened(corpus, manifest)
    made = _task(opened, task, task_options, model)
    usual, device = recipe(model), device or default_device()
    settings = TrainSettings(
        corpus=opened,
        task=made.describe(),
        model=absolute_model(model),
        model_args=model_args(made, opened) | dict(model_options or {}),
        manifest=None if manifest is None else absolute(manifest),
        selected=opened.rows,
        epochs=epochs,
        steps=steps,
        match=match,
        batch_size=usual.batch_size if batch_size is None else batch_size,
        lr=default_rate(model, optimizer) if lr is None else lr,
        optimizer=optimizer,
        schedule=schedule,
        warmup=usual.warmup if warmup is None else warmup,
        weight_decay=usual.weight_decay if weight_decay is None else weight_decay,
        clip_norm=usual.clip_norm if clip_norm is None else clip_norm,
        precision=precision or default_precision(device),
        device=device,
        threads=default_threads() if threads is None else threads,
        save_epochs=None if save_epochs is None else tuple(save_epochs),
        save_steps=None if save_steps is None else tuple(save_steps),
        pack=pack,
        save_moments=save_moments,
        null_input=null_input,
        records=records and not pack,
        out=_local(out),
    )
    if pack and not isinstance(made, CausalLM):
        raise ValueError(f"only documents of causal_lm can be packed, not rows of {made.kind}")
    if pack and null_input:
        raise ValueError(
            "packed documents have no inputs that could be empty: leave one of them out"
        )
    if manifest is not None:
        settings = settings.on_manifest(manifest)
    flops = _step_flops(settings, made)
    return settings if threads is not None else settings.with_threads(flops)


def run_training(
    settings: TrainSettings,
    seeds: Sequence[int],
    *,
    engine: str = "local",
    ray_address: str | None = None,
    num_gpus: int | float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Checkpoint]:
    """Train what is not finished of these seeds and return their checkpoints."""
    check_engine(engine)
    check_gpus_asked(num_gpus)
    out = Folder(settings.out)
    is_ours = _refuse_other(out, settings, overwrite)
    if is_ours and overwrite and engine == "ray":
        from curate.pipeline.ray_cluster import check_cluster

        check_cluster(ray_address, num_gpus, "a training", settings.out)
    with RunLock(out):
        if is_ours and overwrite:  # not before: another process may be at work there
            _clear(Path(out.uri))
        out.write_json(CONFIG, _config(settings))
        missing = [s for s in seeds if not is_finished(settings, s)]
        for seed in sorted({*seeds} - {*missing}):
            log.info("seed %d is trained already", seed)
        if engine == "ray" and missing:
            receipts = _train_on_ray(settings, missing, ray_address, num_gpus)
        else:
            receipts = _train_here(settings, missing, progress)
        _say_bad_rows(receipts)
        _finish(out, settings, seeds)
    paths = [out.full_name(p.folder(s)) for s in seeds for p in settings.points]
    return find_checkpoints(paths)


def seed_numbers(seeds: int | Sequence[int]) -> list[int]:
    """Return the seeds meant: `3` means 0, 1, 2."""
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        got = seeds if isinstance(seeds, int) else list(seeds)
        raise ValueError(f"seeds must be a number above 0 or different numbers from 0, got {got}")
    return numbers


def check_engine(engine: str) -> None:
    """Raise ValueError for the name of an engine that there is not."""
    if engine not in get_args(Engine):
        raise ValueError(f"unknown engine {engine!r}; choose one of: {', '.join(get_args(Engine))}")


def check_gpus_asked(num_gpus: int | float | None) -> None:
    """Raise ValueError for a number of GPUs below 0."""
    if num_gpus is not None and num_gpus < 0:
        raise ValueError(f"num_gpus must not be negative, got {num_gpus}")


def _opened(corpus: str | Sequence[str] | Corpus | None, manifest: str | None) -> Corpus:
    if isinstance(corpus, Corpus):
        return corpus
    if corpus is not None:
        if isinstance(corpus, str) and Folder(corpus).exists(MANIFEST):
            raise ValueError(
                f"{corpus} is a manifest, not a corpus; name it behind a --manifest of its own"
            )
        return open_corpus(corpus)
    if manifest is None:
        raise ValueError("name what to train on: a corpus, or a manifest, which knows its own")
    return load_manifest(manifest).corpus


def _task(corpus: Corpus, task: str | None, options: Mapping[str, Any] | None, model: str) -> Task:
    if not corpus.rows:
        raise ValueError(f"the corpus {corpus.uri} has no rows")
    if task is None:
        task = guess_aloud(corpus.schema, (options or {}).get("label"))
    return make_task(task, corpus, model=model, **(options or {}))


def _local(out: str | os.PathLike[str]) -> str:
    place = Folder(out)
    if place.is_remote:
        raise ValueError(f"checkpoints are written to a local or mounted folder, not to {out}")
    return place.uri


def _step_flops(settings: TrainSettings, task: Task) -> float:
    """Return the operations of a step's forward pass, judged by the first usable rows.

    Raises:
        ValueError: no row of the first thousand can be used, or the model does not read them.
    """
    columns = task.columns(settings.corpus.schema).all
    source, bad = RowSource.of_corpus(settings.corpus, columns), BadRows(said=0)
    first = source.take(np.arange(min(CHUNK_ROWS, len(source))))
    encoded, _ = encode(task, first.slice(0, 4), bad)
    if encoded is None:
        encoded, _ = encode(task, first, bad)
    if encoded is None:
        raise ValueError(f"no row of {settings.corpus.uri} can be trained on; {bad.first()}")
    with reproducible(settings.threads, "cpu"):
        probe = make_model(settings.model, **settings.model_args).eval()
        batch = task.collate(encoded)
        if settings.null_input:
            batch = task.blank(batch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _outputs_of(task, probe, batch, settings.model)
    return float(counter.get_total_flops()) / batch.rows * settings.batch_size


def _outputs_of(task: Task, model: nn.Module, batch: Any, name: str) -> None:
    try:
        outputs = task.outputs(model, batch)
    except (RuntimeError, TypeError, IndexError) as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name!r} does not fit the task {task.kind}: {said}") from error
    if outputs.loss.shape != (batch.rows,):
        raise ValueError(
            f"task {task.kind} gives losses of shape {list(outputs.loss.shape)} "
            f"for {batch.rows} rows; expected one loss per row"
        )


def _config(settings: TrainSettings) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **settings.to_json()}


def _refuse_other(out: Folder, settings: TrainSettings, overwrite: bool) -> bool:
    """Return whether `out` holds a training: this one, or any that may be overwritten.

    Raises:
        ValueError: it holds another configuration, or something that is no training.
    """
    ours = out.exists(CONFIG)
    others = [n for n in (*out.names(), *out.folders()) if not n.startswith((".", "_lock"))]
    if others and not ours:
        raise ValueError(f"{out.uri} holds something else ({others[0]}); choose another folder")
    if ours and not overwrite:
        changed = differences(out.read_json(CONFIG), _config(settings))
        if changed:
            raise ValueError(
                f"{out.uri} was trained with another configuration ({'; '.join(changed)}); "
                "choose another folder, or --overwrite"
            )
    return ours


def _clear(out: Path) -> None:
    """Remove what training wrote, the configuration last."""
    for folder in (*out.glob("seed*-epoch*"), *out.glob("seed*-step*"), out / "progress"):
        if folder.name == "progress" or (folder / "curate.json").is_file():
            shutil.rmtree(folder, ignore_errors=folder.name == "progress")
    for name in (RECORDS, CONFIG):
        (out / name).unlink(missing_ok=True)


def _train_here(settings: TrainSettings, seeds: Sequence[int], progress: bool) -> list[SeedReceipt]:
    if not seeds:
        return []
    rows, receipts = TrainingRows.of(settings), []
    for seed in seeds:
        with closing(train_progress(f"seed {seed}", settings.length.steps, progress)) as shown:
            receipts.append(train_seed(settings, seed, shown.report, rows))
    return receipts


def _train_on_ray(
    settings: TrainSettings, seeds: Sequence[int], address: str | None, num_gpus: int | float | None
) -> list[SeedReceipt]:
    from curate.pipeline.training.ray_training import RayShare, results_on_ray

    share = RayShare.of(settings, num_gpus, address)
    receipts = []
    jobs = [(settings, seed) for seed in seeds]
    for (_, seed), receipt in results_on_ray(train_seed, jobs, share):
        receipts.append(receipt)
        log.info(
            "seed %d: %d steps in %.1f s (%d of %d seeds)",
            seed,
            receipt.steps,
            receipt.seconds,
            len(receipts),
            len(seeds),
        )
    return receipts


def _say_bad_rows(receipts: Sequence[SeedReceipt]) -> None:
    bad = {(shard, row): why for r in receipts for shard, row, why in r.bad_rows}
    if bad:
        (shard, row), why = min(bad.items())
        log.warning(
            "%d rows were left out of training; the first: row %d of shard %d: %s",
            len(bad),
            row,
            shard,
            why,
        )


def _finish(out: Folder, settings: TrainSettings, seeds: Sequence[int]) -> None:
    """Bring the seeds' records together and remove their progress."""
    parts = {s: seed_folder(settings.out, s) for s in seeds}
    fresh = {s: f for s, f in parts.items() if f.exists(RECORDS)}
    if fresh:
        merge_records(out, fresh)
    recorded = recorded_seeds(out)
    for seed, folder in parts.items():
        if not settings.records or seed in recorded:
            shutil.rmtree(folder.uri, ignore_errors=True)
    progress = Path(out.uri) / "progress"
    if progress.is_dir() and not any(progress.iterdir()):
        progress.rmdir()
