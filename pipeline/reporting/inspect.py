"""What a path holds, as JSON-ready values: corpus, checkpoints, score table, manifest or run.

Every answer is a dict with `kind` and `path`; `format_text` writes it for people.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.pipeline.exporting.export import SUCCESS as EXPORTED
from curate.pipeline.exporting.export import read_success
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.models.checkpoint import Checkpoint, find_checkpoints, load_model
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.reporting.layout import Kind, kind_of
from curate.pipeline.reporting.listing import format_text as format_text
from curate.pipeline.reporting.report_selections import selection_text
from curate.pipeline.reporting.run_folder import RunFolder
from curate.pipeline.reporting.status import scores_status
from curate.pipeline.reporting.status import status as status
from curate.pipeline.reporting.summary import ColumnSummary, summarize
from curate.pipeline.reporting.verify import verify as verify
from curate.pipeline.scoring.score_table import SUCCESS, ScoreTable
from curate.pipeline.stores.describe import describe_stores
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import guess_task, task_from_description
from curate.scorers.engine import Engine
from curate.scorers.protocol import Signal
from curate.scorers.registry import scorer_from_spec

SHOWN_SHARDS = 20
PROBE_ROWS = 3


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what is at `path`.

    Raises:
        ValueError: there is nothing there that curate knows, or it cannot be read.
    """
    kind = kind_of(path)
    if kind is Kind.CORPUS:
        return inspect_corpus(open_corpus(path))
    if kind is Kind.CHECKPOINTS:
        return inspect_checkpoints(path)
    if kind is Kind.SCORES:
        return inspect_scores(path)
    if kind is Kind.MANIFEST:
        return inspect_manifest(Manifest.read(path))
    if kind is Kind.EXPORT:
        return inspect_export(path)
    return inspect_run(RunFolder.read(path))


def inspect_export(path: str | Path) -> dict[str, Any]:
    """Return what a finished export says of itself.

    Raises:
        ValueError: it is not finished.
    """
    if not Folder(path).exists(EXPORTED):
        raise ValueError(f"{path} holds an unfinished export; run `curate export` again")
    said = read_success(Folder(path))
    shown = {name: said[name] for name in ("to", "rows", "weight_kind", "epoch", "manifest")}
    return {"kind": "export", "path": str(path), **shown, "file_count": len(said["files"])}


def inspect_corpus(corpus: Corpus) -> dict[str, Any]:
    """Return format, size, columns and the task that the columns suggest."""
    return {
        "kind": "corpus",
        "path": corpus.uri,
        "format": corpus.format,
        "rows": corpus.rows,
        "bytes": sum(shard.bytes for shard in corpus.shards),
        "shard_count": len(corpus.shards),
        "task": _guessed(corpus),
        "digest": corpus.digest,
        "columns": {field.name: str(field.type) for field in corpus.schema},
        "shards": [
            {"path": s.path, "rows": s.rows, "bytes": s.bytes} for s in corpus.shards[:SHOWN_SHARDS]
        ],
    }


def inspect_checkpoints(path: str | Path) -> dict[str, Any]:
    """Return each checkpoint's place in its run; of a single one also its parameters."""
    found = find_checkpoints([str(path)])
    first = found[0]
    shown = ("seed", "epoch", "step", "lr", "rows_seen")
    result: dict[str, Any] = {
        "kind": "checkpoints",
        "path": str(path),
        "model": first.model,
        "model_args": first.model_args,
        "task": (first.task or {}).get("kind"),
        "classes": (first.task or {}).get("classes"),
        "corpus": first.corpus,
        "checkpoints": [
            {"name": Path(c.path).name, **{n: getattr(c, n) for n in shown}} for c in found
        ],
    }
    return result | inspect_parameters(first) if len(found) == 1 else result


