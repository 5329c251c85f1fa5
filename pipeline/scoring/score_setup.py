"""What a scoring run is, worked out and checked before anything runs."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import curate
from curate.pipeline.models.adapters import base_digest, base_folder, is_adapter
from curate.pipeline.models.checkpoint import Checkpoint, find_checkpoints, records_path
from curate.pipeline.models.models import absolute_model, model_args
from curate.pipeline.models.moments import moments_digest
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.batch_plan import BatchPlan, window_rows
from curate.pipeline.scoring.gio_steps import described as described_gio
from curate.pipeline.scoring.gio_steps import stores_for
from curate.pipeline.scoring.reference import (
    References,
    check_references,
    describe,
    last_checkpoints,
    resolved,
)
from curate.pipeline.scoring.score_table import FORMAT, VERSION
from curate.pipeline.scoring.store_plan import described, plan_stores, window_limit
from curate.pipeline.scoring.target import Given, find_target
from curate.pipeline.scoring.text_weights import (
    compares_texts_only,
    find_text_target,
    text_columns,
    text_task,
)
from curate.pipeline.scoring.validity import refuse_settings
from curate.pipeline.scoring.work import (
    Work,
    has_groups,
    model_signals,
    needs_checkpoints,
    needs_moments,
    record_signals,
    table_signals,
    text_signals,
)
from curate.pipeline.storing.storage import Folder, canonical_json
from curate.pipeline.tasks.guess import guess_aloud
from curate.pipeline.tasks.registry import make_task, task_from_description
from curate.pipeline.tasks.task import Task
from curate.pipeline.training.records import read_records
from curate.pipeline.user_code import file_digest, is_user_code
from curate.scorers.protocol import Scorer
from curate.scorers.registry import make_scorers, scorer_spec
from curate.selectors.settings import did_you_mean

log = logging.getLogger("curate.score")

LANGUAGE = frozenset({"causal_lm", "seq2seq"})
CHECKPOINTS = "run/checkpoints"
"""Where checkpoints are unless the caller says so."""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a process that `ray job submit` started."""
PLACES = ("tokenizer", "root")
"""Parts of a task's description that tell where files lie, not what is computed."""


@dataclass(frozen=True)
class Request:
    """What the caller asked for, as given."""

    corpus: Corpus
    checkpoints: str | os.PathLike[str] | Sequence[str] | None
    scorers: str | Sequence[str]
    target: Given | None = None
    target_group: str | None = None
    reference: References | None = None
    keep: Sequence[str] | None = None
    store: str | Sequence[str] | None = None
    sketch: str | None = None
    top_rows: int | None = None
    similarity: str | None = None
    model: str | None = None
    task: str | None = None
    task_options: Mapping[str, Any] | None = None
    keep_checkpoints: bool = False
    keep_groups: bool = False
    batch_rows: int | None = None
    batch_tokens: int | None = None
    unit_rows: int | None = None
    max_bad_rows: int | None = None
    out: str = "run/scores"


@dataclass(frozen=True)
class Setup:
    """A checked run: the work, and the `_meta.json` that says what it is."""

    work: Work
    meta: dict[str, Any]


