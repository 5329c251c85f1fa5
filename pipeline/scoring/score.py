"""`score`: every row of a corpus, at every checkpoint, by every scorer asked for, in one pass."""

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.scoring.aggregate import aggregates
from curate.pipeline.scoring.attempts import forget_attempts
from curate.pipeline.scoring.curvature_factors import curvature_notes
from curate.pipeline.scoring.gio_steps import gio_steps, with_steps
from curate.pipeline.scoring.score_folder import clear, finish, refuse_foreign, refuse_other_run
from curate.pipeline.scoring.score_progress import duration
from curate.pipeline.scoring.score_run import ScoringRun
from curate.pipeline.scoring.score_setup import Request, Setup, device_for, set_up, threads_for
from curate.pipeline.scoring.score_table import META, SUCCESS, UNITS, ScoreTable, part_name
from curate.pipeline.scoring.score_unit import score_unit
from curate.pipeline.scoring.scoring_worker import ScoringWorker
from curate.pipeline.scoring.sizing import Sizing, first_checkpoint_only, parameter_count, size_up
from curate.pipeline.scoring.standardise import forget_raw, standardise
from curate.pipeline.scoring.step_zero import input_norm_correlations, warn_of_step_zero
from curate.pipeline.scoring.store_plan import UNIT_BYTES
from curate.pipeline.scoring.target_gradients import sketch_errors
from curate.pipeline.scoring.top_rows_table import write_top_rows
from curate.pipeline.scoring.units import (
    Unit,
    plan_units,
    planned_threads,
    read_units,
    rows_per_unit,
    write_units,
)
from curate.pipeline.scoring.validity import warn_of_settings
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder, canonical_json

log = logging.getLogger("curate.score")

RAY_SECONDS = 600.0
"""A job estimated to take longer goes to Ray by default, where several workers can share it."""
JOB_FOLDER = "runtime_resources/working_dir_files"


@dataclass(frozen=True)
class ScorePlan:
    """What a run would do. `seconds` is for one worker, from timed batches."""

    rows: int
    rows_done: int
    units: int
    checkpoints: int
    references: int
    scorers: tuple[str, ...]
    tokens: int | None
    seconds: float
    engine: str
    out: str

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {"kind": "plan", **vars(self), "scorers": list(self.scorers)}


@overload
def score(
    corpus: str | os.PathLike[str] | Sequence[str] | Corpus,
    *,
    checkpoints: str | os.PathLike[str] | Sequence[str] | None = ...,
    scorers: str | Sequence[str] = ...,
    target: str | os.PathLike[str] | Sequence[str] | Corpus | None = ...,
    target_group: str | None = ...,
    reference: str | os.PathLike[str] | Sequence[str] | None = ...,
    store: str | Sequence[str] | None = ...,
    sketch: str | None = ...,
    top_rows: int | None = ...,
    similarity: str | None = ...,
    keep: Sequence[str] | None = ...,
    model: str | None = ...,
    task: str | None = ...,
    task_options: dict[str, Any] | None = ...,
    engine: str = ...,
    workers: int | None = ...,
    num_gpus: float | None = ...,
    ray_address: str | None = ...,
    batch_rows: int | None = ...,
    batch_tokens: int | None = ...,
    unit_rows: int | None = ...,
    keep_checkpoints: bool = ...,
    keep_groups: bool = ...,
    max_bad_rows: int | None = ...,
    threads: int | None = ...,
    out: str | os.PathLike[str] = ...,
    overwrite: bool = ...,
    dry_run: Literal[False] = ...,
    progress: bool = ...,
) -> ScoreTable: ...


@overload
def score(
    corpus: str | os.PathLike[str] | Sequence[str] | Corpus,
    *,
    checkpoints: str | os.PathLike[str] | Sequence[str] | None = ...,
    scorers: str | Sequence[str] = ...,
    target: str | os.PathLike[str] | Sequence[str] | Corpus | None = ...,
    target_group: str | None = ...,
    reference: str | os.PathLike[str] | Sequence[str] | None = ...,
    store: str | Sequence[str] | None = ...,
    sketch: str | None = ...,
    top_rows: int | None = ...,
    similarity: str | None = ...,
    keep: Sequence[str] | None = ...,
    model: str | None = ...,
    task: str | None = ...,
    task_options: dict[str, Any] | None = ...,
    engine: str = ...,
    workers: int | None = ...,
    num_gpus: float | None = ...,
    ray_address: str | None = ...,
    batch_rows: int | None = ...,
    batch_tokens: int | None = ...,
    unit_rows: int | None = ...,
    keep_checkpoints: bool = ...,
    keep_groups: bool = ...,
    max_bad_rows: int | None = ...,
    threads: int | None = ...,
    out: str | os.PathLike[str] = ...,
    overwrite: bool = ...,
    dry_run: bool,
    progress: bool = ...,
) -> ScoreTable | ScorePlan: ...


