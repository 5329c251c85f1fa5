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
from typer.core import TyperCommand

import curate

T = TypeVar("T")

app = typer.Typer(
    name="curate",
    help="Score every row of a corpus, select the part worth training on, prove it. `curate "
    "demo` shows the whole job; `curate COMMAND --help` has examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DATA, WORKERS, RECIPE, OUTPUT = "Model and task", "Workers", "Training", "Output"
TARGET, STORED = "Comparing with a target or another model", "Vectors kept beside the scores"
WEIGHTS, SCHEDULES, GEOMETRY = "Weights", "Schedule", "Vectors, for methods that compare rows"


class Command(TyperCommand):
    """A command whose help has its options under the headings (`rich_help_panel`) they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        last: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            heading = getattr(param, "rich_help_panel", None) or "Options"
            if param.param_type_name == "argument":
                heading = "Arguments"
            if record is not None:
                is_last = heading == OUTPUT or param.name == "help"
                (last if is_last else found.setdefault(heading, [])).append(record)
        for heading, records in [*found.items(), (OUTPUT, last)]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


Corpus = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="Parquet, Arrow or JSON lines: a file, folder, glob or URL; or the name of a "
        "Hugging Face data set.",
    ),
]
Scores = Annotated[str, typer.Argument(metavar="SCORES", help="Score folder.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say more; show tracebacks.", rich_help_panel=OUTPUT),
]
Out = Annotated[
    str,
    typer.Option("-o", "--out", metavar="DIR", help="Folder to write.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what is in the output folder. Without it the same command goes on where it "
        "stopped, and another is refused.",
        rich_help_panel=OUTPUT,
    ),
]
Engine = Annotated[
    Literal["auto", "local", "ray"],
    typer.Option(
        help="local: this process; ray: several workers; auto: by the size.",
        rich_help_panel=WORKERS,
    ),
]
TrainEngine = Annotated[
    Literal["local", "ray"],
    typer.Option(
        help="local: one training after another; ray: in parallel.", rich_help_panel=WORKERS
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to join, such as auto or HOST:6379; by default one is started here.",
        rich_help_panel=WORKERS,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="mlp, cnn, gpt, a folder with a Hugging Face model, or file.py:factory. Required.",
        rich_help_panel=DATA,
    ),
]
ScoredModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Where the checkpoints do not say it: file.py:factory, or the folder of an "
        "adapter's base model.",
        rich_help_panel=DATA,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="image_classification, text_classification, causal_lm, tabular_classification or "
        "file.py:Class; by default that of the checkpoints to score, else guessed from the "
        "columns.",
        rich_help_panel=DATA,
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task-option",
        metavar="KEY=VALUE",
        help="Setting of the task, such as label=y or max_length=128; repeatable.",
        rich_help_panel=DATA,
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option",
        metavar="KEY=VALUE",
        help="Setting of the model, such as hidden=[128,64]; repeatable.",
        rich_help_panel=DATA,
    ),
]
RowLoss = Annotated[
    Literal["mean", "sum"] | None,
    typer.Option(
        help="Language: a row's loss over its target tokens; by default that of the checkpoints to "
        "score, else mean.",
        rich_help_panel=DATA,
    ),
]
Seed = Annotated[int, typer.Option(help="Whole number from 0 that fixes everything random.")]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which split of CORPUS, where it has several: train, say.",
        rich_help_panel=DATA,
    ),
]
Optimizer = Annotated[
    Literal["adamw", "sgd"], typer.Option(help="Update rule.", rich_help_panel=RECIPE)
]
Schedule = Annotated[
    Literal["cosine", "constant"],
    typer.Option(help="Learning rate after the warm-up.", rich_help_panel=RECIPE),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Rows per step; by default usual for the model.", rich_help_panel=RECIPE),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Peak learning rate; by default usual for the model.",
        rich_help_panel=RECIPE,
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(
        help="Share of the steps, from 0 to below 1, in which the rate rises; by default usual "
        "for the model.",
        rich_help_panel=RECIPE,
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(help="From 0; by default usual for the model.", rich_help_panel=RECIPE),
]
Epochs = Annotated[
    int,
    typer.Option(
        help="Length, in epochs over the full corpus; see --match for subsets.",
        rich_help_panel=RECIPE,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Length in steps, instead of --epochs.", rich_help_panel=RECIPE),
]
Match = Annotated[
    Literal["steps", "epochs"],
    typer.Option(
        help="A subset trains for as many steps as the full corpus, or as many epochs.",
        rich_help_panel=RECIPE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads of a process; by default 1 for a small model, else more.",
        rich_help_panel=WORKERS,
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(curate.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Out = "run",
    seeds: Annotated[int, typer.Option(help="Proxies to train, one per seed.")] = 10,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Do the whole job on bundled real data, in minutes."""
    _talk(verbose)
    from curate.pipeline.demo import run_demo

    summary = run_demo(out, seeds=seeds)
    _print(summary, as_json, lambda s: s["text"])


@app.command(cls=Command)
def train(
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="CORPUS", help="What to train on; by default the manifest's own."),
    ] = None,
    model: Model = None,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Train on this selection; by default on all rows."),
    ] = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    model_option: ModelOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    seeds: Annotated[int, typer.Option(help="How many trainings, one per seed.")] = 3,
    first_seed: Annotated[
        int, typer.Option("--seed", help="Seed of the first; the others count on.")
    ] = 0,
    epochs: Epochs = 10,
    steps: Steps = None,
    save_epochs: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Epochs with a checkpoint, such as 0,1,5; 0 is untrained. By default a fifth, a "
            "half and the end.",
        ),
    ] = None,
    save_steps: Annotated[
        str | None, typer.Option(metavar="LIST", help="Steps with one, such as 0,100,500.")
    ] = None,
    match: Match = "steps",
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the forward pass; by default bfloat16 on GPUs that have it, else float32.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Language: put documents end to end.", rich_help_panel=RECIPE),
    ] = False,
    save_moments: Annotated[
        bool,
        typer.Option(
            "--save-moments",
            help="Write Adam's moments beside the weights, for mode=less and curvature=adam.",
        ),
    ] = False,
    null_input: Annotated[
        bool,
        typer.Option(
            "--null-input", help="Show the model empty inputs: a reference for the scorer pvi."
        ),
    ] = False,
    engine: TrainEngine = "local",
    ray_address: RayAddress = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(help="GPUs of a training; by default 1 on GPUs.", rich_help_panel=WORKERS),
    ] = None,
    threads: Threads = None,
    out: Out = "run/checkpoints",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train proxies, or the final model on a selection.

    \b
    Examples:
      curate train data/train --model cnn --seeds 3 --save-epochs 1,2,5
      curate train --model cnn --manifest run/manifest -o run/final
    """
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


@app.command(cls=Command)
def score(
    context: typer.Context,
    corpus: Corpus,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoints or folders of them, one or several; by default run/checkpoints.",
        ),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORER",
            help="What to compute: names such as el2n,grand, with settings as in "
            "head=self_influence(params=head), head being the column. Required unless vectors "
            "are kept; repeatable. docs/scorers.md lists all.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS",
            help="Clean corpus for grad_similarity, influence, dsir, gio and --top-rows.",
            rich_help_panel=TARGET,
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint of another model, for rho, pvi, loss_change and select_weights; "
            "repeatable.",
            rich_help_panel=TARGET,
        ),
    ] = None,
    target_group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the target that groups its rows, or none for one group; by default "
            "its classes.",
            rich_help_panel=TARGET,
        ),
    ] = None,
    sketch: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Gradient sketches: 32x32 numbers of every parameter, or 4096 of the whole "
            "gradient.",
            rich_help_panel=STORED,
        ),
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="embedding, probs or sketch, as in embedding,probs; repeatable.",
            rich_help_panel=STORED,
        ),
    ] = None,
    top_rows: Annotated[
        int | None,
        typer.Option(
            help="For each row of --target, list so many rows nearest to it and farthest from it.",
            rich_help_panel=STORED,
        ),
    ] = None,
    similarity: Annotated[
        Literal["cosine", "dot"] | None,
        typer.Option(
            help="How --top-rows compares gradients; by default by cosine.", rich_help_panel=STORED
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Corpus columns to copy, such as label,lang; by default the label; repeatable.",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Also write each checkpoint's score.")
    ] = False,
    keep_groups: Annotated[
        bool,
        typer.Option(
            "--keep-groups",
            help="Also write the score of each group of the target.",
            rich_help_panel=TARGET,
        ),
    ] = False,
    model: ScoredModel = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    engine: Engine = "auto",
    workers: Annotated[
        int | None,
        typer.Option(help="On Ray; by default as many as fit.", rich_help_panel=WORKERS),
    ] = None,
    num_gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs of a worker; 0: none. By default 1 where there are some.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    ray_address: RayAddress = None,
    batch_rows: Annotated[
        int | None,
        typer.Option(help="Most rows in a batch; by default 256.", rich_help_panel=WORKERS),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens in a batch, with padding; by default 8192.", rich_help_panel=WORKERS
        ),
    ] = None,
    unit_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a unit, which is kept or lost whole when a run is killed; by default "
            "by the time they take.",
            rich_help_panel=WORKERS,
        ),
    ] = None,
    max_bad_rows: Annotated[
        int | None,
        typer.Option(
            help="Stop when more rows cannot be scored; by default 0.1%, at least 10.",
        ),
    ] = None,
    threads: Threads = None,
    out: Out = "run/scores",
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would run; write nothing.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score every row of a corpus; run it again to resume.

    \b
    Examples:
      curate score data/train --scorer el2n,grand
      curate score data/train --scorer grad_similarity --target data/clean
      curate score data/train --store embedding --sketch 32x32
    """
    _talk(verbose)
    from curate.pipeline.reporting.inspect import inspect as look
    from curate.pipeline.reporting.listing import format_text
    from curate.pipeline.scoring.score import score as run
    from curate.pipeline.scoring.score_table import ScoreTable

    result = run(
        _corpus(corpus, split),
        checkpoints=checkpoints or None,
        scorers=scorer or []
        if sketch or store or top_rows is not None
        else _required(scorer, "--scorer"),
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


app.command(name="plan", cls=Command, help="Say what `curate score` would run: rows, units, time.")(
    score
)


@app.command()
def index(
    scores: Scores = "run/scores",
    store: Annotated[
        Literal["sketch", "embedding", "probs"], typer.Option(help="Vectors to index.")
    ] = "embedding",
    similarity: Annotated[
        Literal["cosine", "dot", "euclidean"], typer.Option(help="How vectors are compared.")
    ] = "cosine",
    kind: Annotated[
        Literal["auto", "flat", "ivfpq"],
        typer.Option(help="flat: exact; ivfpq: approximate, small; auto: flat within --memory."),
    ] = "auto",
    memory: Annotated[float, typer.Option(help="GiB that a flat index may take.")] = 4.0,
    near: Annotated[
        str | None, typer.Option(metavar="SHARD:ROW", help="Row whose nearest to show.")
    ] = None,
    neighbors: Annotated[
        int, typer.Option("-k", "--neighbors", help="How many --near shows.")
    ] = 10,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make the index again if it is there.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Index stored vectors; show the rows nearest to one.

    \b
    Example:
      curate index run/scores --store embedding --near 0:12
    """
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


@app.command(cls=Command)
def select(
    scores: Scores = "run/scores",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="Column of the score table (by default the only one), or an expression in "
            "quotes, such as '0.7*rank(el2n) - 0.3*z(aum)'.",
        ),
    ] = None,
    direction: Annotated[
        Literal["high", "low"] | None,
        typer.Option(help="End of the score to keep; by default its scorer's."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="How much to keep: 0.5 or 50% of all rows, 10000 rows, or 2e9tok tokens. "
            "Required, but for threshold, semdedup, exact and gio.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="How to choose: keep (the end that the scorer's source keeps), top, bottom, "
            "window, random, ccs, balanced, importance, kcenter, semdedup, gio, ...; "
            "docs/selectors.md lists all with their settings.",
        ),
    ] = "keep",
    by_group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Divide the budget among the values of this column of the score table (`curate "
            "score --keep COLUMN`); in proportion unless --param group_shares=equal.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Setting of the method, such as strata=20; repeatable."
        ),
    ] = None,
    drop_top: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="Drop so much first, from the end that is kept (ccs: the hard end): a share such "
            "as 0.1 or 10%, or a number of rows.",
        ),
    ] = "0",
    offset: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="window: how much of the lowest scores to leave out, a share or a number of rows.",
        ),
    ] = None,
    include_errors: Annotated[
        bool, typer.Option("--include-errors", help="Let rows be chosen that could not be scored.")
    ] = False,
    among: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST",
            help="Choose among the rows that this earlier selection keeps; shares of --budget are "
            "of all rows still.",
        ),
    ] = None,
    weight_kind: Annotated[
        Literal["loss", "sampling", "repeat"] | None,
        typer.Option(
            help="loss: multiplies a row's loss; sampling: rate of drawing it; repeat: how often "
            "it comes. By default as the method makes them.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    clip_weights: Annotated[
        float | None,
        typer.Option(
            help="Cap weights at so many times their mean, such as 5; by default none.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="What each epoch shows: rs2, curriculum or cooldown; by default all.",
            rich_help_panel=SCHEDULES,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of that training; curriculum and cooldown need it.",
            rich_help_panel=SCHEDULES,
        ),
    ] = None,
    schedule_param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Setting of the rule, such as fraction=0.1; repeatable.",
            rich_help_panel=SCHEDULES,
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="embedding, sketch or probs (kept by `curate score`), column:NAME, FILE.npy, "
            "encoder:FOLDER, or hash:NAME for exact.",
            rich_help_panel=GEOMETRY,
        ),
    ] = None,
    target_vectors: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Vectors of a target's rows, named likewise, for methods that take a target.",
            rich_help_panel=GEOMETRY,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS",
            help="Where these lie (column:, encoder:); by default the score run's target.",
            rich_help_panel=GEOMETRY,
        ),
    ] = None,
    seed: Seed = 0,
    out: Out = "run/manifest",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Select rows under a budget and write a manifest.

    \b
    Examples:
      curate select --by el2n --budget 0.5
      curate select --by el2n --budget 10000 --method ccs --drop-top 10%
      curate select --budget 20% --method kcenter --vectors embedding
      curate select --among run/half --method d2 --vectors embedding --budget 5%
    """
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
        among=among,
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


@app.command(cls=Command)
def export(
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="Manifest folder.")
    ] = "run/manifest",
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="parquet, jsonl, datasets, mds, webdataset or megatron. Required.",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Corpus columns to copy, such as text,label; by default all."
        ),
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option(
            help="Write what the loader shows in this epoch, from 0, in its order: draws, repeats, "
            "schedule. By default each row once, in corpus order."
        ),
    ] = None,
    repeats: Annotated[
        Literal["rows", "column", "streams"],
        typer.Option(
            help="With repeat weights: write a row so often, or once with its count in `weight`, "
            "or (mds) in a stream for each count."
        ),
    ] = "rows",
    packing: Annotated[
        Literal["none", "gz", "zst"] | None,
        typer.Option(help="jsonl: how files are packed; by default as the corpus's."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="Where the data is now, if it moved."),
    ] = None,
    engine: Engine = "auto",
    workers: Annotated[
        int | None,
        typer.Option(help="On Ray; by default one per CPU.", rich_help_panel=WORKERS),
    ] = None,
    ray_address: RayAddress = None,
    unit_rows: Annotated[
        int | None, typer.Option(help="Rows of an output file; by default some 64 MB of them.")
    ] = None,
    seed: Seed = 0,
    out: Out = "run/export",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Copy a selection's rows into a trainer's format.

    \b
    Examples:
      curate export run/manifest --to parquet
      curate export run/manifest --to mds --epoch 0 -o run/epoch-0
    """
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
    no_args_is_help=True, help="Combine selections, sample of one, mix corpora, schedule."
)
app.add_typer(manifests, name="manifest")

Selections = Annotated[
    list[str], typer.Argument(metavar="MANIFEST", help="Manifest folders, two or more.")
]
Combined = Annotated[
    str | None,
    typer.Option("-o", "--out", metavar="DIR", help="Folder of the new manifest. Required."),
]
WeightRule = Annotated[
    Literal["first", "last", "sum", "max", "min"] | None,
    typer.Option(
        help="What a row weighs that several hold; by default first, of repeat weights sum in a "
        "union and min in an intersection."
    ),
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
    """Keep the rows that any of the selections keeps.

    \b
    Example:
      curate manifest union run/a run/b -o run/union
    """
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
    """Keep the first one's rows that no other keeps."""
    _talk(verbose)
    from curate.pipeline.manifests.algebra import subtract as run

    _made(run(paths, _required(out, "--out"), overwrite=overwrite), as_json)