def set_up(request: Request) -> Setup:
    """Return the run that was asked for.

    Raises:
        ValueError: something is missing or does not fit; one sentence says what.
    """
    corpus = request.corpus
    has_stores = bool(request.store or request.sketch or request.top_rows is not None)
    scorers = make_scorers(request.scorers) if request.scorers or not has_stores else {}
    has_stores = has_stores or bool(stores_for(scorers))
    references = last_checkpoints(request.reference)
    scorers = resolved(scorers, references)
    given = request.checkpoints
    if given is None and (has_stores or needs_checkpoints(scorers)):
        given = CHECKPOINTS
    request = replace(request, checkpoints=given)
    found = [] if given is None else find_checkpoints(given)
    request = replace(request, model=_model(request, found))
    task = _task(request, found)
    columns = task.columns(corpus.schema)
    if text_signals(scorers):
        text_columns(task, corpus.schema, "the corpus")
    keep = _keep(request.keep, columns.label, corpus.schema)
    description: dict[str, Any] = json.loads(json.dumps(task.describe()))
    if request.unit_rows is not None and request.unit_rows < 1:
        raise ValueError(f"unit_rows must be at least 1, got {request.unit_rows}")
    asked = [request.store] if isinstance(request.store, str) else request.store or []
    stores = plan_stores(
        [*asked, *stores_for(scorers)],
        request.sketch,
        request.top_rows,
        request.similarity,
        task,
        request.target is not None,
    )
    if request.keep_groups and not any(map(has_groups, scorers.values())):
        raise ValueError(
            "--keep-groups keeps what each group of a target gives: ask for a scorer that "
            "compares rows with one, such as grad_similarity"
        )
    takes_target = stores is not None or bool(table_signals(scorers))
    work = Work(
        run="",
        out=Folder(request.out).uri,
        corpus=corpus,
        task=description,
        model=None if request.model is None else absolute_model(request.model),
        checkpoints=tuple(found),
        scorers={alias: scorer_spec(scorer) for alias, scorer in scorers.items()},
        keep=keep,
        id_column=_id_column(columns.id, corpus.schema),
        plan=_plan(request, task, window_limit(stores, found)),
        keep_checkpoints=request.keep_checkpoints,
        keep_groups=request.keep_groups,
        with_tokens=description["kind"] in LANGUAGE
        and bool(stores is not None or model_signals(scorers)),
        max_bad_rows=_max_bad_rows(request),
        records=_records(request, found, scorers),
        target=find_text_target(request.target, request.target_group, task, scorers)
        if compares_texts_only(scorers) and stores is None
        else find_target(request.target, request.target_group, task, scorers, takes_target),
        stores=stores,
        reference=check_references(references, scorers, found, description, corpus),
    )
    config = _config(work, request.unit_rows)
    run = hashlib.sha256(canonical_json(config)).hexdigest()
    work = replace(work, run=run)
    assert work.schema is not None  # refuses names that collide
    _check_standardised(work)
    refuse_settings(work)
    _say_weights(work)
    return Setup(work, _meta(work, config))


def _model(request: Request, found: Sequence[Checkpoint]) -> str | None:
    """Return the model asked for; of adapters, the base model that they are put on."""
    adapters = [(c.path, c.model) for c in found if is_adapter(c.path)]
    if not adapters:
        return request.model
    if whole := [c.path for c in found if not is_adapter(c.path)]:
        raise ValueError(
            f"{adapters[0][0]} holds an adapter and {whole[0]} a whole model: score them apart"
        )
    return base_folder(adapters, request.model)


def _task(request: Request, found: Sequence[Checkpoint]) -> Task:
    """Return the checkpoints' task, or the one asked for where they do not tell."""
    options = dict(request.task_options or {})
    if not found:
        return text_task(request.task, request.corpus, options)
    recorded, corpus = found[0].task, request.corpus
    if recorded is None:
        name = request.task or guess_aloud(corpus.schema)
        is_file = request.model is not None and is_user_code(request.model)  # has no tokenizer
        source = found[0].path if is_file else request.model or found[0].path
        return make_task(name, corpus, model=source, **options)
    kind = recorded["kind"]
    asked = request.task
    if asked is not None and asked != kind and not is_user_code(asked):
        raise ValueError(
            f"checkpoint {found[0].path} was trained for {kind}, not for {asked}: "
            f"leave --task out, or score another checkpoint"
        )
    if asked is not None and is_user_code(asked):
        task = make_task(asked, corpus, model=found[0].path, **options)
        if task.kind != kind:
            raise ValueError(
                f"checkpoint {found[0].path} was trained for {kind}, not for {asked}: "
                f"leave --task out, or score another checkpoint"
            )
        return task
    if set(options) <= {"row_loss"} and (not options or kind in LANGUAGE):
        return task_from_description({**recorded, **options}, corpus)
    task = make_task(recorded.get("path", kind), corpus, model=found[0].path, **options)
    _same_classes(task, recorded, found[0].path)
    return task