def inspect_parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return each parameter's shape, and how its per-row gradient norm would be computed.

    The latter is found by the engine's probe on a few rows of the checkpoint's own corpus; where
    that is not at hand, `gradients` says why.
    """
    model = load_model(checkpoint)
    paths: dict[str, str] = {}
    try:
        paths, said = _gradient_paths(checkpoint), None
    except (ValueError, RuntimeError, OSError) as unknown:
        said = f"unknown: {unknown}"
    return {
        "parameter_count": sum(p.numel() for p in model.parameters()),
        "gradients": said,
        "parameters": {
            name: {"shape": list(p.shape), "gradient": paths.get(name)}
            for name, p in model.named_parameters()
        },
    }


def inspect_scores(path: str | Path) -> dict[str, Any]:
    """Return what was scored and how the scores are spread; of a table at work, how far it is."""
    folder = Folder(path)
    if not folder.exists(SUCCESS):
        return {"kind": "unfinished score table", **scores_status(folder)}
    table = ScoreTable.open(path)
    summary = summarize(table, list(table.scorers))
    return {
        "kind": "score table",
        "path": table.path,
        "rows": table.rows,
        "errors": summary.errors,
        "quarantined": table.success.get("quarantined"),
        "run": table.meta["run"],
        "corpus": table.corpus["uri"],
        "task": table.meta["task"]["kind"],
        "checkpoints": len(table.meta["checkpoints"]),
        "columns": {field.name: str(field.type) for field in table.schema},
        "quantiles_from": "all rows" if summary.is_exact else "a uniform sample of rows",
        **describe_stores(table),
        "scores": {n: _spread(c) for n, c in summary.columns.items()},
        "directions": {n: _direction(spec) for n, spec in table.scorers.items()},
        "aggregates": [
            {"score": alias, **line}
            for alias, lines in table.notes.get("aggregates", {}).items()
            for line in lines
        ],
        "warnings": [
            f"{alias} {sentence}"
            for alias, sentences in table.notes.get("warnings", {}).items()
            for sentence in sentences
        ],
    }


def inspect_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return what was selected, by what, and what is left of each group."""
    content = manifest.content
    total = content["corpus"]["rows"]
    return {
        "kind": "manifest",
        "path": manifest.path,
        "rows": len(manifest),
        "of": total,
        "share": len(manifest) / total if total else None,
        "corpus": content["corpus"]["uri"],
        "selection": content["selection"],
        "weight_kind": content["weight_kind"],
        "schedule": content["schedule"],
        "digest": manifest.digest,
        "files": len(content["files"]),
        "groups": content["groups"],
        "scores": [
            {"run": s["run"], "digest": s["digest"], "scorers": list(s["scorers"])}
            for s in content["scores"]
        ],
    }


def inspect_run(run: RunFolder) -> dict[str, Any]:
    """Return what each part of a run folder is, in a line each."""
    return {
        "kind": "run",
        "path": run.folder.uri,
        "corpus": run.scores.corpus["uri"] if run.scores else None,
        "rows": run.scores.rows if run.scores else None,
        "checkpoints": len(run.checkpoints),
        "scorers": list(run.scores.scorers) if run.scores else None,
        "evaluations": len(run.evaluations),
        "notes": run.notes,
        "manifests": [
            {"name": run.manifest_name(m), "rows": len(m), "selection": selection_text(m)}
            for m in run.manifests
        ],
    }


def _guessed(corpus: Corpus) -> str:
    try:
        return guess_task(corpus.schema)
    except ValueError as ambiguous:
        return f"not evident ({ambiguous})"


def _gradient_paths(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the engine's path of each parameter, found on the corpus that it was trained on."""
    if checkpoint.task is None or checkpoint.corpus is None:
        raise ValueError("the checkpoint names no task and corpus")
    corpus = open_corpus(checkpoint.corpus["uri"])
    task = task_from_description(checkpoint.task, corpus)
    shard = next(i for i, s in enumerate(corpus.shards) if s.rows)
    batches = corpus.read(shard, 0, PROBE_ROWS, list(task.columns(corpus.schema).all))
    rows = pa.Table.from_batches(list(batches))
    engine = Engine(load_model(checkpoint), task.outputs, {Signal("grad_sq_norm")})
    engine.verify(task.collate(task.encode(rows)))
    return dict(engine.paths)


def _spread(column: ColumnSummary) -> dict[str, Any]:
    names = {"0": "min", "0.05": "q05", "0.25": "q25", "0.5": "median", "0.75": "q75",
             "0.95": "q95", "1": "max"}  # fmt: skip
    quantiles = column.quantiles()
    return {
        "mean": column.mean,
        "std": column.std,
        **{title: quantiles.get(q) for q, title in names.items()},
        "null": column.missing,
    }


def _direction(spec: dict[str, Any]) -> dict[str, Any]:
    direction = vars(scorer_from_spec(spec).direction)
    said = {name: direction[name] for name in ("high_means", "keep", "source", "valid")}
    return {"scorer": spec["name"], **spec["params"], **said}
