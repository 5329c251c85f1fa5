"""The command line: parse, call one library function, print. No logic lives here.

Results go to stdout (`--json` for machines), everything else to stderr. Exit codes: 0 done,
1 failed, 2 wrong input, 3 done with rows or units left out.
"""

import contextlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Any, Literal, TypeVar

import typer
import yaml

import curate

T = TypeVar("T")

app = typer.Typer(
    name="curate",
    help="Score every example of a corpus, select the part worth training on, prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Corpus = Annotated[
    str,
    typer.Argument(help="Parquet, Arrow or JSON lines: file, folder, glob, URL; or a data set."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show tracebacks.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output folder holds; else resume.")
]
Engine = Annotated[
    Literal["auto", "local", "ray"], typer.Option(help="This process, or Ray; auto by the size.")
]
TrainEngine = Annotated[
    Literal["local", "ray"], typer.Option(help="Seeds one after another, or in parallel on Ray.")
]
RayAddress = Annotated[str | None, typer.Option(help="Ray cluster to join, such as auto.")]
Model = Annotated[
    str | None,
    typer.Option(help="mlp, cnn, gpt, a Hugging Face folder, or file.py:factory."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="image_classification, text_classification, causal_lm, tabular_classification, "
        "or file.py:Class; guessed from the columns when unambiguous.",
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task-option", help="KEY=VALUE for the task, such as label=y or max_length=128."
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="KEY=VALUE for the model, such as hidden=[128,64]."),
]
RowLoss = Annotated[
    str | None, typer.Option(help="mean or sum over a row's target tokens (language only).")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Split = Annotated[str | None, typer.Option(help="Split of a datasets folder or hub data set.")]
Optimizer = Annotated[Literal["adamw", "sgd"], typer.Option(help="Update rule.")]
Schedule = Annotated[Literal["cosine", "constant"], typer.Option(help="Of the learning rate.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Rows per step; by default usual for the model.")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="By default usual for the model.")]
Match = Annotated[
    Literal["steps", "epochs"], typer.Option(help="Subsets train for equal steps or epochs.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; small models want 1.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(curate.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[str, typer.Option("-o", "--out", help="Run folder.")] = "run",
    seeds: Annotated[int, typer.Option(help="Proxy runs.")] = 10,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The whole job on bundled real data, in minutes, ending in a report."""
    _talk(verbose)
    from curate.pipeline.demo import run_demo

    summary = run_demo(out, seeds=seeds)
    _print(summary, as_json, lambda s: s["text"])


@app.command()
def train(
    corpus: Annotated[
        str | None, typer.Argument(help="What to train on; by default the manifest's own.")
    ] = None,
    model: Model = None,
    manifest: Annotated[str | None, typer.Option(help="Train on this selection.")] = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    model_option: ModelOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    seeds: Annotated[int, typer.Option(help="Number of runs, one per seed.")] = 3,
    first_seed: Annotated[int, typer.Option("--seed", help="The first run's seed.")] = 0,
    epochs: Annotated[int, typer.Option(help="Epochs over the full corpus.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.")] = None,
    save_epochs: Annotated[str | None, typer.Option(help="Such as 0,1,5; 0 is untrained.")] = None,
    save_steps: Annotated[str | None, typer.Option(help="Such as 0,100,500.")] = None,
    match: Match = "steps",
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: Annotated[float | None, typer.Option(help="Share of the steps to warm up.")] = None,
    weight_decay: WeightDecay = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the forward pass; by default the device's best."),
    ] = None,
    pack: Annotated[
        bool, typer.Option(help="Language: pack documents into full contexts.")
    ] = False,
    save_moments: Annotated[
        bool,
        typer.Option("--save-moments", help="Keep Adam's moments, for LESS and curvature=adam."),
    ] = False,
    null_input: Annotated[
        bool, typer.Option("--null-input", help="Train on empty inputs: a reference for pvi.")
    ] = False,
    engine: TrainEngine = "local",
    ray_address: RayAddress = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs per run.")] = None,
    threads: Threads = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Checkpoint folder.")] = "run/checkpoints",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train proxies, or the final model on a manifest; save checkpoints."""
    _talk(verbose)
    from curate.pipeline.training.train import train as run

    checkpoints = run(
        _corpus(corpus, split),
        model=_required(model, "--model"),
        model_options=_pairs(model_option, "--model-option"),
        task=task,
        task_options=_task_options(task_option, row_loss),
        manifest=manifest,
        seeds=range(first_seed, first_seed + seeds),
        epochs=epochs,
        steps=steps,
        save_epochs=_integers(save_epochs, "--save-epochs"),
        save_steps=_integers(save_steps, "--save-steps"),
        match=match,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        precision=precision,
        pack=pack,
        save_moments=save_moments,
        null_input=null_input,
        engine=engine,
        ray_address=ray_address,
        num_gpus=num_gpus,
        threads=threads,
        out=out,
        overwrite=overwrite,
    )
    result = {"checkpoints": [c.path for c in checkpoints]}
    _print(result, as_json, lambda r: "\n".join(r["checkpoints"]))


@app.command()
def score(
    context: typer.Context,
    corpus: Corpus,
    checkpoints: Annotated[
        list[str] | None, typer.Option(help="Checkpoint folders or a folder of them; repeatable.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="el2n,grand or ALIAS=self_influence(params=head); repeatable."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Corpus that grad_similarity compares rows with.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoints of another model, which rho, pvi, ... compare with."),
    ] = None,
    target_group: Annotated[
        str | None,
        typer.Option(help="Column of its groups, or none; its classes by default."),
    ] = None,
    sketch: Annotated[
        str | None,
        typer.Option(help="Store gradient sketches: 32x32 per parameter, or 4096 of the whole."),
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(help="Store rows' vectors: embedding, probs, sketch; repeatable."),
    ] = None,
    top_rows: Annotated[
        int | None,
        typer.Option(help="List each target row's nearest and farthest rows, this many of each."),
    ] = None,
    similarity: Annotated[
        Literal["cosine", "dot"], typer.Option(help="By which --top-rows compares gradients.")
    ] = "cosine",
    keep: Annotated[
        list[str] | None, typer.Option(help="Corpus columns to copy; the label by default.")
    ] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Also write the score per checkpoint.")
    ] = False,
    keep_groups: Annotated[
        bool, typer.Option("--keep-groups", help="Also write the score per group of the target.")
    ] = False,
    model: Model = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    engine: Engine = "auto",
    workers: Annotated[int | None, typer.Option(help="Scoring workers on Ray.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs per worker.")] = None,
    ray_address: RayAddress = None,
    batch_rows: Annotated[int | None, typer.Option(help="Rows per batch.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Token budget of a batch.")] = None,
    unit_rows: Annotated[int | None, typer.Option(help="Rows per unit of work.")] = None,
    max_bad_rows: Annotated[
        int | None, typer.Option(help="Stop beyond this many; default max(10, 0.1 %).")
    ] = None,
    threads: Threads = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Score folder.")] = "run/scores",
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score every row of a corpus; run it again to resume."""
    _talk(verbose)
    from curate.pipeline.reporting.inspect import inspect as look
    from curate.pipeline.reporting.listing import format_text
    from curate.pipeline.scoring.score import score as run
    from curate.pipeline.scoring.score_table import ScoreTable

    result = run(
        _corpus(corpus, split),
        checkpoints=checkpoints or None,
        scorers=scorer or [] if sketch or store or top_rows else _required(scorer, "--scorer"),
        target=target,
        target_group=target_group,
        reference=reference,
        store=store,
        sketch=sketch,
        top_rows=top_rows,
        similarity=similarity,
        keep=[c for text in keep for c in text.split(",") if c] if keep is not None else None,
        keep_checkpoints=keep_checkpoints,
        keep_groups=keep_groups,
        model=model,
        task=task,
        task_options=_task_options(task_option, row_loss),
        engine=engine,
        workers=workers,
        num_gpus=num_gpus,
        ray_address=ray_address,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        unit_rows=unit_rows,
        max_bad_rows=max_bad_rows,
        out=out,
        overwrite=overwrite,
        threads=threads,
        dry_run=dry_run or context.info_name == "plan",
    )
    found = look(out) if isinstance(result, ScoreTable) else result.summary()
    # What the scorers mean is `curate inspect`'s to say: a screen of it for each.
    long = {"directions"} if isinstance(result, ScoreTable) else set[str]()
    _print(found, as_json, lambda f: format_text({k: v for k, v in f.items() if k not in long}))
    if found.get("errors") or found.get("quarantined"):
        raise typer.Exit(3)


app.command(name="plan", help="Say what `curate score` would run: rows, units and time.")(score)


@app.command()
def index(
    scores: Annotated[str, typer.Argument(help="Score folder.")] = "run/scores",
    store: Annotated[
        Literal["sketch", "embedding", "probs"], typer.Option(help="Vectors to index.")
    ] = "embedding",
    similarity: Annotated[
        Literal["cosine", "dot", "euclidean"], typer.Option(help="How vectors are compared.")
    ] = "cosine",
    kind: Annotated[
        Literal["auto", "flat", "ivfpq"],
        typer.Option(help="flat is exact; auto is flat while it fits in memory."),
    ] = "auto",
    memory: Annotated[float, typer.Option(help="GiB that auto may take.")] = 4.0,
    near: Annotated[str | None, typer.Option(help="SHARD:ROW whose nearest rows to show.")] = None,
    neighbors: Annotated[int, typer.Option("-k", "--neighbors", help="How many to show.")] = 10,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Index stored vectors for nearest-neighbour search; show a row's neighbours."""
    _talk(verbose)
    from curate.pipeline.reporting.listing import format_text
    from curate.pipeline.stores.index import build_index
    from curate.pipeline.stores.retrieval import index_summary

    made = build_index(
        scores,
        store,
        similarity=similarity,
        kind=kind,
        seed=seed,
        memory=int(memory * 2**30),
        overwrite=overwrite,
    )
    _print(index_summary(made, near, neighbors), as_json, format_text)


@app.command()
def select(
    scores: Annotated[str, typer.Argument(help="Score folder.")] = "run/scores",
    by: Annotated[
        str | None,
        typer.Option(
            help="Score column (the only one by default), or 0.7*rank(el2n) - 0.3*z(aum)."
        ),
    ] = None,
    direction: Annotated[
        Literal["high", "low"] | None, typer.Option(help="End to keep; the scorer's by default.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="0.5 or 50% of the rows, 10000 rows, or 2e9tok tokens.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to choose: keep, top, ...; docs/selectors.md lists them.")
    ] = "keep",
    by_group: Annotated[
        str | None, typer.Option(help="Column of classes, languages or domains to budget by.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the method, such as by_group=label.")
    ] = None,
    drop_top: Annotated[str, typer.Option(help="Drop this share or count of the top first.")] = "0",
    offset: Annotated[
        str | None, typer.Option(help="window: where it starts in ascending order, from 0.")
    ] = None,
    include_errors: Annotated[
        bool, typer.Option("--include-errors", help="Rows that could not be scored may be kept.")
    ] = False,
    weight_kind: Annotated[
        Literal["loss", "sampling", "repeat"] | None,
        typer.Option(help="What weights are to mean; as the method makes them by default."),
    ] = None,
    clip_weights: Annotated[
        float | None, typer.Option(help="Cut weights at this many times their mean.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="What epochs show: rs2, curriculum or cooldown.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the scheduled training.")] = None,
    schedule_param: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the schedule, such as fraction=0.1.")
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(help="embedding, sketch, column:NAME, FILE.npy or encoder:FOLDER."),
    ] = None,
    target_vectors: Annotated[
        str | None, typer.Option(help="Vectors of the rows to compare with, named likewise.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Their corpus; the score run's target by default.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[str, typer.Option("-o", "--out", help="Manifest folder.")] = "run/manifest",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Select rows by score under a budget and write a manifest."""
    _talk(verbose)
    from curate.pipeline.manifests.select import select as run
    from curate.pipeline.manifests.selection_summary import summary_text

    manifest = run(
        scores,
        by=by,
        budget=budget,
        method=method,
        params=_pairs(param, "--param"),
        drop_top=_number(drop_top, "--drop-top"),
        offset=None if offset is None else _number(offset, "--offset"),
        include_errors=include_errors,
        direction=direction,
        by_group=by_group,
        weight_kind=weight_kind,
        clip_weights=clip_weights,
        schedule=schedule,
        epochs=epochs,
        schedule_params=_pairs(schedule_param, "--schedule-param"),
        vectors=vectors,
        target_vectors=target_vectors,
        target=target,
        seed=seed,
        out=out,
        overwrite=overwrite,
    )
    _print(manifest.describe(), as_json, summary_text)


@app.command()
def export(
    manifest: Annotated[str, typer.Argument(help="Manifest folder.")] = "run/manifest",
    to: Annotated[
        str | None,
        typer.Option(help="parquet, jsonl, datasets, mds, webdataset or megatron."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Corpus columns to copy, such as text,label; all by default.")
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option(help="Write what this epoch shows: draws, repeats, schedule, order."),
    ] = None,
    repeats: Annotated[
        Literal["rows", "column", "streams"],
        typer.Option(help="Repeat weights: rows repeated, a column of counts, or MDS streams."),
    ] = "rows",
    packing: Annotated[
        Literal["none", "gz", "zst"] | None,
        typer.Option(help="Of JSON lines; by default as the corpus's."),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Where the data is now, if it moved.")] = None,
    engine: Engine = "auto",
    workers: Annotated[int | None, typer.Option(help="Units at a time on Ray.")] = None,
    ray_address: RayAddress = None,
    unit_rows: Annotated[int | None, typer.Option(help="Rows per output file.")] = None,
    seed: Seed = 0,
    out: Annotated[str, typer.Option("-o", "--out", help="Output folder.")] = "run/export",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Copy a selection's rows with their weights into a trainer's format."""
    _talk(verbose)
    from curate.pipeline.exporting.export import export as run

    exported = run(
        manifest,
        _required(to, "--to"),
        out,
        columns=_names(columns),
        epoch=epoch,
        seed=seed,
        repeats=repeats,
        packing=packing,
        corpus=corpus,
        engine=engine,
        workers=workers,
        ray_address=ray_address,
        unit_rows=unit_rows,
        overwrite=overwrite,
    )
    _print(exported.describe(), as_json, lambda _: str(exported))


manifests = typer.Typer(
    no_args_is_help=True, help="Combine selections: union, intersect, subtract, sample, mix, ..."
)
app.add_typer(manifests, name="manifest")

Selections = Annotated[list[str], typer.Argument(help="Manifest folders.")]
Combined = Annotated[str | None, typer.Option("-o", "--out", help="Folder of the new manifest.")]
WeightRule = Annotated[
    Literal["first", "last", "sum", "max", "min"] | None,
    typer.Option(help="Whose weight wins; first by default, for repeats sum (of all) or min."),
]


@manifests.command()
def union(
    paths: Selections,
    out: Combined = None,
    weights: WeightRule = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep the rows that any of the selections keeps."""
    _talk(verbose)
    from curate.pipeline.manifests.algebra import union as run

    _made(run(paths, _required(out, "--out"), weights=weights, overwrite=overwrite), as_json)


@manifests.command()
def intersect(
    paths: Selections,
    out: Combined = None,
    weights: WeightRule = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep the rows that all of the selections keep."""
    _talk(verbose)
    from curate.pipeline.manifests.algebra import intersect as run

    _made(run(paths, _required(out, "--out"), weights=weights, overwrite=overwrite), as_json)


@manifests.command()
def subtract(
    paths: Selections,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep the rows of the first selection that none of the others keeps."""
    _talk(verbose)
    from curate.pipeline.manifests.algebra import subtract as run

    _made(run(paths, _required(out, "--out"), overwrite=overwrite), as_json)


@manifests.command()
def sample(
    path: Annotated[str, typer.Argument(help="Manifest folder.")],
    like: Annotated[
        str | None, typer.Argument(help="As many rows as this manifest keeps; else --budget.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="0.5 or 50% of its rows, or 10000.")] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep a random part of a selection."""
    _talk(verbose)
    from curate.pipeline.manifests.algebra import sample as run

    made = run(path, like, _required(out, "--out"), budget=budget, seed=seed, overwrite=overwrite)
    _made(made, as_json)


@manifests.command()
def mix(
    paths: Selections,
    proportions: Annotated[
        str | None, typer.Option(help="Such as 0.7,0.3; relative to their sum.")
    ] = None,
    by: Annotated[
        Literal["sampling", "loss", "rows"],
        typer.Option(help="By sampling weights, loss weights, or leaving rows out."),
    ] = "sampling",
    budget: Annotated[str | None, typer.Option(help="Rows in all, with --by rows.")] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put selections of several corpora into one manifest, in proportions."""
    _talk(verbose)
    from curate.pipeline.manifests.mixture import mix as run

    text = _required(proportions, "--proportions")
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--proportions {text!r} is not a list such as 0.7,0.3") from None
    made = run(
        paths,
        shares,
        _required(out, "--out"),
        by=by,
        budget=budget,
        seed=seed,
        overwrite=overwrite,
    )
    _made(made, as_json)


@manifests.command()
def schedule(
    path: Annotated[str, typer.Argument(help="Manifest folder.")],
    rule: Annotated[str | None, typer.Option(help="rs2, curriculum or cooldown.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length of the training.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the rule, such as fraction=0.1.")
    ] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Give a selection a schedule: what each epoch shows of it."""
    _talk(verbose)
    from curate.pipeline.manifests.rescheduled import schedule as run

    made = run(
        path,
        _required(rule, "--rule"),
        _required(out, "--out"),
        seed=seed,
        epochs=epochs,
        params=_pairs(param, "--param"),
        overwrite=overwrite,
    )
    _made(made, as_json)


def _made(manifest: Any, as_json: bool) -> None:
    """Print a manifest that was made from others."""
    _print(manifest.describe(), as_json, lambda m: f"{len(manifest)} rows: {m['path']}")


@app.command()
def evaluate(
    corpus: Annotated[
        str | None, typer.Argument(help="All the data; by default the manifests' own.")
    ] = None,
    manifest: Annotated[list[str] | None, typer.Option(help="Manifest folder; repeatable.")] = None,
    test: Annotated[str | None, typer.Option(help="Corpus to test on.")] = None,
    model: Model = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    model_option: ModelOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    test_split: Annotated[str | None, typer.Option(help="Split of the test data set.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each subset.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs over the full corpus.")] = 10,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.")] = None,
    match: Match = "steps",
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: Annotated[float | None, typer.Option(help="Share of the steps to warm up.")] = None,
    weight_decay: WeightDecay = None,
    engine: TrainEngine = "local",
    ray_address: RayAddress = None,
    threads: Threads = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Result folder.")] = "run/evaluate",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train on each subset, a random one of its size, and all; compare on a test corpus."""
    _talk(verbose)
    from curate.pipeline.evaluation.evaluate import evaluate as run
    from curate.pipeline.evaluation.evaluate_report import format_report

    result = run(
        _corpus(corpus, split),
        manifests=manifest or ["run/manifest"],
        test=_corpus(_required(test, "--test"), test_split),
        model=_required(model, "--model"),
        model_options=_pairs(model_option, "--model-option"),
        task=task,
        task_options=_task_options(task_option, row_loss),
        seeds=seeds,
        epochs=epochs,
        steps=steps,
        match=match,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        engine=engine,
        ray_address=ray_address,
        threads=threads,
        out=out,
        overwrite=overwrite,
    )
    _print(result, as_json, format_report)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Corpus, checkpoint, score or manifest folder, run.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a path holds."""
    _talk(verbose)
    from curate.pipeline.reporting.inspect import inspect as look
    from curate.pipeline.reporting.listing import format_text

    _print(look(path), as_json, format_text)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Score folder, manifest, checkpoint or run.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Recompute every digest; exit 1 where one differs."""
    _talk(verbose)
    from curate.pipeline.reporting.listing import format_text
    from curate.pipeline.reporting.verify import verify as check

    result = check(path)
    _print(result, as_json, format_text)
    if result["problems"]:
        raise typer.Exit(1)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder.")] = "run",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say how far a run has come."""
    _talk(verbose)
    from curate.pipeline.reporting.listing import format_text
    from curate.pipeline.reporting.status import status as look

    _print(look(run), as_json, format_text)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run folder.")] = "run",
    out: Annotated[str | None, typer.Option("-o", "--out", help="HTML file.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write an HTML report of a run."""
    _talk(verbose)
    from curate.pipeline.reporting.report import write_report

    _print({"report": str(write_report(run, out))}, as_json, lambda r: r["report"])


@app.command(name="run")
def run_(
    recipe: Annotated[str, typer.Argument(help="YAML file: corpus, run and the stages.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the stages of a recipe in order; run it again to resume."""
    _talk(verbose)
    from curate.pipeline.recipe import run_recipe
    from curate.pipeline.scoring.score_table import ScoreTable

    outputs = run_recipe(recipe)
    _print(outputs, as_json, lambda o: "\n".join(f"{k}: {v}" for k, v in o.items()))
    if "score" in outputs:
        success = ScoreTable.open(outputs["score"]).success
        if success["bad_rows"] or success["quarantined"]:
            raise typer.Exit(3)


def main() -> None:
    """Run the command line; an error is one sentence, with a traceback only under -v."""
    try:
        with _stoppable():
            app(_spread(sys.argv[1:]))
    except ValueError as error:
        _fail(error, 2)
    except Stopped as stopped:
        _fail("interrupted; the same command goes on from here", 128 + stopped.number)
    except (RuntimeError, OSError) as error:
        _fail(error, 1)
    except Exception as error:
        _fail(f"internal error, {type(error).__name__}: {error}; -v shows where", 1, error)


class Stopped(Exception):
    """The command was ended by Ctrl-C or SIGTERM."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Raise Stopped where a signal ended the block: workers are stopped, locks given back.

    Inside, the signal is a KeyboardInterrupt, the only one that C extensions let through; what
    they and typer make of it does not matter. A second signal ends the process at once.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stopped.append(number)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as end:
        if isinstance(end, SystemExit) and end.code == signal.SIGTERM:
            stopped.append(signal.SIGTERM)  # Ray, while it starts, has a handler of its own
        if stopped:
            raise Stopped(stopped[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spread(arguments: list[str]) -> list[str]:
    """Return arguments in which `--checkpoints A B` has become `--checkpoints A --checkpoints B`.

    Only behind the corpus, so that `--checkpoints A CORPUS` still means what it says.
    """
    if len(arguments) < 2 or arguments[1].startswith("-"):
        return arguments
    spread, flag = arguments[:2], ""
    for argument in arguments[2:]:
        if argument.startswith("-"):
            flag = argument if argument in ("--checkpoints", "--manifest") else ""
        elif flag and spread[-1] != flag:
            spread.append(flag)
        spread.append(argument)
    return spread


def _fail(error: Exception | str, code: int, cause: Exception | None = None) -> None:
    cause = error if isinstance(error, Exception) else cause
    if logging.getLogger("curate").level == logging.DEBUG and cause is not None:
        traceback.print_exception(cause)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def _talk(verbose: bool) -> None:
    """Send the library's messages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("curate")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def _print(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    print(json.dumps(result, sort_keys=True) if as_json else text(result))


def _required(value: T | None, flag: str) -> T:
    if value is None:
        raise ValueError(f"{flag} is missing; `curate {sys.argv[1]} --help` explains it")
    return value


def _pairs(items: list[str] | None, flag: str) -> dict[str, Any]:
    """Return KEY=VALUE items as a dict; values are read as YAML scalars or lists."""
    from curate.pipeline.plain_yaml import load_yaml

    pairs = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{flag} {item!r} is not KEY=VALUE")
        try:
            pairs[key] = load_yaml(value)
        except yaml.YAMLError:
            raise ValueError(f"{flag} {item!r}: cannot read {value!r}") from None
    return pairs


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def _task_options(items: list[str] | None, row_loss: str | None) -> dict[str, Any]:
    options = _pairs(items, "--task-option")
    return options if row_loss is None else {**options, "row_loss": row_loss}


def _integers(text: str | None, flag: str) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not a list of integers such as 0,1,5") from None


def _number(text: str, flag: str) -> int | float:
    """Return a count (an integer) or a share (with a point or a percent sign)."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"{flag} {text!r} is neither a count nor a share such as 0.1") from None


def _corpus(uri: str | None, split: str | None) -> Any:
    """Return the corpus of one split, or the path, which the library opens itself."""
    if split is None:
        return uri
    if uri is None:
        raise ValueError("--split is of a corpus: name that too, or leave both to the manifest")
    from curate.pipeline.reading.corpus import open_corpus

    return open_corpus(uri, split=split)


if __name__ == "__main__":
    main()
