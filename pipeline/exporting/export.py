"""`export`: the selected rows with their weights, copied into a format that a trainer reads.

One output file (or two) per unit of consecutive rows, each committed whole; `_SUCCESS` last. Killed
anywhere, the same call goes on with the units that have no receipt.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curate.pipeline.exporting.formats import Written
from curate.pipeline.exporting.mds_format import MdsFormat
from curate.pipeline.exporting.plan import Export, Unit, Wish, stream_name
from curate.pipeline.exporting.unit import OWN, export_unit, read_receipt, written
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.storing.lock import RunLock
from curate.pipeline.storing.storage import Folder, canonical_json, is_url
from curate.pipeline.storing.vacate import vacated

log = logging.getLogger("curate.export")

FORMAT, VERSION = "curate.export", 1
PLAN, SUCCESS = f"{OWN}/plan.json", "_SUCCESS"
SAID = frozenset({"to", "manifest", "rows", "weight_kind", "epoch", "files"})
RAY_BYTES = 4 << 30
"""A selection of about more bytes than this goes to Ray by default."""


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    path: str
    to: str
    rows: int
    files: tuple[str, ...]
    manifest: str
    weight_kind: str

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"kind": "export", **asdict(self), "files": len(self.files)}

    def __str__(self) -> str:
        return f"{self.rows} rows in {len(self.files)} files: {self.path}"


def export(
    manifest: str | Path | Manifest,
    to: str,
    out: str | Path = "run/export",
    *,
    columns: Sequence[str] | None = None,
    epoch: int | None = None,
    seed: int = 0,
    repeats: str = "rows",
    packing: str | None = None,
    corpus: str | None = None,
    engine: str = "auto",
    workers: int | None = None,
    ray_address: str | None = None,
    unit_rows: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Return the finished copy of a selection's rows in `out`; call it again to resume.

    `to` is a name of `FORMATS`. Rows come in corpus order, each with `weight`; where weights are of
    kind `repeat`, each as often as it says with weight 1 (`repeats="rows"`), once with the count as
    its weight (`"column"`), or, for MDS, in a stream per count (`"streams"`). With `epoch` the copy
    is what the loader shows in that epoch under `seed`, in that order: draws of sampling weights,
    repeats, and what a schedule says.

    `columns` are the corpus columns to copy (None: all), `packing` that of JSON lines. `engine`:
    `local`, `ray` or `auto` (by size). Memory per process is about twice a unit's files; a unit is
    some 64 MB of the corpus's files, or `unit_rows` rows.

    Raises:
        ValueError: the manifest's corpus changed, an unknown format, weights or values that it
            cannot carry, or `out` holds something else (unless it is an export and `overwrite`).
        NoSpaceError: the disk is full; what is there is whole, and the same call goes on.
        RuntimeError: another export is writing the folder.
    """
    opened = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest, corpus)
    if engine not in ("auto", "local", "ray"):
        raise ValueError(f"engine must be auto, local or ray, not {engine!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if engine == "local" and (ray_address is not None or (workers or 1) > 1):
        raise ValueError("workers and ray_address are for --engine ray; local is one process")
    chosen = None if columns is None else tuple(columns)
    job = Export(opened, Wish(to, chosen, epoch, seed, repeats, packing, unit_rows))
    job.check()
    folder = Folder(os.fspath(out))
    uses_ray = _uses_ray(engine, opened, workers, ray_address)
    _refuse_inside_corpus(folder, opened)
    _refuse_foreign(folder)
    with vacated(folder), RunLock(folder.child(OWN)) as lock, _nothing_planned_in_vain(folder):
        folder.clean_tmp()
        if overwrite and folder.exists(PLAN) and uses_ray:
            from curate.pipeline.ray_cluster import check_cluster

            check_cluster(ray_address, None, "a unit", folder.uri)
        plan = _planned(job, folder, overwrite)
        units = [Unit(**unit) for unit in plan["units"]]
        if folder.exists(SUCCESS):
            log.info("%s is finished already", folder.uri)
            return _finished(folder, read_success(folder))
        todo = [u for u in units if read_receipt(folder, u.number) is None]
        if len(todo) < len(units):
            log.info("%d of %d units are there already", len(units) - len(todo), len(units))
        if engine == "auto":
            log.info("engine: %s", "ray" if uses_ray else "local, in this process")
        if uses_ray:
            from curate.pipeline.exporting.ray_export import export_on_ray

            export_on_ray(job, todo, len(units), folder, workers, ray_address)
        else:
            for unit in todo:
                lock.check()
                export_unit(job, unit, len(units), folder)
        lock.check()
        success = _finish(job, units, folder)
    return _finished(folder, success)


def read_success(folder: Folder) -> dict[str, Any]:
    """Return what `_SUCCESS` says. FileNotFoundError for an unfinished export.

    Raises:
        ValueError: the file is not what an export writes.
    """
    success: dict[str, Any] = folder.read_json(SUCCESS)
    is_whole = isinstance(success, dict) and success.keys() >= SAID
    if not is_whole or not isinstance(success["files"], dict):
        raise ValueError(f"{folder.uri}/{SUCCESS} is damaged; run `curate export --overwrite`")
    return success


def verify_export(path: str | Path) -> list[str]:
    """Return what is wrong with a finished export, a sentence each.

    Every digest is recomputed, and no file may be there that the export did not write.

    Raises:
        ValueError: there is no finished export.
    """
    folder = Folder(os.fspath(path))
    if not folder.exists(SUCCESS):
        raise ValueError(f"{path} holds no finished export; run `curate export` again")
    recorded = read_success(folder)["files"]
    return _problems(folder, recorded) + _strangers(folder, recorded)


def clear(folder: Folder) -> None:
    """Remove an export, `_SUCCESS` first."""
    if not folder.exists(PLAN):
        return
    recorded = [name for name in folder.names() if name == SUCCESS]
    units = folder.read_json(PLAN)["units"]
    indexes: list[str] = folder.read_json(PLAN)["indexes"]
    files = [name for unit in units for name in unit["files"]]
    receipts = folder.names(f"{OWN}/unit-")
    for name in [*recorded, *indexes, *files, *receipts, PLAN]:
        folder.delete(name)


def _planned(job: Export, folder: Folder, overwrite: bool) -> dict[str, Any]:
    """Return the plan in the folder, which must be of this export, or write it.

    To be overwritten, an older export goes as soon as the new one is planned.
    """
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "manifest": {"path": job.manifest.path, "digest": job.manifest.digest},
        "wish": job.wish.content(),
    }
    if folder.exists(PLAN) and not _is_begun(folder):
        folder.delete(PLAN)  # refused at its first unit, say: nothing there is anybody's
    if folder.exists(PLAN) and not overwrite:
        there = folder.read_json(PLAN)
        for key, new in (("another manifest", "manifest"), ("other settings", "wish")):
            old = there[new]
            same = old["digest"] == head[new]["digest"] if new == "manifest" else old == head[new]
            if not same:
                changed = "" if new == "manifest" else f" ({_changes(old, head[new])})"
                raise ValueError(
                    f"{folder.uri} holds an export of {key}{changed}; choose another folder with "
                    "--out or replace it with --overwrite"
                )
    else:
        units = job.plan()
        if not units:
            raise ValueError(f"{job.manifest.path} gives no row to export")
        listed = [{**asdict(u), "files": job.file_names(u, len(units))} for u in units]
        indexes = sorted(_indexes(job, [_empty(u, job, len(units)) for u in units], folder))
        clear(folder)
        folder.create(PLAN, canonical_json({**head, "units": listed, "indexes": indexes}))
    plan: dict[str, Any] = folder.read_json(PLAN)
    keys = ("number", "start", "stop", "rows", "count")
    return {**plan, "units": [{k: u[k] for k in keys} for u in plan["units"]]}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    return "; ".join(f"{k}: {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v)


@contextlib.contextmanager
def _nothing_planned_in_vain(folder: Folder) -> Iterator[None]:
    """Remove the plan of what is refused before any file of it is there."""
    try:
        yield
    except ValueError:  # no other fault: who lost the lock must leave the plan to its new holder
        if folder.exists(PLAN) and not _is_begun(folder):
            folder.delete(PLAN)
        raise


def _is_begun(folder: Folder) -> bool:
    """Return whether any file of the plan in the folder is there."""
    files = [name for unit in folder.read_json(PLAN)["units"] for name in unit["files"]]
    return folder.exists(SUCCESS) or any(folder.exists(name) for name in files)


def _empty(unit: Unit, job: Export, units: int) -> Written:
    return Written(unit.number, tuple(job.file_names(unit, units)), unit.rows, 0)


def _finish(job: Export, units: Sequence[Unit], folder: Folder) -> dict[str, Any]:
    """Check every file against its receipt, write the indexes and `_SUCCESS`."""
    receipts = []
    for unit in units:
        receipt = read_receipt(folder, unit.number)
        assert receipt is not None, f"unit {unit.number} has no receipt"
        receipts.append(receipt)
    digests = {f["name"]: f["sha256"] for r in receipts for f in r["files"]}
    if problems := _problems(folder, digests):
        raise RuntimeError(f"{problems[0]}; export again with --overwrite")
    rows = sum(r["rows"] for r in receipts)
    assert rows == sum(u.rows for u in units), "the receipts count other rows than the plan"
    for name, data in _indexes(job, [written(r) for r in receipts], folder).items():
        folder.replace(name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    success = {
        "format": FORMAT,
        "version": VERSION,
        "to": job.wish.to,
        "manifest": {"path": job.manifest.path, "digest": job.manifest.digest},
        "corpus": job.manifest.content["corpus"]["uri"],
        "rows": rows,
        "weight_kind": job.format_weight_kind,
        "epoch": job.wish.epoch,
        "files": digests,
    }
    folder.replace(SUCCESS, canonical_json(success))
    return success


def _indexes(job: Export, units: Sequence[Written], folder: Folder) -> dict[str, bytes]:
    """Return the files that make the whole readable: the format's own, for each stream if any."""
    if job.wish.repeats != "streams":
        return job.format.finish(folder, units)
    assert isinstance(job.format, MdsFormat), "only MDS has streams"
    found: dict[str, bytes] = {}
    streams = sorted({unit.files[0].partition("/")[0] for unit in units})
    for stream in streams:
        mine = [unit for unit in units if unit.files[0].startswith(f"{stream}/")]
        found[f"{stream}/index.json"] = job.format.index(mine)
    listed = [{"local": s, "repeat": int(s.removeprefix(stream_name(0)[:-5]))} for s in streams]
    found["streams.json"] = canonical_json({"streams": listed})
    return found


def _problems(folder: Folder, digests: dict[str, str]) -> list[str]:
    found = []
    for name, digest in digests.items():
        if not folder.exists(name):
            found.append(f"{folder.full_name(name)} is missing")
        elif hashlib.sha256(folder.read(name)).hexdigest() != digest:
            found.append(f"{folder.full_name(name)} was changed after it was written")
    return found


def _strangers(folder: Folder, recorded: dict[str, str]) -> list[str]:
    """Return a sentence for each file that the export did not write; a reader may take it for data.

    Hidden files and folders are left out, as readers leave them out.
    """
    known, waiting, found = {*recorded, SUCCESS}, [""], []
    while waiting:
        prefix = waiting.pop()
        names = folder.names(prefix)
        waiting += [f"{n}/" for n in folder.folders(prefix) if not _is_hidden(n)]
        found += [n for n in names if n not in known and not _is_hidden(n)]
    return [
        f"{folder.full_name(name)} is not of this export, and a reader would take it for a part; "
        "remove it"
        for name in sorted(found)
    ]


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _finished(folder: Folder, success: dict[str, Any]) -> Exported:
    return Exported(
        folder.uri,
        success["to"],
        success["rows"],
        tuple(sorted(success["files"])),
        success["manifest"]["path"],
        success["weight_kind"],
    )


def _refuse_foreign(folder: Folder) -> None:
    """Refuse a folder that holds anything but an export."""
    if folder.exists(PLAN):
        found = folder.read_json(PLAN)
        if found.get("format") == FORMAT and found.get("version") == VERSION:
            return
    others = [n for n in folder.names() if n != SUCCESS]
    others += [n for n in folder.folders() if n != OWN]
    if others:
        raise ValueError(
            f"{folder.uri} holds other files ({others[0]}); choose another folder with --out"
        )
    path = folder.local_path()
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; choose a folder with --out")


def _refuse_inside_corpus(folder: Folder, manifest: Manifest) -> None:
    """An export among the shards would be read as part of the corpus."""
    for uri in manifest.content["corpus"]["uri"].split("\n"):
        is_below = not is_url(uri) and f"{folder.uri}/".startswith(f"{uri.rstrip('/')}/")
        if is_below and os.path.isdir(uri):
            raise ValueError(f"{folder.uri} lies inside the corpus {uri}; choose another folder")


def _uses_ray(
    engine: str, manifest: Manifest, workers: int | None, ray_address: str | None
) -> bool:
    if engine != "auto":
        return engine == "ray"
    described = manifest.content["corpus"]
    size = sum(shard["bytes"] for shard in described["shards"])
    is_large = size * len(manifest) / max(1, described["rows"]) > RAY_BYTES
    return ray_address is not None or (workers or 1) > 1 or is_large