def _same_classes(task: Task, recorded: Mapping[str, Any], path: str) -> None:
    ours = list(task.classes or ())
    theirs = list(recorded.get("classes") or ())
    if ours != theirs:
        raise ValueError(
            f"with these task options the corpus has {len(ours)} classes, but checkpoint {path} "
            f"was trained for other {len(theirs)}; leave the options out or give classes=..."
        )


def _keep(asked: Sequence[str] | None, label: str | None, schema: pa.Schema) -> tuple[str, ...]:
    if asked is None:
        return (label,) if label is not None and label in schema.names else ()
    for name in asked:
        if name not in schema.names:
            raise ValueError(
                f"no column {name!r} to keep; the corpus has: {', '.join(schema.names)}"
                + did_you_mean(name, schema.names)
            )
    return tuple(dict.fromkeys(name for name in asked if name != "id"))


def _id_column(of_task: str | None, schema: pa.Schema) -> str | None:
    return of_task or ("id" if "id" in schema.names else None)


def _plan(request: Request, task: Task, most: int | None) -> BatchPlan:
    given = {"batch_rows": request.batch_rows, "batch_tokens": request.batch_tokens}
    asked = {name: value for name, value in given.items() if value is not None}
    rows = window_rows(_row_bytes(request.corpus, task))
    return BatchPlan(**asked, window_rows=rows if most is None else min(rows, most))


def _row_bytes(corpus: Corpus, task: Task) -> float:
    """Return about what a row takes: on disk, or as the model's float32 input if that is more."""
    stored = sum(shard.bytes for shard in corpus.shards) / corpus.rows
    shape = model_args(task, corpus).get("input_shape") or ()
    return max(stored, 4.0 * math.prod(shape)) if shape else stored


def _max_bad_rows(request: Request) -> int:
    if request.max_bad_rows is not None:
        if request.max_bad_rows < 0:
            raise ValueError(f"max_bad_rows must not be negative, got {request.max_bad_rows}")
        return request.max_bad_rows
    return max(10, math.ceil(request.corpus.rows / 1000))


def _records(
    request: Request, found: Sequence[Checkpoint], scorers: Mapping[str, Scorer]
) -> str | None:
    """Return the training records that a scorer needs.

    Raises:
        ValueError: there are none, they lack a seed, or they are of another corpus.
    """
    asked = sorted(s.kind for s in record_signals(scorers))
    if not asked:
        return None
    assert request.checkpoints is not None, "records are of checkpoints"
    path = records_path(request.checkpoints)
    if path is None:
        raise ValueError(
            f"{asked[0]} is read from training records, but there is no records.parquet beside "
            f"{found[0].path}: train with `curate train`, or leave {asked[0]} out"
        )
    seeds = read_records(path, 0, 0, 0)
    for checkpoint in found:
        if checkpoint.seed not in seeds:
            raise ValueError(
                f"{path} has no records of seed {checkpoint.seed}, which {checkpoint.path} is of"
            )
        trained = (checkpoint.corpus or {}).get("digest")
        if trained is not None and trained != request.corpus.digest:
            raise ValueError(
                f"{asked[0]} was recorded while training on other data than {request.corpus.uri}: "
                f"score the corpus that was trained on, or leave {asked[0]} out"
            )
    return path