def score(
    corpus: str | os.PathLike[str] | Sequence[str] | Corpus,
    *,
    checkpoints: str | os.PathLike[str] | Sequence[str] | None = None,
    scorers: str | Sequence[str] = (),
    target: str | os.PathLike[str] | Sequence[str] | Corpus | None = None,
    target_group: str | None = None,
    reference: str | os.PathLike[str] | Sequence[str] | None = None,
    store: str | Sequence[str] | None = None,
    sketch: str | None = None,
    top_rows: int | None = None,
    similarity: str | None = None,
    keep: Sequence[str] | None = None,
    model: str | None = None,
    task: str | None = None,
    task_options: dict[str, Any] | None = None,
    engine: str = "auto",
    workers: int | None = None,
    num_gpus: float | None = None,
    ray_address: str | None = None,
    batch_rows: int | None = None,
    batch_tokens: int | None = None,
    unit_rows: int | None = None,
    keep_checkpoints: bool = False,
    keep_groups: bool = False,
    max_bad_rows: int | None = None,
    threads: int | None = None,
    out: str | os.PathLike[str] = "run/scores",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> ScoreTable | ScorePlan:
    """Return the finished score table of a corpus; run it again to resume after a kill.

    Every row gets one value per scorer: reduced over the checkpoints of a seed, then the mean over
    seeds. `keep` are corpus columns to copy (None: the label). A row that cannot be scored has
    nulls and its `error`; more of them than `max_bad_rows` (max(10, 0.1 %)) stop the run. A unit
    that kills its process three times is quarantined, see `ScoreTable.success["quarantined"]`.

    `target` is a small corpus that scorers such as grad_similarity compare rows with, in groups by
    class where the task has classes, or by the column `target_group` ("none": all in one);
    `keep_groups` also writes what each group alone would give.

    `store` (embedding, probs, sketch) and `sketch` (32x32 for every parameter, 4096 for the whole
    gradient) keep vectors of rows beside the scores, from the same pass; see `open_store`. No
    scorer need be named then. `top_rows` of a target writes, for each of its rows, that many rows
    that are nearest to it and farthest from it, by the `similarity` (cosine or dot) of gradients:
    sketches find candidates, whole gradients decide among them.

    `engine` is `local` (this process), `ray` (a pool of `workers`, each with `num_gpus`, here or
    at `ray_address`) or `auto`. `threads` of a worker are by default one for a small model, else
    OMP_NUM_THREADS or up to eight, however many workers there are: the same bytes on either engine.

    With `overwrite` an older table goes when the new run is ready for its first unit: settings,
    columns, target, the first checkpoint's model on the first rows, and the cluster are in order.
    With `dry_run` nothing is written and the plan comes back, with a time from a few batches.

    Raises:
        ValueError: wrong input, or the folder holds another run or something else.
        RuntimeError: another run is at work in the folder, too many rows are bad, workers die.
    """
    _check_engine(engine, workers, num_gpus, ray_address, out)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    opened = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
    setup = set_up(
        Request(
            opened,
            checkpoints,
            scorers,
            target=target,
            target_group=target_group,
            reference=reference,
            store=store,
            sketch=sketch,
            top_rows=top_rows,
            similarity=similarity,
            keep=keep,
            model=model,
            task=task,
            task_options=task_options,
            keep_checkpoints=keep_checkpoints,
            keep_groups=keep_groups,
            batch_rows=batch_rows,
            batch_tokens=batch_tokens,
            unit_rows=unit_rows,
            max_bad_rows=max_bad_rows,
            out=os.fspath(out),
        )
    )
    chosen = _Engine(engine, workers, num_gpus, ray_address)
    folder = Folder(setup.work.out)
    refuse_foreign(folder)
    has_run = not overwrite and refuse_other_run(folder, setup.meta, opened)
    threads = threads or (planned_threads(folder) if has_run else None)
    work = replace(
        setup.work,
        threads=threads or threads_for(parameter_count(setup.work)),
        device=chosen.device(),
    )
    if dry_run:
        return _dry_run(work, folder, has_run, unit_rows, chosen)
    if has_run and folder.exists(SUCCESS):
        log.info("%s is finished already", folder.uri)
        return ScoreTable.open(folder.uri)
    with RunLock(folder) as lock, _unplanned_removed(folder):
        is_ours = not overwrite and refuse_other_run(folder, setup.meta, opened)
        if folder.exists(META) and not is_ours:
            if folder.exists(UNITS):
                _try_out(work, chosen)
            clear(folder)
        _run(replace(setup, work=work), folder, lock, chosen, unit_rows, progress)
    return ScoreTable.open(folder.uri)


@contextlib.contextmanager
def _unplanned_removed(folder: Folder) -> Iterator[None]:
    """Remove what is there of a run that is refused before its units are planned."""
    try:
        yield
    except ValueError:
        if not folder.exists(UNITS):
            clear(folder)
        raise


@dataclass(frozen=True)
class _Engine:
    """Where to run, as asked."""

    name: str
    workers: int | None
    num_gpus: float | None
    ray_address: str | None

    def device(self) -> str:
        return device_for(self.num_gpus)

    def device_kind(self) -> str:
        """Return what workers run on: a cluster may have GPUs that this machine lacks."""
        return "cuda" if self.name != "local" and self.num_gpus else self.device()

    @property
    def is_ray(self) -> bool:
        """Tell whether Ray was asked for, by name or by what only Ray has."""
        several = bool(self.ray_address) or (self.workers or 1) > 1
        return self.name == "ray" or (self.name == "auto" and several)

    def choose(self, seconds: float) -> str:
        """Return `local` or `ray`, and say why where that was left to us."""
        if self.name != "auto" or self.is_ray:
            return "ray" if self.is_ray else "local"
        name = "ray" if seconds > RAY_SECONDS and (os.cpu_count() or 1) > 1 else "local"
        log.info("engine: %s, for about %s of scoring on one worker", name, duration(seconds))
        return name


def _check_engine(
    engine: str,
    workers: int | None,
    num_gpus: float | None,
    ray_address: str | None,
    out: str | os.PathLike[str],
) -> None:
    if engine not in ("auto", "local", "ray"):
        raise ValueError(f"unknown engine {engine!r}; choose one of: auto, local, ray")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if num_gpus is not None and num_gpus < 0:
        raise ValueError(f"num_gpus must not be negative, got {num_gpus}")
    if engine == "local" and (ray_address is not None or (workers or 1) > 1):
        raise ValueError("workers and ray_address are for --engine ray; local is one process")
    if JOB_FOLDER in os.getcwd() and "://" not in str(out) and not os.path.isabs(out):
        raise ValueError(
            f"{out} is relative to a folder that Ray deletes with the job; give --out an absolute "
            f"path or a URL"
        )


def _run(
    setup: Setup,
    folder: Folder,
    lock: RunLock,
    engine: _Engine,
    unit_rows: int | None,
    show: bool,
) -> None:
    work = setup.work
    folder.create(META, canonical_json(setup.meta))
    folder.clean_tmp(math.inf)  # of dead writers alone: what they wrote of a store may be large
    is_step_zero = warn_of_step_zero(work)
    outside = warn_of_settings(work)
    sizing, worker = Sizing(0.0, 0.0), None
    if not folder.exists(UNITS) or not _is_done(work, folder):
        sizing, worker = _check_model(work, lock, engine)
    if not folder.exists(UNITS):
        write_units(folder, _plan_units(work, sizing, unit_rows), work.threads)
    units = read_units(folder)
    run = ScoringRun(work, units, lock)
    run.check_bad_rows()
    if run.todo:
        if run.done:
            log.info("%d of %d units are done already", len(run.done), len(units))
        if engine.choose(sizing.seconds_per_row * sum(u.rows for u in run.todo)) == "ray":
            from curate.pipeline.scoring.ray_pool import score_on_ray

            worker = None  # its memory is the workers' now
            score_on_ray(run, sizing, engine.workers, engine.num_gpus, engine.ray_address, show)
        else:
            _score_here(run, worker, show)
    worker = None
    notes: dict[str, Any] = {}
    if is_step_zero:
        notes["input_norm_correlation"] = input_norm_correlations(work, units)
    lock.check()
    if work.parts != work.out:
        steps, found_steps = gio_steps(work, units)
        means = standardise(work, units, lambda rows, start: with_steps(rows, steps, start))
        notes |= {"standardised": means} if means else {}
        notes |= {"gio": found_steps} if found_steps else {}
    if found := aggregates(work, units):
        notes["aggregates"] = found
    if outside:
        notes["warnings"] = outside
    if errors := sketch_errors(folder):
        notes["sketch_error"] = errors
    if factors := curvature_notes(folder):
        notes["curvature"] = factors
    if work.stores is not None and work.stores.top_rows:
        notes["top_rows"] = write_top_rows(work, units)
    lock.check()
    success = finish(folder, work, units, notes)
    forget_attempts(folder)
    forget_raw(folder)
    _say_end(success, folder)


def _try_out(work: Work, engine: _Engine) -> None:
    """Refuse what would be refused before the first unit, while an older table is still there.

    As a dry run it keeps nothing, and it looks at nothing that the older run kept.

    Raises:
        ValueError: model and corpus do not fit, no row can be scored, or no cluster answers.
        EngineError: a gradient that no path gets right.
    """
    with tempfile.TemporaryDirectory(prefix="curate-score-") as aside:
        trial = replace(first_checkpoint_only(work), out=aside)
        texts = ScoringWorker(trial, "", None).signals.texts
        if texts is not None:
            texts.check()
    if engine.is_ray:
        from curate.pipeline.ray_cluster import check_cluster

        check_cluster(engine.ray_address, engine.num_gpus, "a worker", work.out)


def _check_model(work: Work, lock: RunLock, engine: _Engine) -> tuple[Sizing, ScoringWorker | None]:
    """Try the first checkpoint on the first rows; return the estimate, and a worker if it will do.

    Raises:
        ValueError: model and corpus do not fit, or no row can be scored.
        EngineError: a gradient that no path gets right.
    """
    run = ScoringRun(work, [], lock)
    worker = ScoringWorker(first_checkpoint_only(work), run.session, run.number(-1))
    if worker.signals.texts is not None:
        worker.signals.texts.check()
    sizing = size_up(work, worker.signals, worker.probed, engine.device_kind())
    if worker.signals.stores is not None:
        sizing = replace(sizing, stored_bytes=worker.signals.stores.whole_row_bytes(work))
    return sizing, worker if len(work.checkpoints) == 1 else None


def _is_done(work: Work, folder: Folder) -> bool:
    """Tell whether every unit has its part: then no model need be loaded."""
    return len(Folder(work.parts).names("part-")) == len(read_units(folder))


def _plan_units(work: Work, sizing: Sizing, unit_rows: int | None) -> list[Unit]:
    rows = unit_rows or rows_per_unit(work.corpus.rows, sizing.seconds_per_row)
    if sizing.stored_bytes and unit_rows is None:
        rows = max(1, min(rows, UNIT_BYTES // sizing.stored_bytes))
    return plan_units([shard.rows for shard in work.corpus.shards], rows)


def _score_here(run: ScoringRun, worker: ScoringWorker | None, show: bool) -> None:
    """Score what is left in this process."""
    worker = worker or ScoringWorker(run.work, run.session, run.number(-1))
    if worker.signals.texts is not None:
        worker.signals.texts.ready()
    with run.progress(show) as progress:
        for unit in run.todo:
            while unit.number not in run.done and not run.is_lethal(unit):
                try:
                    told = worker.score(unit, run.number(unit.number), progress.add)
                except OSError as error:
                    progress.add(-worker.rows_done)
                    run.fault(unit.number, error)
                else:
                    run.finished(told)


def _dry_run(
    work: Work, folder: Folder, has_run: bool, unit_rows: int | None, engine: _Engine
) -> ScorePlan:
    """Return the plan, timed on the first rows; nothing is written."""
    worker = ScoringWorker(first_checkpoint_only(work), "", None)
    sizing = size_up(work, worker.signals, worker.probed, engine.device_kind())
    has_units = has_run and folder.exists(UNITS)
    units = read_units(folder) if has_units else _plan_units(work, sizing, unit_rows)
    parts = set(Folder(work.parts).names("part-")) if has_run else set()
    done = sum(u.rows for u in units if part_name(u.number) in parts)
    sample = _sample(work, units[0])
    score_unit(worker.work, sample, worker.signals)  # the first batches are slow
    references = worker.signals.references
    before, started = references.seconds, time.monotonic()
    table, _ = score_unit(worker.work, sample, worker.signals)
    once = references.seconds - before  # whatever the number of checkpoints
    elapsed = (time.monotonic() - started - once) * len(work.checkpoints) + once
    rows = work.corpus.rows
    seconds = elapsed / sample.rows * (rows - done)
    tokens = None
    if work.with_tokens:
        tokens = round(sum(table.column("tokens").drop_null().to_pylist()) / sample.rows * rows)
    return ScorePlan(
        rows=rows,
        rows_done=done,
        units=len(units),
        checkpoints=len(work.checkpoints),
        references=len(work.reference),
        scorers=tuple(work.scorers),
        tokens=tokens,
        seconds=round(seconds, 3),
        engine=engine.choose(seconds),
        out=folder.uri,
    )


def _sample(work: Work, unit: Unit) -> Unit:
    """Return the unit's first rows: a few batches."""
    span = unit.spans[0]
    return Unit(-1, (replace(span, rows=min(span.rows, 2 * work.plan.batch_rows)),))


def _say_end(success: dict[str, Any], folder: Folder) -> None:
    log.info("scored %d rows into %s", success["rows"], folder.uri)
    if success["bad_rows"]:
        log.warning("%d rows could not be scored: see errors.parquet", success["bad_rows"])
    for unit in success["quarantined"]:
        log.warning("%s is quarantined: %s", unit["name"], unit["reason"])
