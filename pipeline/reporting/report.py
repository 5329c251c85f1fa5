"""The report of a run: one HTML file with what was run, scored, kept and reached.

Whatever the run folder does not hold (yet) is left out, and said.
"""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import curate
from curate.pipeline.reporting.page import facts, page, paragraph, section
from curate.pipeline.reporting.report_scores import (
    correlations,
    distributions,
    errors,
    extreme_rows,
)
from curate.pipeline.reporting.report_selections import accuracy, selection_text, selections
from curate.pipeline.reporting.run_folder import RunFolder
from curate.pipeline.reporting.summary import summarize
from curate.pipeline.storing.storage import Folder

NAME = "report.html"
LIBRARIES = ("torch", "ray", "pyarrow", "numpy")


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
        found.folder.uri,
        sections(found),
    )
    path = str(out) if out is not None else found.folder.full_name(NAME)
    place, slash, name = path.rpartition("/")
    folder = Folder(place or slash or ".")
    folder.replace(name, text.encode())
    return folder.full_name(name)


def sections(run: RunFolder) -> Iterator[str]:
    """Yield the report's sections as HTML, those for which the run has something to show."""
    for evaluation in run.evaluations:
        yield accuracy(evaluation)
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
    lines += [(run.manifest_name(m), selection_text(m)) for m in run.manifests]
    notes = [paragraph(note, "soft") for note in run.notes]
    return section("What was run", facts(lines), *notes)


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


def _call(alias: str, spec: dict[str, Any]) -> str:
    """Return a scorer as one would ask for it."""
    params = ",".join(f"{k}={v}" for k, v in spec["params"].items() if v not in ("", None))
    call = f"{spec['name']}({params})" if params else spec["name"]
    return call if alias == spec["name"] else f"{alias}={call}"


def _when(epoch: float | None, step: int) -> str:
    return f"step {step}" if epoch is None else f"epoch {epoch:g}"
