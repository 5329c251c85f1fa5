"""The report's sections on selections: what they keep, and what that is worth."""

from typing import Any

from curate.pipeline.evaluation.evaluate_report import draw
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.reporting import plots
from curate.pipeline.reporting.balance import class_counts, shares
from curate.pipeline.reporting.page import figure, paragraph, section, table
from curate.pipeline.reporting.run_folder import RunFolder


def accuracy(evaluation: dict[str, Any]) -> str:
    """Return the comparison with random subsets and all data: drawing, table, a line each."""
    words = {
        "better": "better than",
        "worse": "worse than",
        "no difference found": "not distinguishable from",
    }
    head = [
        "trained on",
        "rows",
        "of the corpus",
        f"{evaluation['metric']} ± 95 %",
        "minus random",
        "minus all data",
    ]
    rows, said = [], []
    for row in sorted(evaluation["rows"], key=lambda r: (-r["kept"], r["kind"] != "subset")):
        random, full = row["against_random"], row["against_full"]
        rows.append(
            [
                row["name"],
                row["kept"],
                f"{row['fraction']:.0%}",
                _plus_minus(row["mean"], row["ci95"]),
                _difference(random),
                _difference(full),
            ]
        )
        if random is not None and random["half_width"] is not None:
            said.append(
                f"{row['name']}: {words[random['verdict']]} a random subset of its size, "
                f"{words[full['verdict']]} all data."
            )
    test = evaluation["test"]
    how = (
        f"{len(evaluation['seeds'])} trainings of each with {evaluation['model']}, "
        f"equal {evaluation['match']}; tested on {test['rows']:,} rows of {test['uri']}. Intervals "
        "are Student's t over seeds, differences are paired by seed."
    )
    drawing = figure(draw(evaluation))
    sentences = [paragraph(sentence, "says") for sentence in said]
    return section(
        "What the selection is worth",
        *sentences,
        drawing,
        table(head, rows),
        paragraph(how, "soft"),
    )


def selections(run: RunFolder) -> str:
    """Return what each manifest keeps, and how the classes share it."""
    rows = []
    for manifest in run.manifests:
        chosen, total = manifest.content["selection"], manifest.content["corpus"]["rows"]
        rows.append(
            [
                run.manifest_name(manifest),
                selection_text(manifest),
                chosen["selected"],
                f"{chosen['selected'] / total:.1%}",
                manifest.weight_kind,
            ]
        )
    head = ["manifest", "selection", "rows", "of the corpus", "weights"]
    return section("Selections", table(head, rows), _traces(run), _balance(run))


def _traces(run: RunFolder) -> str:
    """Return how the divergence from its target went in each selection that records it."""
    drawn = []
    for manifest in run.manifests:
        params = manifest.content["selection"]["params"]
        trace = params.get("kl_trace")
        if not trace:
            continue
        name = run.manifest_name(manifest)
        said = f"{name}: KL from the target {trace[0]:.4g} at the start, {trace[-1]:.4g} at the end"
        why = f"; ended by {params['stopped']}. {params['estimate']}."
        drawn += [figure(plots.divergence(trace, params.get("kl_refused"))), paragraph(said + why)]
    return "<h3>Closer to the target, step by step</h3>" + "".join(drawn) if drawn else ""


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


def selection_text(manifest: Manifest) -> str:
    """Return how the rows were chosen, in a few words."""
    chosen = manifest.content["selection"]
    budget = chosen["budget"]
    kinds = {
        "fraction": f"{budget['value']:.4g} of the rows",
        "rows": f"{budget['value']:g} rows",
        "tokens": f"{budget['value']:.4g} tokens",
    }
    by = f" by {chosen['by']}" if chosen.get("by") else ""
    return f"{chosen['method']}{by}, {kinds[budget['kind']]}, seed {chosen['seed']}"


def _plus_minus(mean: float, half_width: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")


def _difference(test: dict[str, Any] | None) -> str:
    return "" if test is None else _plus_minus(test["difference"], test["half_width"], "+")
