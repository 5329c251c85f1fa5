"""What `curate inspect` shows of a table's stores, and what `curate verify` checks of them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow.parquet as pq

from curate.pipeline.scoring.score_table import ScoreTable
from curate.pipeline.scoring.store_receipts import TARGET, TOP_ROWS
from curate.pipeline.stores.index import check_index
from curate.pipeline.stores.store import open_store
from curate.pipeline.stores.writer import sha256_in
from curate.pipeline.storing.parquet import open_parquet

SHOWN_TOP_ROWS = 10


def describe_stores(table: ScoreTable) -> dict[str, Any]:
    """Return each store's size and making, and the first of the top rows; {} without stores."""
    recorded = table.success.get("stores", {})
    found: dict[str, Any] = {}
    leads = dict.fromkeys(file.rpartition("/")[0] for file in recorded)
    stores = {lead: _described(table, lead) for lead in leads}
    if stores:
        found["stores"] = stores
    if "top_rows" in table.notes:
        noted = table.notes["top_rows"]
        found["top_rows"] = {k: v for k, v in noted.items() if k != "sha256"}
        if table.folder.exists(TOP_ROWS):
            with open_parquet(table.folder, TOP_ROWS) as file:
                found["first_top_rows"] = _first(file)
    return found


def _described(table: ScoreTable, lead: str) -> dict[str, Any]:
    store = open_store(table, lead.rpartition("/")[2], target=lead.startswith(f"{TARGET}/"))
    layout = store.layout
    return {
        "rows": store.rows,
        "checkpoints": len(layout.checkpoints),
        "layers": len(layout.layers),
        "dimension": layout.dimension,
        "row_bytes": layout.row_bytes,
        **{key: value for key, value in layout.how.items() if value not in (None, "")},
    }


def _first(file: pq.ParquetFile) -> list[dict[str, Any]]:
    for batch in file.iter_batches(SHOWN_TOP_ROWS, use_threads=False):
        return list(batch.to_pylist())
    return []


def store_checks(table: ScoreTable) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield (what is checked, its check) of stores, indexes and top rows.

    A check returns what is wrong in one sentence, or None.
    """
    folder, recorded = table.folder, table.success.get("stores", {})
    for file, digest in recorded.items():
        yield folder.full_name(file), partial(_same, table, file, digest)
    for lead in dict.fromkeys(file.rpartition("/")[0] for file in recorded):
        for name in folder.names(f"{lead}/index-"):
            if name.endswith(".json"):
                what = folder.full_name(name)
                yield what, partial(check_index, folder, name, table)
    if digest := table.notes.get("top_rows", {}).get("sha256"):
        what = folder.full_name(TOP_ROWS)
        yield what, partial(_same, table, TOP_ROWS, digest)


def _same(table: ScoreTable, file: str, digest: str) -> str | None:
    full = table.folder.full_name(file)
    try:
        found = sha256_in(table.folder, file)
    except FileNotFoundError:
        return f"{full} is missing"
    return None if found == digest else f"{full} was changed after the run ended: another sha256"
