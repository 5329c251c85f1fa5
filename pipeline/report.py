"""The report of a run: one HTML file with what was run, scored, kept and reached.

Whatever the run folder does not hold (yet) is left out, and said.
"""

import logging
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import curate
from curate.pipeline import plots
from curate.pipeline.balance import class_counts, shares
from curate.pipeline.corpus import open_corpus
from curate.pipeline.manifest import Manifest
from curate.pipeline.page import escape, facts, figure, page, paragraph, section, table
from curate.pipeline.pictures import Picture, picture_rows
from curate.pipeline.run_folder import RunFolder
from curate.pipeline.score_table import ScoreTable
from curate.pipeline.storage import Folder
from curate.pipeline.summary import Extreme, Summary, summarize
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.protocol import Direction
from curate.scorers.registry import scorer_from_spec

NAME = "report.html"
SHOWN_ERRORS = 30
LIBRARIES = ("torch", "ray", "pyarrow", "numpy")
log = logging.getLogger("curate.report")


def write_report(run: str | Path, out: str | Path | None = None) -> str:
    """Write the report of a run folder and return its path, `RUN/report.html` by default.

    Raises:
        ValueError: the folder holds nothing that a report could show.
    """
    found = RunFolder.read(run)
    if found.is_empty:
        why = f" ({found.notes[0]})" if found.notes else ""
        raise ValueError(f"{run} holds no scores, manifest or evaluation to report on{why}")
    text = page(
        f"curate report: {found.name}",
        f"{found.folder.uri} · written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        sections(found),
    )
    path = str(out) if out is not None else found.folder.full_name(NAME)
    place, slash, name = path.rpartition("/")
    folder = Folder(place or slash or ".")
    folder.replace(name, text.encode())
    return folder.full_name(name)


def sections(run: RunFolder) -> Iterator[str]:
    """Yield the report's sections as HTML, those for which the run has something to show."""
    yield what_ran(run)
    if run.scores is not None:
        names = list(run.scores.scorers)
        summary = summarize(run.scores, names)
        yield distributions(run.scores, summary)
        if len(names) > 1:
            yield correlations(summary)
        yield extreme_rows(run.scores, summary)
    if run.manifests:
        yield selections(run)
    if run.scores is not None:
        yield errors(run.scores)
    yield provenance(run)


def what_ran(run: RunFolder) -> str:
    """Return what the run was made of: data, proxies, scorers, selections."""
    lines: list[tuple[str, object]] = []
    if run.scores is not None:
        corpus, task = run.scores.corpus, run.scores.meta["task"]
        size = f"{corpus['rows']:,} rows in {len(corpus['shards'])} shards"
        lines.append(("corpus", f"{corpus['uri']} ({corpus['format']}, {size})"))
        classes = task.get("classes")
        lines.append(("task", f"{task['kind']}{f', {len(classes)} classes' if classes else ''}"))
    if run.checkpoints:
        seeds = sorted({c.seed for c in run.checkpoints})
        when = sorted({_when(c.epoch, c.step) for c in run.checkpoints})
        models = ", ".join(sorted({c.model for c in run.checkpoints}))
        lines.append(("proxies", f"{models}, {len(seeds)} seeds, saved at {', '.join(when)}"))
    if run.scores is not None:
        used = run.scores.meta["checkpoints"]
        lines.append(("scored with", f"{len(used)} checkpoints"))
        lines.append(("scorers", ", ".join(_call(a, s) for a, s in run.scores.scorers.items())))
    lines += [(run.manifest_name(m), _selection_text(m)) for m in run.manifests]
    notes = [paragraph(note, "soft") for note in run.notes]
    return section("What was run", facts(lines), *notes)


def distributions(scores: ScoreTable, summary: Summary) -> str:
    """Return a histogram and the quantiles of each score."""
    head = ["score", "mean", "sd", "least", "5 %", "median", "95 %", "greatest", "null",
            "a high value means", "kept by default"]  # fmt: skip
    rows = []
    for name, column in summary.columns.items():
        q, direction = column.quantiles(), _direction(scores, name)
        values = [q.get(k) for k in ("0", "0.05", "0.5", "0.95", "1")]
        rows.append([name, column.mean, column.std, *values, column.missing,
                     direction.high_means, f"the {direction.keep}est"])  # fmt: skip
    some = "all rows" if summary.is_exact else "a uniform sample of rows; means are exact"
    caption = f"Medians are marked; the outermost 0.1 % on either side is cut off. From {some}."
    drawing = plots.histograms(list(summary.columns.values()))
    return section("Scores", figure(drawing, caption), table(head, rows))


def correlations(summary: Summary) -> str:
    """Return how far scorers order the rows alike."""
    drawing = plots.correlations(list(summary.columns), summary.rank_correlations())
    return section(
        "Rank correlations",
        figure(drawing, "Spearman's correlation. Scores with opposite directions are negative."),
    )


def extreme_rows(scores: ScoreTable, summary: Summary) -> str:
    """Return the rows with the highest and lowest scores, as one would look at them."""
    chosen = [c.highest + c.lowest for c in summary.columns.values()]
    places = sorted({(e.shard, e.row) for extremes in chosen for e in extremes})
    try:
        corpus = open_corpus(scores.corpus["uri"])
        corpus.same_corpus(scores.corpus)
        pictures = picture_rows(corpus, task_from_description(scores.meta["task"]), places)
    except (ValueError, OSError) as unreadable:
        log.warning("rows cannot be shown: %s", unreadable)
        return section("Highest and lowest rows", paragraph(f"Cannot be shown: {unreadable}."))
    blocks = []
    for name, column in summary.columns.items():
        blocks.append(f"<h3>{escape(name)}: highest</h3>{_gallery(column.highest, pictures)}")
        blocks.append(f"<h3>{escape(name)}: lowest</h3>{_gallery(column.lowest, pictures)}")
    return section("Highest and lowest rows", *blocks)


