"""The report's sections on scores: how they are spread, their extreme rows, what failed."""

import logging
from collections.abc import Sequence

from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting import plots
from curate.pipeline.reporting.page import escape, figure, paragraph, section, table
from curate.pipeline.reporting.pictures import Picture, picture_rows
from curate.pipeline.reporting.summary import Extreme, Summary
from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.protocol import Direction
from curate.scorers.registry import scorer_from_spec

SHOWN_ERRORS = 30
log = logging.getLogger("curate.report")


def distributions(scores: ScoreTable, summary: Summary) -> str:
    """Return a histogram and the quantiles of each score."""
    columns = "score|mean|sd|least|5 %|median|95 %|greatest|null|a high value means|keep"
    rows = []
    for name, column in summary.columns.items():
        q, direction = column.quantiles(), _direction(scores, name)
        values = [q.get(k) for k in ("0", "0.05", "0.5", "0.95", "1")]
        spread = [column.mean, column.std, *values, column.missing]
        rows.append([name, *spread, direction.high_means, direction.keep])
    some = "all rows" if summary.is_exact else "a uniform sample of rows; means are exact"
    caption = f"Medians are marked; the outermost 0.1 % on either side is cut off. From {some}."
    drawing = plots.histograms(list(summary.columns.values()))
    noted = [*_aggregates(scores), *_warnings(scores)]
    return section("Scores", figure(drawing, caption), table(columns.split("|"), rows), *noted)


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
    legend = "Under each row: its label, its score, its id (or shard:row)."
    return section("Highest and lowest rows", paragraph(legend, "soft"), *blocks)


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


def _aggregates(scores: ScoreTable) -> list[str]:
    """Return the table of one number per column and checkpoint, where a scorer has one."""
    names = ("checkpoint", "rows", "mean", "kurtosis", "gwa")
    lines = [
        [alias, *(line[name] for name in names)]
        for alias, found in scores.notes.get("aggregates", {}).items()
        for line in found
    ]
    if not lines:
        return []
    said = "Over all rows, at each checkpoint: GWA = mean / (excess kurtosis + 1.2)."
    return [paragraph(said), table(["score", *names], lines)]


def _warnings(scores: ScoreTable) -> list[str]:
    found = scores.notes.get("warnings", {})
    return [paragraph(f"{alias} {s}.") for alias, sentences in found.items() for s in sentences]


def _gallery(extremes: Sequence[Extreme], pictures: dict[tuple[int, int], Picture]) -> str:
    items = []
    for extreme in extremes:
        picture = pictures[extreme.shard, extreme.row]
        label = "" if picture.label is None else f"<b>{escape(picture.label)}</b> "
        items.append(
            f'<div class="row">{picture.body}{label}{extreme.score + 0.0:.4g}<br>'
            f'<span class="soft">{escape(picture.name)}</span></div>'
        )
    return f'<div class="rows">{"".join(items)}</div>'


def _direction(scores: ScoreTable, alias: str) -> Direction:
    return scorer_from_spec(scores.scorers[alias]).direction
