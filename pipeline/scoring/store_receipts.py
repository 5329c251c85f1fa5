"""What a finished run says of its stores: each file and its sha256, and whether it is there."""

from collections.abc import Mapping
from typing import Any

from curate.pipeline.scoring.score_table import part_name
from curate.pipeline.storing.storage import Folder

TARGET = "target"
"""Folder of what belongs to the target: `target/store/NAME/unit-00000.arrow`."""
TOP_ROWS = "top_rows.parquet"
TARGET_RECEIPT = f"{TARGET}/store/receipt.json"


def stores_of(folder: Folder, receipts: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the sha256 of each file of a store, by its name below the scores folder.

    Raises:
        ValueError: a file that a part's receipt names is gone.
    """
    found: dict[str, str] = {}
    for unit, receipt in receipts.items():
        for entry in receipt.get("stores", {}).values():
            if not folder.exists(entry["file"]):
                raise ValueError(
                    f"{folder.full_name(entry['file'])} is missing: delete "
                    f"{folder.full_name(part_name(unit))} and run the same command"
                )
            found[entry["file"]] = entry["sha256"]
    if folder.exists(TARGET_RECEIPT):
        for entry in folder.read_json(TARGET_RECEIPT)["stores"].values():
            found[entry["file"]] = entry["sha256"]
    return found