def selections(run: RunFolder) -> str:
    """Return what each manifest keeps, and how the classes share it."""
    rows = []
    for manifest in run.manifests:
        chosen, total = manifest.content["selection"], manifest.content["corpus"]["rows"]
        rows.append([run.manifest_name(manifest), _selection_text(manifest), chosen["selected"],
                     f"{chosen['selected'] / total:.1%}", manifest.weight_kind])  # fmt: skip
    head = ["manifest", "selection", "rows", "of the corpus", "weights"]
    return section("Selections", table(head, rows), _balance(run))


def errors(scores: ScoreTable) -> str:
    """Return the rows and units that could not be scored."""
    table_of = scores.errors()
    quarantined = scores.success.get("quarantined") or []
    if not table_of.num_rows and not quarantined:
        return section("Errors", paragraph("Every row was scored."))
    shards = scores.corpus["shards"]
    lines = [
        [shards[e["shard"]]["path"], e["row"], e["error"]]
        for e in table_of.slice(0, SHOWN_ERRORS).to_pylist()
    ]
    more = table_of.num_rows - len(lines)
    said = f"{table_of.num_rows:,} rows could not be scored; no selection takes them."
    blocks = [paragraph(said), table(["shard", "row", "why"], lines)]
    if more > 0:
        blocks.append(paragraph(f"{more:,} more are in {scores.path}/errors.parquet.", "soft"))
    if quarantined:
        said = f"{len(quarantined)} units killed their worker time and again and were given up."
        units = [[unit["name"], unit["reason"]] for unit in quarantined]
        blocks += [paragraph(said), table(["unit", "why"], units)]
    return section("Errors", *blocks)


def provenance(run: RunFolder) -> str:
    """Return the identities that let somebody check that this is that."""
    lines: list[tuple[str, object]] = []
    if run.scores is not None:
        lines.append(("score run", run.scores.meta["run"]))
        lines.append(("parts digest", run.scores.success.get("digest")))
    lines += [(run.manifest_name(m), m.digest) for m in run.manifests]
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines.append(("written by", f"curate {curate.__version__} ({libraries})"))
    lines.append(("on", f"{platform.platform()}, Python {platform.python_version()}"))
    how = "`curate verify` recomputes the digests of everything in this folder."
    return section("Provenance", facts(lines), paragraph(how, "soft"))


def _balance(run: RunFolder) -> str:
    """Return the class shares before and after, if the score table holds the label."""
    scores = run.scores
    if scores is None:
        return ""
    columns = scores.meta["task"].get("columns")
    label = columns.get("label") if isinstance(columns, dict) else None
    same = [m for m in run.manifests if m.content["corpus"]["shards"] == scores.corpus["shards"]]
    if label is None or label not in scores.schema.names or not same:
        return ""
    before, after = class_counts(scores, label, same)
    names = [run.manifest_name(m) for m in same]
    drawing = plots.class_balance(
        shares(before), {n: shares(counts) for n, counts in zip(names, after, strict=True)}
    )
    few = plots.by_size(before)
    rows = [[c, before[c], *(f"{a[c] / before[c]:.0%}" for a in after)] for c in few]
    head = [label, "rows", *(f"kept by {n}" for n in names)]
    title = "<h3>Class balance before and after</h3>"
    return title + figure(drawing) + table(head, rows)


def _gallery(extremes: Sequence[Extreme], pictures: dict[tuple[int, int], Picture]) -> str:
    items = []
    for extreme in extremes:
        picture = pictures[extreme.shard, extreme.row]
        label = "" if picture.label is None else f"<b>{escape(picture.label)}</b> "
        items.append(
            f'<div class="row">{picture.body}{label}{extreme.score:.4g}<br>'
            f'<span class="soft">{escape(picture.name)}</span></div>'
        )
    return f'<div class="rows">{"".join(items)}</div>'


def _direction(scores: ScoreTable, alias: str) -> Direction:
    return scorer_from_spec(scores.scorers[alias]).direction


def _call(alias: str, spec: dict[str, Any]) -> str:
    """Return a scorer as one would ask for it."""
    params = ",".join(f"{k}={v}" for k, v in spec["params"].items() if v not in ("", None))
    call = f"{spec['name']}({params})" if params else spec["name"]
    return call if alias == spec["name"] else f"{alias}={call}"


def _when(epoch: float | None, step: int) -> str:
    return f"step {step}" if epoch is None else f"epoch {epoch:g}"


def _selection_text(manifest: Manifest) -> str:
    chosen = manifest.content["selection"]
    budget = chosen["budget"]
    kinds = {"fraction": f"{budget['value']:.4g} of the rows", "rows": f"{budget['value']:g} rows",
             "tokens": f"{budget['value']:.4g} tokens"}  # fmt: skip
    by = f" by {chosen['by']}" if chosen.get("by") else ""
    return f"{chosen['method']}{by}, {kinds[budget['kind']]}, seed {chosen['seed']}"
