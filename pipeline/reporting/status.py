"""How far a run has come, read off its folders while it works or after it died."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from curate.pipeline.manifests.manifest import NAME as MANIFEST
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.scoring.attempts import read_attempts
from curate.pipeline.scoring.score_table import META as SCORES
from curate.pipeline.scoring.score_table import RAW, SUCCESS, UNITS, part_name, read_receipt
from curate.pipeline.storing.lock import BEAT_S, LOCK, MISSED_BEATS
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder


def status(run: str | Path = "run") -> dict[str, Any]:
    """Return the state of every part of a run folder, or of one score folder.

    Raises:
        ValueError: there is no run in the folder.
    """
    folder = Folder(run)
    if folder.exists(SCORES):
        return {"kind": "status", "path": folder.uri, "scores": [scores_status(folder)]}
    found = {name: folder.child(name) for name in folder.folders()}
    scores = [scores_status(child) for child in found.values() if child.exists(SCORES)]
    manifests = [
        {"name": name, "rows": len(Manifest.read(child.uri))}
        for name, child in found.items()
        if child.exists(MANIFEST)
    ]
    training = [_training(n, child) for n, child in found.items() if n.startswith("checkpoints")]
    if not (scores or manifests or training):
        raise ValueError(f"{run} holds no run; `curate train` or `curate score` starts one")
    return {
        "kind": "status",
        "path": folder.uri,
        "checkpoints": training,
        "scores": scores,
        "manifests": manifests,
    }


def scores_status(folder: Folder) -> dict[str, Any]:
    """Return how many units and rows of a score table are committed, and who is at work."""
    line: dict[str, Any] = {"path": folder.uri, "finished": folder.exists(SUCCESS)}
    if stores := folder.folders("store/"):
        line["stores"] = [name.rpartition("/")[2] for name in stores]
    if not folder.exists(UNITS):
        return line | {"units": 0, "units_done": 0, "rows": 0, "rows_done": 0} | _holder(folder)
    with open_parquet(folder, UNITS) as file:
        plan = file.read(use_threads=False)
    rows: Counter[int] = Counter()
    for unit, count in zip(plan["unit"].to_pylist(), plan["rows"].to_pylist(), strict=True):
        rows[unit] += count
    raw = folder.child(RAW)  # while it is made, a table with standardised scores lies there
    parts = raw if raw.names("part-") and not line["finished"] else folder
    there = set(parts.names("part-"))
    done = [unit for unit in rows if part_name(unit) in there]
    receipts = [read_receipt(parts, unit) for unit in done]
    tries = [record for records in read_attempts(folder).values() for record in records]
    died = sum(record.state in ("died", "gone") for record in tries)
    return {
        **line,
        "units": len(rows),
        "units_done": len(done),
        "rows": rows.total(),
        "rows_done": sum(rows[unit] for unit in done),
        "bad_rows": sum(receipt["bad_rows"] for receipt in receipts),
        "quarantined": sum(receipt["quarantined"] is not None for receipt in receipts),
        "workers_died": died,
        **_holder(folder),
    }


def _training(name: str, folder: Folder) -> dict[str, Any]:
    """Return which seeds have begun and ended. A seed is under way while it keeps progress."""
    saved = [n for n in folder.folders("seed") if folder.child(n).exists("curate.json")]
    return {
        "name": name,
        "checkpoints": len(saved),
        "seeds": len({n.split("-")[0] for n in saved}),
        "seeds_under_way": len(folder.folders("progress/seed")),
        **_holder(folder),
    }


def _holder(folder: Folder) -> dict[str, Any]:
    """Return the run that holds the folder's lock, null where none does or it is dead."""
    try:
        lock = folder.read_json(LOCK)
        silent_s = time.time() - lock["beat"]
        is_alive = silent_s < MISSED_BEATS * max(lock["beat_s"], BEAT_S)
        return {
            "running": f"process {lock['pid']} on {lock['host'].split('/')[0]}"
            if is_alive
            else None
        }
    except (FileNotFoundError, ValueError, KeyError):
        return {"running": None}
