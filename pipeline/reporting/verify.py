"""Does everything still hold what its digests say? Nothing is trusted but the bytes."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

from curate.pipeline.exporting.export import read_success, verify_export
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.mixed_corpus import open_described
from curate.pipeline.models.checkpoint import find_checkpoints, load_model, read_checkpoint
from curate.pipeline.models.moments import moments_digest
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.reporting.layout import Kind, kind_of
from curate.pipeline.reporting.run_folder import RunFolder
from curate.pipeline.scoring.curvature_factors import FOLDER as CURVATURE_FOLDER
from curate.pipeline.scoring.curvature_factors import read_factors
from curate.pipeline.scoring.score_table import (
    SUCCESS,
    ScoreTable,
    digest_of_parts,
    part_name,
    read_receipt,
)
from curate.pipeline.scoring.target_gradients import FOLDER as TARGET_FOLDER
from curate.pipeline.scoring.target_gradients import read_gradients
from curate.pipeline.stores.describe import store_checks
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

log = logging.getLogger("curate.verify")
P = ParamSpec("P")


@dataclass
class Findings:
    """Every difference in one sentence, and what was compared."""

    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    def check(
        self, what: str, compare: Callable[P, str | None], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Return whether one thing is as it was: `compare` returns the difference or raises it."""
        try:
            problem = compare(*args, **kwargs)
        except (ValueError, OSError) as broken:
            problem = str(broken)
        self.checked.append(what)
        if problem:
            log.warning("%s", problem)
            self.problems.append(problem)
        return not problem


def verify(path: str | Path) -> dict[str, Any]:
    """Return `{checked, problems}` after recomputing every digest of what `path` holds.

    Score table: each part against the recorded digest, its receipt and row count, stores and their
    indexes, the corpus by sha256 where that was recorded, the checkpoints. Manifest: its parts and
    the corpus. Export: its files, and that there are no others. Run: all of them but exports.
    Checkpoints and corpora: that every file can be read whole.

    Raises:
        ValueError: there is nothing at `path` to verify.
    """
    kind, findings = kind_of(path), Findings()
    if kind is Kind.RUN:
        run = RunFolder.read(path)
        findings.problems += run.notes
        if run.scores is not None:
            _verify_scores(run.scores, findings)
        for checkpoint in run.checkpoints:
            if f"checkpoint {checkpoint.path}" not in findings.checked:
                findings.check(f"checkpoint {checkpoint.path}", _loads, checkpoint.path)
        for manifest in run.manifests:
            _verify_manifest(manifest, findings)
    elif kind is Kind.SCORES:
        _verify_scores(ScoreTable.open(path), findings)
    elif kind is Kind.MANIFEST:
        _verify_manifest(Manifest.read(path), findings)
    elif kind is Kind.EXPORT:
        findings.problems += verify_export(path)
        findings.checked += [f"{path}/{name}" for name in read_success(Folder(path))["files"]]
    elif kind is Kind.CHECKPOINTS:
        for checkpoint in find_checkpoints([str(path)]):
            findings.check(f"checkpoint {checkpoint.path}", _loads, checkpoint.path)
    else:
        _verify_corpus(open_corpus(path), findings)
    return {
        "kind": "verify",
        "path": str(path),
        "holds": kind.value,
        "result": "everything is as recorded" if not findings.problems else "differences found",
        **vars(findings),
    }


def _verify_scores(table: ScoreTable, findings: Findings) -> None:
    sums: dict[str, str] = {}
    recorded: dict[int, str] = {}
    for unit in range(table.success["units"]):
        name = part_name(unit)
        findings.check(f"{table.path}/{name}", _part, table, name, unit, sums)
        try:
            shards = read_receipt(table.folder, unit)["shards"]
        except (ValueError, OSError):
            continue  # said above
        recorded |= {int(i): s["sha256"] for i, s in shards.items() if "sha256" in s}
    if len(sums) == table.success["units"]:
        findings.check(f"{table.path} digest over the parts", _parts, table, sums)
    for what, compare in store_checks(table):
        findings.check(what, compare)
    _verify_corpus_of(table.corpus, recorded, findings)
    if table.meta["target"] is not None:
        _verify_corpus_of(table.meta["target"], {}, findings)
        for name in table.folder.names(f"{TARGET_FOLDER}/"):
            findings.check(f"{table.path}/{name}", _target_gradients, table, name)
    for name in table.folder.names(f"{CURVATURE_FOLDER}/"):
        findings.check(f"{table.path}/{name}", _factors, table, name)
    for entry in table.meta["checkpoints"]:
        findings.check(f"checkpoint {entry['path']}", _checkpoint, entry)
    moments = table.meta["config"].get("moments", [])
    for entry, digest in zip(table.meta["checkpoints"], moments, strict=bool(moments)):
        findings.check(f"moments of {entry['path']}", _moments, entry, digest)