@manifests.command()
def sample(
    path: Annotated[str, typer.Argument(metavar="MANIFEST", help="Manifest folder.")],
    like: Annotated[
        str | None,
        typer.Argument(metavar="LIKE", help="A manifest of the size wanted; else give --budget."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="0.5 or 50% of its rows, or 10000 rows."),
    ] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep a random part of a selection.

    \b
    Example:
      curate manifest sample run/manifest --budget 10% -o run/tenth
    """
    _talk(verbose)
    from curate.pipeline.manifests.algebra import sample as run

    made = run(path, like, _required(out, "--out"), budget=budget, seed=seed, overwrite=overwrite)
    _made(made, as_json)


@manifests.command()
def mix(
    paths: Selections,
    proportions: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="One for each manifest, such as 0.7,0.3; relative to their sum. Required.",
        ),
    ] = None,
    by: Annotated[
        Literal["sampling", "loss", "rows"],
        typer.Option(help="By weights of this kind, or by leaving rows out at random."),
    ] = "sampling",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS", help="With --by rows: rows in all; by default as many as there can be."
        ),
    ] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Mix selections of several corpora in proportions.

    \b
    Example:
      curate manifest mix run/web run/code --proportions 0.7,0.3 -o run/mixture
    """
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
    path: Annotated[str, typer.Argument(metavar="MANIFEST", help="Manifest folder.")],
    rule: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="rs2, curriculum or cooldown. Required."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of the training; curriculum and cooldown need it.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Setting of the rule, such as fraction=0.1; repeatable."
        ),
    ] = None,
    seed: Seed = 0,
    out: Combined = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what each epoch shows of a selection.

    \b
    Example:
      curate manifest schedule run/manifest --rule rs2 -o run/rs2
    """
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


@app.command(cls=Command)
def evaluate(
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="CORPUS", help="All the data; by default the manifests' own."),
    ] = None,
    manifest: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Selections, one or several; by default run/manifest."),
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="CORPUS", help="What to test on. Required.")
    ] = None,
    model: Model = None,
    task: TaskName = None,
    task_option: TaskOption = None,
    model_option: ModelOption = None,
    row_loss: RowLoss = None,
    split: Split = None,
    test_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of --test.", rich_help_panel=DATA)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each arm: subset, random, all.")] = 5,
    epochs: Epochs = 10,
    steps: Steps = None,
    match: Match = "steps",
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: Warmup = None,
    weight_decay: WeightDecay = None,
    engine: TrainEngine = "local",
    ray_address: RayAddress = None,
    threads: Threads = None,
    out: Out = "run/evaluate",
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train on subsets, random ones of their size, and all.

    The results on a test corpus stand side by side, with intervals over the seeds.

    \b
    Example:
      curate evaluate --manifest run/a run/b --model cnn --test data/test
    """
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
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A corpus, or the folder of a run or of any result."),
    ],
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
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a run or of any result.")],
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")] = "run",
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")] = "run",
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="FILE", help="HTML file; by default RUN/report.html."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write an HTML report of a run."""
    _talk(verbose)
    from curate.pipeline.reporting.report import write_report

    _print({"report": str(write_report(run, out))}, as_json, lambda r: r["report"])


@app.command(name="run")
def run_(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file: corpus, run folder and the stages.")
    ],
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
            code = app(_spread(sys.argv[1:]), prog_name="curate", standalone_mode=False)
        sys.exit(code or 0)
    except ValueError as error:
        _fail(error, 2)
    except Stopped as stopped:
        _fail("interrupted; the same command goes on from here", 128 + stopped.number)
    except (RuntimeError, OSError) as error:
        _fail(error, 1)
    except Exception as error:
        if hasattr(error, "format_message"):
            _misused(error)
        _fail(f"internal error, {type(error).__name__}: {error}; -v shows where", 1, error)
    finally:
        logging.getLogger("curate").handlers = []  # the stream may not outlive the call


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
    else:
        if stopped:  # typer made an exit code of it
            raise Stopped(stopped[0])
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


def _misused(error: Any) -> None:
    """Tell in one sentence what is wrong with a command line, and where to look."""
    said = error.format_message()
    if "\n" in said:  # the help, of a command without its arguments
        print(said, file=sys.stderr)
        sys.exit(2)
    said = said.replace("Value error, ", "").replace(". Did you mean", "; did you mean").rstrip(".")
    where = f"; `{error.ctx.command_path} --help` explains it" if error.ctx else ""
    _fail(f"{said[0].lower()}{said[1:]}{where}", 2)


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
        named = [word for word in sys.argv[1:] if not word.startswith("-")]
        command = " ".join(named[: 2 if named[:1] == ["manifest"] else 1])
        raise ValueError(f"{flag} is missing; `curate {command} --help` explains it")
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
            return float(f"{text[:-1].strip()}e-2")  # 0.7 / 100 is no 0.007
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