def _config(work: Work, unit_rows: int | None) -> dict[str, Any]:
    """Return all that decides the values, and nothing that does not: the run id is its digest."""
    task = json.loads(json.dumps(dict(work.task)))
    for place in PLACES:
        task.get("preprocess", {}).pop(place, None)
    if "path" in task:
        task["path"] = file_digest(task["path"])
    model = work.model
    if model is not None and is_user_code(model):
        model = file_digest(model)
    if model is not None and work.checkpoints and is_adapter(work.checkpoints[0].path):
        model = base_digest(model)
    config = {
        "corpus": work.corpus.digest,
        "checkpoints": [[c.seed, c.step, c.epoch, c.lr, c.digest] for c in work.checkpoints],
        "records": None if work.records is None else _file_sha256(work.records),
        "model": model,
        "task": task,
        "scorers": {alias: dict(spec) for alias, spec in work.scorers.items()},
        "scorers_in_order": list(work.scorers),
        "keep": list(work.keep),
        "keep_checkpoints": work.keep_checkpoints,
        "target": None if work.target is None else work.target.config(),
        **({"reference": [c.digest for c in work.reference]} if work.reference else {}),
        "batches": vars(work.plan),
        "unit_rows": unit_rows,
    }
    if work.keep_groups:
        config["keep_groups"] = True
    if work.stores is not None:
        config["stores"] = work.stores.config()
    if vectors := described_gio(work):
        config["gio"] = vectors
    if needs_moments(work.made):
        config["moments"] = [moments_digest(c.path) for c in work.checkpoints]
        config["mean_lr"] = [c.mean_lr for c in work.checkpoints]
    return config


def _meta(work: Work, config: dict[str, Any]) -> dict[str, Any]:
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "run": work.run,
        "corpus": work.corpus.describe(),
        "task": dict(work.task),
        "checkpoints": [
            {
                "path": c.path,
                "digest": c.digest,
                "seed": c.seed,
                "epoch": c.epoch,
                "step": c.step,
                "lr": c.lr,
            }
            for c in work.checkpoints
        ],
        "scorers": {alias: dict(spec) for alias, spec in work.scorers.items()},
        "target": None if work.target is None else work.target.describe(),
        "reference": describe(work.reference),
        "config": config,
        "curate": curate.__version__,
    }
    if work.stores is not None:
        meta["stores"] = described(work.stores)
    plain: dict[str, Any] = json.loads(json.dumps(meta))
    return plain


def _file_sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_standardised(work: Work) -> None:
    """Raise ValueError when the labels that scores are standardised by are not in the table."""
    for alias, how in work.standardised.items():
        if how != "class":
            continue
        if work.label is None or work.label not in work.corpus.schema.names:
            raise ValueError(
                f"{alias} asks for normalise=class, but the task {work.task['kind']} has no "
                "classes: use normalise=dataset or raw"
            )
        if work.label not in work.keep:
            raise ValueError(
                f"{alias} asks for normalise=class, so the score table must hold the label: "
                f"name {work.label} in --keep"
            )


def _say_weights(work: Work) -> None:
    """Tell when sums over checkpoints cannot be weighted by their learning rates."""
    for seed, indices in work.runs.items():
        rates = [work.checkpoints[k].lr for k in indices]
        if len(rates) > 1 and (None in rates or not any(rates)):
            log.warning(
                "seed %d: the checkpoints' learning rates are unknown or zero, so sums over "
                "checkpoints weigh all %d equally",
                seed,
                len(rates),
            )


def threads_for(parameters: int) -> int:
    """Return the threads of a scoring process: what OMP_NUM_THREADS says, else up to eight.

    Below a million parameters a second thread costs more than it brings (up to ten times, from
    spinning): there it is one. Never from how many workers share the machine: results must not
    depend on that. Not part of the run's configuration, but of its plan: a run ends as it began.
    """
    if parameters < 1_000_000:
        return 1
    if RAY_JOB in os.environ:  # there Ray sets the variable, by what it gives the job's first actor
        return min(8, os.cpu_count() or 1)
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # outermost level
    if first.isdecimal() and int(first):
        return int(first)
    return min(8, os.cpu_count() or 1)


def device_for(num_gpus: float | None) -> str:
    """Return the device of a process here: the GPU where there is one, unless told otherwise."""
    return "cuda" if torch.cuda.is_available() and num_gpus != 0 else "cpu"