def _part(table: ScoreTable, name: str, unit: int, sums: dict[str, str]) -> str | None:
    """Compare a part with its receipt, and note its sha256."""
    sums[name] = hashlib.sha256(table.folder.read(name)).hexdigest()
    if sums[name] != table.success["parts"][name]:
        return f"{table.path}/{name} was changed after the run ended: another sha256"
    receipt = read_receipt(table.folder, unit)
    if receipt["run"] != table.meta["run"] or receipt["unit"] != unit:
        return f"{table.path}/{name} belongs to another run"
    with open_parquet(table.folder, name) as file:
        rows = sum(batch.num_rows for batch in file.iter_batches())
    if rows != receipt["rows"]:
        return f"{table.path}/{name} has {rows} rows, its receipt says {receipt['rows']}"
    return None


def _parts(table: ScoreTable, sums: dict[str, str]) -> str | None:
    if digest_of_parts(sums) == table.success["digest"]:
        return None
    return f"the parts of {table.path} do not give the digest in {SUCCESS}"


def _moments(entry: dict[str, Any], digest: str) -> str | None:
    if moments_digest(entry["path"]) == digest:
        return None
    return f"the moments of checkpoint {entry['path']} changed since scoring"


def _target_gradients(table: ScoreTable, name: str) -> None:
    read_gradients(table.folder, name, table.meta["run"])


def _factors(table: ScoreTable, name: str) -> None:
    read_factors(table.folder, name, table.meta["run"])


def _checkpoint(entry: dict[str, Any]) -> str | None:
    if read_checkpoint(entry["path"]).digest == entry["digest"]:
        return None
    return f"checkpoint {entry['path']} changed after it was used for scoring"


def _loads(path: str) -> str | None:
    """Load the weights into the model: a truncated or foreign file says so."""
    load_model(read_checkpoint(path))
    return None


def _verify_manifest(manifest: Manifest, findings: Findings) -> None:
    findings.check(f"{manifest.path} parts", manifest.check_files)
    findings.check(f"{manifest.path} rows", _kept_rows, manifest)
    _verify_corpus_of(manifest.content["corpus"], {}, findings)


def _kept_rows(manifest: Manifest) -> str | None:
    rows = sum(batch.num_rows for batch in manifest.batches(["row"]))
    if rows == len(manifest):
        return None
    return f"{manifest.path} has {rows} rows, manifest.json says {len(manifest)}"


def _verify_corpus_of(
    described: dict[str, Any], recorded: dict[int, str], findings: Findings
) -> None:
    """Compare the corpus with its description, and each shard with its recorded sha256."""
    what = f"corpus {described['uri']}"
    if what in findings.checked:
        return
    if not findings.check(what, _same_corpus, described):
        return
    for shard, digest in sorted(recorded.items()):
        path = described["shards"][shard]["path"]
        findings.check(f"{what} {path} sha256", _shard, described, shard, digest)


def _same_corpus(described: dict[str, Any]) -> None:
    open_described(described)


def _shard(described: dict[str, Any], shard: int, digest: str) -> str | None:
    corpus = open_corpus(described["uri"])
    if corpus.sha256(shard) == digest:
        return None
    return f"shard {corpus.url(shard)} changed since it was scored: another sha256"


def _verify_corpus(corpus: Corpus, findings: Findings) -> None:
    for shard, entry in enumerate(corpus.shards):
        findings.check(f"{corpus.uri} {entry.path}", _readable, corpus, shard)


def _readable(corpus: Corpus, shard: int) -> str | None:
    rows = sum(batch.num_rows for batch in corpus.read(shard))
    if rows == corpus.shards[shard].rows:
        return None
    return f"shard {corpus.url(shard)} has {rows} rows, its footer says {corpus.shards[shard].rows}"
