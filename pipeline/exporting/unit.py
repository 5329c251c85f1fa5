"""One unit of an export: encoded in memory, checked, committed, with a receipt."""

import hashlib
import json
from typing import Any

from curate.pipeline.exporting.formats import Written
from curate.pipeline.exporting.plan import Export, Identity, Unit
from curate.pipeline.storing.storage import Folder, canonical_json

OWN = ".curate"
"""The folder of plan and receipts inside an export; readers of data skip hidden folders."""


def receipt_name(unit: int) -> str:
    return f"{OWN}/unit-{unit:05d}.json"


def read_receipt(folder: Folder, unit: int) -> dict[str, Any] | None:
    """Return the receipt of a committed unit, None if there is none."""
    try:
        receipt: dict[str, Any] = json.loads(folder.read(receipt_name(unit)))
    except FileNotFoundError:
        return None
    return receipt


def written(receipt: dict[str, Any]) -> Written:
    """Return what a receipt says."""
    files = receipt["files"]
    return Written(
        receipt["unit"],
        tuple(f["name"] for f in files),
        receipt["rows"],
        sum(f["bytes"] for f in files),
    )


def export_unit(export: Export, unit: Unit, units: int, folder: Folder) -> Written:
    """Write the unit's files and its receipt, unless they are there; return what is there.

    Rows are compared with the manifest (identity, order, weights), files are read back, and each
    appears under its name whole or not at all. Files that another writer, or an earlier run that
    was killed before its receipt, put there stay if they hold as many rows.

    Raises:
        ValueError: a value does not fit the format, or the corpus changed.
        NoSpaceError: the disk is full.
    """
    if (found := read_receipt(folder, unit.number)) is not None:
        return written(found)
    identity = Identity()
    data = export.format.encode(export.tables(unit, identity))
    expected = export.expected(unit)
    assert (identity.rows, identity.digest) == (expected.rows, expected.digest), (
        f"unit {unit.number} holds other rows than the manifest says"
    )
    assert identity.rows == unit.rows, "the plan counted other rows"
    names = export.file_names(unit, units)
    for i, name in enumerate(names):
        if not folder.create(name, data[i]):
            data[i] = folder.read(name)
    if (count := export.format.count(data)) != unit.rows:
        raise ValueError(
            f"{folder.full_name(names[0])} holds {count} rows, {unit.rows} were written; it is "
            "not of this export: choose another folder with --out"
        )
    files = [
        {"name": name, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for name, d in zip(names, data, strict=True)
    ]
    receipt = {
        "format": "curate.export.unit",
        "version": 1,
        "unit": unit.number,
        "rows": unit.rows,
        "identity": identity.digest,
        "files": files,
    }
    folder.create(receipt_name(unit.number), canonical_json(receipt))
    found = read_receipt(folder, unit.number)
    assert found is not None, "a receipt was created, by us or by somebody before"
    return written(found)
