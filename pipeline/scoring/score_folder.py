"""The scores folder as a run finds it and leaves it: new, resumed, refused, finished."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.attempts import FOLDER as ATTEMPTS
from curate.pipeline.scoring.attempts import LETHAL
from curate.pipeline.scoring.score_rows import ScoreRows
from curate.pipeline.scoring.score_table import (
    ERROR_FIELDS,
    ERRORS,
    FORMAT,
    META,
    RAW,
    ROW_GROUP,
    SUCCESS,
    UNITS,
    digest_of_parts,
    parquet_bytes,
    part_name,
    read_receipt,
    write_part,
)
from curate.pipeline.scoring.score_unit import receipt
from curate.pipeline.scoring.store_receipts import TOP_ROWS, stores_of
from curate.pipeline.scoring.text_weights import FOLDER as NGRAMS
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.commit import TMP
from curate.pipeline.storing.lock import LOCK
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder, canonical_json

log = logging.getLogger("curate.score")

OURS = frozenset({META, SUCCESS, UNITS, ERRORS, TOP_ROWS, LOCK})
OUR_FOLDERS = frozenset({ATTEMPTS, TMP, RAW, "store", "target", "curvature", NGRAMS})


def refuse_foreign(folder: Folder) -> None:
    """Raise ValueError when the folder holds something that is no score table."""
    if folder.local_path() is not None and folder.exists() and not folder.local_path().is_dir():  # type: ignore[union-attr]
        raise ValueError(f"{folder.uri} is a file; choose another output folder")
    foreign = [n for n in folder.names() if n not in OURS and not n.startswith("part-")]
    foreign += [n for n in folder.folders() if n not in OUR_FOLDERS]
    if folder.exists(META):
        found = folder.read_json(META)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            foreign.append(META)
    elif not foreign:
        foreign = [n for n in folder.names() if n.startswith("part-")]
    if foreign:
        raise ValueError(
            f"{folder.uri} holds something else ({foreign[0]}); choose another output folder"
        )


def refuse_other_run(folder: Folder, meta: Mapping[str, Any], corpus: Corpus) -> bool:
    """Return whether the folder holds this run already, in part or whole.

    A run that was refused before its units were planned holds nothing: another may take its place.

    Raises:
        ValueError: it holds a run with another configuration or of another corpus.
    """
    if not folder.exists(META):
        return False
    before = folder.read_json(META)
    if before["run"] == meta["run"]:
        return True
    if not folder.exists(UNITS):
        return False
    hint = "choose another output folder, or --overwrite to start over"
    if before["config"]["corpus"] != meta["config"]["corpus"]:
        try:
            corpus.same_corpus(before["corpus"])
        except ValueError as differs:
            raise ValueError(f"{folder.uri} is of other data: {differs}; {hint}") from None
    changes = "; ".join(differences(before["config"], meta["config"]))
    raise ValueError(f"{folder.uri} holds a run with another configuration ({changes}); {hint}")


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what changed between two configurations, as `key: old -> new`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    if before == now:
        return []
    return [f"{name}: {_short(before)} -> {_short(now)}"]


def clear(folder: Folder) -> None:
    """Remove a score table; what tells that it is one goes last."""
    folder.delete(SUCCESS)
    for name in folder.names():
        if name.startswith("part-"):
            folder.delete(name)
    for inner in folder.folders():
        _empty(folder, inner)
    for name in (TOP_ROWS, ERRORS, UNITS, META):
        folder.delete(name)


def _empty(folder: Folder, inner: str) -> None:
    for name in folder.names(f"{inner}/"):
        folder.delete(name)
    for deeper in folder.folders(f"{inner}/"):
        _empty(folder, deeper)


def committed(folder: Folder, units: Sequence[Unit]) -> dict[int, dict[str, Any]]:
    """Return the receipts of the units that are done."""
    names = set(folder.names("part-"))
    return {u.number: read_receipt(folder, u.number) for u in units if part_name(u.number) in names}


def quarantine(folder: Folder, work: Work, unit: Unit, reason: str) -> None:
    """Commit a part in which every row has the reason for its error."""
    scores = ScoreRows(work, unit)
    for row in range(unit.rows):
        scores.fail(row, f"its unit was quarantined: {reason}")
    write_part(folder, unit.number, scores.table(None), receipt(work, unit, 0, [], reason))


def why_lethal(deaths: Mapping[str, int]) -> str | None:
    """Return why a unit must not be tried again, None when it may be."""
    for step, count in sorted(deaths.items()):
        if count >= LETHAL:
            return f"it killed its process {count} times at {step}"
    return None


def finish(
    folder: Folder, work: Work, units: Sequence[Unit], notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Compile the errors, check that every part is there, and say that the run is whole."""
    receipts = committed(folder, units)
    assert len(receipts) == len(units), "a unit was not scored"
    folder.replace(ERRORS, parquet_bytes(_errors(folder, work, units, receipts)))
    sums = {part_name(u.number): _sha256(folder, part_name(u.number)) for u in units}
    quarantined = [
        {"unit": u.number, "name": _name(work, u), "reason": receipts[u.number]["quarantined"]}
        for u in units
        if receipts[u.number]["quarantined"]
    ]
    for unit in units:
        assert receipts[unit.number]["run"] == work.run, "a part belongs to another run"
    success = {
        "format": "curate.scores.success",
        "version": 1,
        "run": work.run,
        "rows": sum(r["rows"] for r in receipts.values()),
        "bad_rows": sum(r["bad_rows"] for r in receipts.values()),
        "units": len(units),
        "quarantined": quarantined,
        "splits": sum(len(r["splits"]) for r in receipts.values()),
        "parts": sums,
        "digest": digest_of_parts(sums),
        "notes": dict(notes),
    }
    if work.stores is not None:
        success["stores"] = stores_of(folder, receipts)
    folder.create(SUCCESS, canonical_json(success))
    return success


def _errors(
    folder: Folder,
    work: Work,
    units: Sequence[Unit],
    receipts: Mapping[int, Mapping[str, Any]],
) -> pa.Table:
    schema = pa.schema(ERROR_FIELDS)
    if work.id_column:
        schema = schema.append(work.schema.field("id"))
    tables = [schema.empty_table()]
    for unit in units:
        found = receipts[unit.number]
        if not found["bad_rows"] and not found["quarantined"]:
            continue
        columns = [n for n in schema.names if n != "unit"]
        with open_parquet(folder, part_name(unit.number)) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=columns, use_threads=False):
                rows = pa.Table.from_batches([batch]).filter(pc.is_valid(batch["error"]))
                number = pa.array([unit.number] * rows.num_rows, pa.int32())
                rows = rows.append_column("unit", number).select(schema.names)
                tables.append(rows.cast(schema))
    return pa.concat_tables(tables).combine_chunks()


def _sha256(folder: Folder, name: str) -> str:
    with folder.open(name) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _name(work: Work, unit: Unit) -> str:
    return unit.describe([shard.path for shard in work.corpus.shards])


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-16:]}"
