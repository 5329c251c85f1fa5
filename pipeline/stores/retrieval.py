"""What `curate index` says: the index it made, and the rows nearest to one."""

import re
from typing import Any

import numpy as np

from curate.pipeline.scoring.score_table import ScoreTable, part_name
from curate.pipeline.stores.index import StoreIndex
from curate.pipeline.stores.store import Store
from curate.pipeline.storing.parquet import open_parquet


def index_summary(index: StoreIndex, near: str | None, k: int) -> dict[str, Any]:
    """Return the index as JSON, with the `k` rows nearest to the row `near` (SHARD:ROW).

    Raises:
        ValueError: no such row, one without a vector, or `k` is out of range.
    """
    shown = ("store", "similarity", "kind", "vectors", "dimension", "lists", "codes", "trained")
    folder = index.store.folder
    found: dict[str, Any] = {"kind": "index", "path": folder.full_name(index.said["file"])}
    found |= {("index" if n == "kind" else n): index.said[n] for n in shown if n in index.said}
    found |= {"bytes": index.said["bytes"], "seed": index.said["seed"]}
    if near is not None:
        found["near"] = near
        found["neighbors"] = neighbors(index, ScoreTable.open(folder.uri), near, k)
    return found


def neighbors(index: StoreIndex, table: ScoreTable, near: str, k: int) -> list[dict[str, Any]]:
    """Return the rows nearest to the row SHARD:ROW, itself left out, best first.

    Raises:
        ValueError: no such row, one without a vector, or `k` is out of range.
    """
    place = _place(table, near)
    most = len(index.index)
    if not 1 <= k < most:
        raise ValueError(f"{k} neighbours of {most} rows with vectors; choose 1 to {most - 1}")
    values, numbers = index.near(np.array([place]), k + 1)
    others = [
        (float(value), int(number))
        for value, number in zip(values[0], numbers[0], strict=True)
        if number not in (place, -1)
    ][:k]
    measure = "distance" if index.said["similarity"] == "euclidean" else "similarity"
    return [{**_row(table, index.store, number), measure: value} for value, number in others]


def _place(table: ScoreTable, near: str) -> int:
    """Return the place of a row in the score table."""
    match = re.fullmatch(r"(\d+):(\d+)", near)
    if match is None:
        raise ValueError(f"cannot read the row {near!r}; write SHARD:ROW, such as 0:12")
    shard, row = int(match[1]), int(match[2])
    start = 0
    for span in table.units.to_pylist():
        if span["shard"] == shard and 0 <= row - span["row_start"] < span["rows"]:
            return start + row - int(span["row_start"])
        start += span["rows"]
    raise ValueError(f"the score table {table.path} has no row {near}")


def _row(table: ScoreTable, store: Store, number: int) -> dict[str, Any]:
    """Return shard, row and id of a place in the score table."""
    wanted = [name for name in ("shard", "row", "id") if name in table.schema.names]
    unit, place = store.place(number)
    with open_parquet(table.folder, part_name(unit)) as file:
        part = file.read(wanted, use_threads=False)
    found: dict[str, Any] = part.slice(place, 1).to_pylist()[0]
    return found
