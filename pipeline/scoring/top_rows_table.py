"""`top_rows.parquet`: the strongest proponents and opponents of each target row, by name."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.scoring.score_table import parquet_bytes, part_name, read_receipt
from curate.pipeline.scoring.store_receipts import TARGET, TARGET_RECEIPT, TOP_ROWS
from curate.pipeline.scoring.store_unit import store_name
from curate.pipeline.scoring.top_rows_exact import ExactPairs, Located, NotExact, every_row
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.stores.store import Store
from curate.pipeline.stores.top_rows import MORE, Pairs, retrieve, top_rows
from curate.pipeline.storing.parquet import open_parquet
from curate.pipeline.storing.storage import Folder

log = logging.getLogger("curate.score")

ENTRY = b"curate.top_rows"


def write_top_rows(work: Work, units: Sequence[Unit]) -> dict[str, Any]:
    """Write the table of a run whose parts are all there; return what `_SUCCESS.json` notes of it.

    `error` is the root mean square error of sketched cosines, as measured on target rows;
    `exact` tells whether similarities are those of gradients, `estimates_because` why not.
    """
    assert work.stores is not None and work.target is not None, "asked for"
    folder = Folder(work.out)
    if not folder.exists(TARGET_RECEIPT):  # every unit was given up before any could be scored
        return {"rows": 0, "error": None}
    receipt = folder.read_json(TARGET_RECEIPT)
    is_cosine = work.stores.similarity == "cosine"
    parts = [(_file(folder, unit.number), unit.rows) for unit in units]
    if all(file is None for file, _ in parts):
        return {"rows": 0, "error": receipt["error"]}
    corpus = Store(folder, parts, work.run, unit=is_cosine)
    own = [(f"{TARGET}/{store_name('sketch', 0)}", int(receipt["rows"]))]
    target = Store(folder, own, work.run, unit=is_cosine)
    n = work.stores.top_rows
    pairs = retrieve(corpus, target, MORE * n)
    similarity, why_not = _exact(work, units, pairs, corpus.weights)
    table = _named(work, units, top_rows(pairs, similarity, n))
    said = {
        "similarity": work.stores.similarity,
        "candidates": MORE * n,
        "exact": similarity is not None,
        "estimates_because": why_not,
        "error": receipt["error"],
    }
    data = parquet_bytes(table, {ENTRY: json.dumps(said, sort_keys=True).encode()})
    folder.replace(TOP_ROWS, data)
    log.info("%s names %d rows for %d of the target", folder.full_name(TOP_ROWS), table.num_rows,
             target.rows)  # fmt: skip
    return {"rows": table.num_rows, **said, "sha256": hashlib.sha256(data).hexdigest()}


def _exact(
    work: Work, units: Sequence[Unit], pairs: Pairs, weights: Float64[np.ndarray, " k"]
) -> tuple[Float64[np.ndarray, " n"] | None, str | None]:
    """Return the pairs' similarities by whole gradients; or none, and why they cannot be had."""
    assert work.target is not None, "asked for"
    numbers, at = np.unique(pairs.number, return_inverse=True)
    rows = _rows_at(work, units, numbers)
    wanted = Located(work.corpus, rows["shard"].to_numpy(), rows["row"].to_numpy())
    log.info("comparing the gradients of %d retrieved rows with the target's", len(numbers))
    try:
        exact = ExactPairs(work, weights)
        return exact.similarities(every_row(work.target.corpus), wanted, pairs.target, at), None
    except NotExact as reason:
        log.warning("similarities of the top rows are estimates by sketches: %s", reason)
        return None, str(reason)


def _file(folder: Folder, unit: int) -> str | None:
    """Return the unit's file of sketches; None where the unit was given up."""
    stores: dict[str, Any] = read_receipt(folder, unit).get("stores", {})
    return str(stores["sketch"]["file"]) if "sketch" in stores else None


def _named(work: Work, units: Sequence[Unit], found: pa.Table) -> pa.Table:
    """Return the table with rows in place of places, and ids where the corpora have them."""
    assert work.target is not None, "asked for"
    at = _rows_at(work, units, found["number"].to_numpy())
    of = _target_rows(work.target.corpus, found["target"].to_numpy())
    columns = {
        "target_shard": of["shard"],
        "target_row": of["row"],
        **({"target_id": of["id"]} if "id" in of.column_names else {}),
        "sign": found["sign"],
        "rank": found["rank"],
        **{name: at[name] for name in at.column_names},
        "similarity": found["similarity"],
        "estimate": found["estimate"],
    }
    return pa.table(columns)


def _rows_at(work: Work, units: Sequence[Unit], numbers: np.ndarray) -> pa.Table:
    """Return shard, row and id of rows of the score table."""
    names = ["shard", "row", *(["id"] if work.id_column else [])]
    folder, edges = Folder(work.out), np.cumsum([0, *(unit.rows for unit in units)])
    of = np.searchsorted(edges, numbers, side="right") - 1
    tables = [pa.schema([work.schema.field(name) for name in names]).empty_table()]
    places = np.zeros(len(numbers), np.int64)
    for unit in np.unique(of):
        inside = np.flatnonzero(of == unit)
        places[inside] = sum(t.num_rows for t in tables) + np.arange(len(inside))
        with open_parquet(folder, part_name(int(unit))) as file:
            part = file.read(names, use_threads=False).replace_schema_metadata(None)
        tables.append(part.take(pa.array(numbers[inside] - edges[unit])))
    return pa.concat_tables(tables).combine_chunks().take(pa.array(places))


def _target_rows(corpus: Corpus, numbers: np.ndarray) -> pa.Table:
    """Return shard and row of a target's rows, and their id where it has a column of that name."""
    tables = []
    for shard, entry in enumerate(corpus.shards):
        columns: dict[str, Any] = {
            "shard": pa.array(np.full(entry.rows, shard, np.int32)),
            "row": pa.array(np.arange(entry.rows, dtype=np.int64)),
        }
        if "id" in corpus.schema.names:
            read = [batch.column(0) for batch in corpus.read(shard, columns=["id"])]
            columns["id"] = pa.chunked_array(read, corpus.schema.field("id").type)
        tables.append(pa.table(columns))
    return pa.concat_tables(tables).combine_chunks().take(pa.array(numbers))
