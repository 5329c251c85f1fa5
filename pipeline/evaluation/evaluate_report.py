"""What an evaluation found: a dictionary for machines, a table for people, a drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import exp
from typing import Any

from curate.pipeline.evaluation.evaluate_arm import Arm, Plan
from curate.pipeline.evaluation.statistics import mean_interval, paired_test
from curate.pipeline.reporting.plots import Bar, accuracy

FORMAT, VERSION = "curate.evaluation", 1

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""The results of an arm's seeds, by the arm's key."""


def evaluation_report(
    plan: Plan, arms: Sequence[Arm], seeds: Sequence[int], results: Results
) -> dict[str, Any]:
    """Return the report: all results, means with intervals, and paired tests over the seeds.

    Differences are in the metric's own units; a verdict knows whether more is better.
    """
    first = results[arms[0].key][0]
    metric = "loss" if first["accuracy"] is None else "accuracy"
    values = {arm.key: [r["value"] for r in results[arm.key]] for arm in arms}
    rows = [_row(plan, arm, results[arm.key], metric) for arm in arms]
    for arm, row in zip(arms, rows, strict=True):
        if arm.kind == "subset":
            against = {"random": f"random-{arm.kept}", "full": arms[0].key}
            for name, key in against.items():
                row[f"against_{name}"] = _comparison(values[arm.key], values[key], metric)
    settings = plan.settings
    return {
        "format": FORMAT,
        "version": VERSION,
        "metric": metric,
        "higher_is_better": metric == "accuracy",
        "seeds": list(seeds),
        "match": settings.match,
        "steps": settings.length.steps,
        "batch_size": settings.length.batch,
        "model": settings.model,
        "model_args": settings.to_json()["model_args"],
        "task": settings.task["kind"],
        "corpus": settings.corpus_entry,
        "test": {
            "uri": plan.test.uri,
            "digest": plan.test.digest,
            "rows": first["rows"],
            "bad_rows": first["bad_rows"],
        },
        "rows": rows,
    }


def _row(plan: Plan, arm: Arm, results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    values = [r["value"] for r in results]
    interval = mean_interval(values)
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "method": arm.method,
        "kept": arm.kept,
        "fraction": arm.kept / plan.settings.corpus.rows,
        "manifest": arm.manifest,
        "steps": results[0]["steps"],
        "values": values,
        "mean": interval.mean,
        "ci95": interval.half_width,
        "loss": mean_interval([r["loss"] for r in results]).mean,
        "against_random": None,
        "against_full": None,
    }
    if metric == "loss" and plan.settings.task["kind"] == "causal_lm":
        row["perplexity"] = _perplexity(interval.mean)
    return row


def _perplexity(loss: float) -> float | None:
    return exp(loss) if loss < 700 else None


def _comparison(ours: Sequence[float], theirs: Sequence[float], metric: str) -> dict[str, Any]:
    test = paired_test(ours, theirs)
    upward = test if metric == "accuracy" else paired_test(theirs, ours)
    return {**asdict(test), "verdict": upward.verdict}


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as a text table and a sentence per subset."""
    head = ["trained on", "rows", f"{_title(report)} ± 95 %", "- random (p)", "- full (p)"]
    body = [_line(row, report) for row in _ordered(report["rows"])]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in [head]]
    lines += ["  ".join("-" * w for w in widths)]
    lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in body]
    sentences = [_sentence(row, report) for row in report["rows"] if row["kind"] == "subset"]
    return "\n".join(line.rstrip() for line in [*lines, "", *sentences, "", _footer(report)])


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows by size, the random subset of a size after the selected ones."""
    place = {"full": 0, "subset": 1, "random": 2}
    return sorted(rows, key=lambda r: (-r["kept"], place[r["kind"]]))


def _title(report: Mapping[str, Any]) -> str:
    is_language = any("perplexity" in row for row in report["rows"])
    return "loss per token" if is_language else str(report["metric"])


def _line(row: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    shown = _with_interval(row["mean"], row["ci95"])
    if row.get("perplexity"):
        shown += f" (perplexity {row['perplexity']:.2f})"
    return [
        row["name"] if row["kind"] != "random" else "random",
        f"{row['kept']:,} ({100 * row['fraction']:.4g} %)",
        shown,
        _difference(row["against_random"]),
        _difference(row["against_full"]),
    ]


def _with_interval(mean: float, half_width: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")


def _difference(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return ""
    shown = _with_interval(test["difference"], test["half_width"], "+")
    return shown if test["p_t"] is None else f"{shown} ({_p(test['p_t'])})"


def _p(value: float) -> str:
    return "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0") if value < 1 else "1"


def _sentence(row: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Say in words how a subset did against random, whatever came out."""
    test = row["against_random"]
    said = {
        "better": "better than a random subset of its size",
        "worse": "WORSE than a random subset of its size: random rows would have done better",
        "no difference found": "not distinguishable from a random subset of its size",
    }[test["verdict"]]
    if test["p_t"] is None:
        return f"{row['name']}: one seed only, so nothing can be said; use more --seeds"
    return (
        f"{row['name']}: {said} (difference "
        f"{_with_interval(test['difference'], test['half_width'], '+')}, paired t p = "
        f"{_p(test['p_t'])}, sign-flip p = {_p(test['p_flip'])}, {test['pairs']} seeds)"
    )


def _footer(report: Mapping[str, Any]) -> str:
    equal = (
        f"all trained for {report['steps']} steps of {report['batch_size']} rows"
        if report["match"] == "steps"
        else "all trained for the same number of epochs"
    )
    test = report["test"]
    left_out = f", {test['bad_rows']} left out" if test["bad_rows"] else ""
    better = "higher" if report["higher_is_better"] else "lower"
    return (
        f"{report['model']}, {len(report['seeds'])} seeds, {equal}; tested on {test['rows']:,} "
        f"rows of {test['uri']}{left_out}. {better.capitalize()} is better. Intervals are over "
        "seeds: they say nothing about another test set."
    )


def draw(report: Mapping[str, Any]) -> str:
    """Return the metric against the kept share, with intervals, as SVG."""
    rows = report["rows"]
    bars = [Bar(r["method"], r["fraction"], r["mean"], r["ci95"]) for r in rows]
    return accuracy(bars, _title(report))
