"""FAISS indexes of stores, made on demand: `curate index`, `build_index`, `open_index`.

An index is a file beside the vectors and a JSON beside it, written last: what it is of, by a
digest over the store's files, and how it was made.

Shapes: N rows, D numbers of a vector, Q queries, K neighbours.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from curate.pipeline.scoring.score_table import ScoreTable, digest_of_parts
from curate.pipeline.stores.local_file import local_copy, scratch_file
from curate.pipeline.stores.store import Store, open_store
from curate.pipeline.stores.writer import sha256_in
from curate.pipeline.storing import commit
from curate.pipeline.storing.storage import Folder, canonical_json
from curate.selectors.neighbors import Metric, VectorIndex

log = logging.getLogger("curate.index")

FORMAT, VERSION = "curate.index", 1
SIMILARITIES: tuple[Metric, ...] = ("cosine", "dot", "euclidean")
KINDS = "auto", "flat", "ivfpq"
MEMORY = 4 << 30
"""A flat index may take this much by default, and so may the sample that another is trained on."""
CODES = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Bytes of a vector's code: the largest that divides the dimension."""
MOST_LISTS = 65_536
ROWS_PER_LIST = 64
"""Of the sample; FAISS asks for 39 at least."""


class StoreIndex:
    """An index with the store it is of: rows are places in the score table."""

    def __init__(self, index: VectorIndex, store: Store, said: dict[str, Any]) -> None:
        self.index, self.store, self.said = index, store, said

    def search(
        self, queries: Float32[np.ndarray, "q d"], k: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Return similarities (or distances) and rows of the k nearest vectors, best first.

        `queries` are vectors as the store gives them (`unit` for the cosine). Row -1 where fewer
        were found.

        Raises:
            ValueError: queries of another dimension or with NaN, or `k` not in 1 to N.
        """
        if not 1 <= k <= len(self.index):
            raise ValueError(f"k={k} neighbours of {len(self.index)} vectors")
        return self.index.search(queries, k)

    def near(
        self, rows: Int64[np.ndarray, " q"], k: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """Return the k nearest to rows of the store itself; each row is its own neighbour.

        Raises:
            ValueError: a row has no vector, or `k` is not in 1 to N.
        """
        queries = self.store.take(rows)
        for row in rows[~np.isfinite(queries).all(1)][:1]:
            raise ValueError(f"row {row} has no vector: it could not be scored")
        return self.search(queries, k)


def build_index(
    scores: str | Path,
    name: str = "embedding",
    *,
    similarity: Metric = "cosine",
    kind: str = "auto",
    checkpoints: Sequence[int] | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    overwrite: bool = False,
) -> StoreIndex:
    """Return an index of the store `name` beside a score table, made unless it is there.

    `auto` is `flat`, exact, while 4·N·D bytes stay within `memory`, else `ivfpq`. Vectors are
    added a block at a time. Over several checkpoints a cosine is the weighted mean of theirs; see
    `open_store`, and for `checkpoints` too.

    Raises:
        ValueError: no such store, an unknown setting, or vectors that are too few or too long.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of index {kind!r}; choose one of: {', '.join(KINDS)}")
    if memory < 1 << 20:
        raise ValueError(
            f"memory must be at least 1 MiB (--memory 0.001), got {memory / 2**30:g} GiB"
        )
    table = ScoreTable.open(scores)
    store = _store(table, name, similarity, checkpoints)
    size = 4 * store.rows * store.dimension
    if kind == "auto":
        kind = "flat" if size <= memory else "ivfpq"
    asked = {
        "format": FORMAT,
        "version": VERSION,
        "store": name,
        "digest": _digest(table, name),
        "similarity": similarity,
        "kind": kind,
        "checkpoints": store.checkpoints,
        "dimension": store.dimension,
        "rows": store.rows,
        "seed": seed,
    }
    described = _json(name, similarity)
    if not overwrite and table.folder.exists(described):
        before = table.folder.read_json(described)
        if asked.items() <= before.items():
            try:
                found = open_index(scores, name, similarity=similarity)
                log.info("%s is there already", table.folder.full_name(before["file"]))
                return found
            except ValueError as damaged:
                log.warning("made again: %s", damaged)
    made: dict[str, Any]
    if kind == "flat":
        index, made = VectorIndex.flat(store.dimension, _metric(similarity)), {}
        log.info("a flat index of %.1f MiB", size / 2**20)
    else:
        index, made = _trained(store, similarity, seed, memory)
    start = 0
    for block in store.blocks():
        there = np.flatnonzero(np.isfinite(block).all(1))
        if len(there):
            index.add(block[there], start + there)
        start += len(block)
    said = {**asked, **made, "vectors": len(index)}
    said |= _write(table.folder, name, similarity, index)
    table.folder.replace(described, canonical_json(said))
    return StoreIndex(index, store, said)


def open_index(
    scores: str | Path, name: str = "embedding", *, similarity: Metric = "cosine"
) -> StoreIndex:
    """Return the index of the store `name` that `curate index` made.

    Raises:
        ValueError: there is none, it is damaged, or of vectors that are no longer there.
    """
    table = ScoreTable.open(scores)
    described = _json(name, similarity)
    again = f"make it with `curate index {table.path} --store {name} --similarity {similarity}`"
    if not table.folder.exists(described):
        raise ValueError(f"{table.path} has no {similarity} index of {name}; {again}")
    said = table.folder.read_json(described)
    full = table.folder.full_name(described)
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        raise ValueError(f"{full} describes no index that this curate reads; {again}")
    if said["digest"] != _digest(table, name):
        raise ValueError(f"{full} is of vectors that are no longer there; {again}")
    store = _store(table, name, similarity, said["checkpoints"])
    file = table.folder.full_name(said["file"])
    if not table.folder.exists(said["file"]):
        raise ValueError(f"{file} is missing; {again}")
    with local_copy(table.folder, said["file"]) as path:
        if os.path.getsize(path) != said["bytes"]:
            raise ValueError(f"{file} is damaged: it has another size; {again}")
        index = VectorIndex.read(path, _metric(similarity))
    return StoreIndex(index, store, said)


def check_index(folder: Folder, described: str, table: ScoreTable) -> str | None:
    """Return what is wrong with an index, by its JSON's name; None where nothing is."""
    said = folder.read_json(described)
    if said.get("format") != FORMAT or not {"digest", "store", "file", "sha256"} <= said.keys():
        return f"{folder.full_name(described)} describes no index"
    if said["digest"] != _digest(table, said["store"]):
        return f"{folder.full_name(described)} is of vectors that are no longer there"
    if sha256_in(folder, said["file"]) != said["sha256"]:
        return f"{folder.full_name(said['file'])} was changed: another sha256"
    return None


def _trained(
    store: Store, similarity: Metric, seed: int, memory: int
) -> tuple[VectorIndex, dict[str, Any]]:
    """Return an empty index trained on a sample, and how it was."""
    most = max(1, memory // (4 * store.dimension))
    lists = min(MOST_LISTS, int(4 * np.sqrt(store.rows)), max(1, most // ROWS_PER_LIST))
    rng = np.random.default_rng(seed)
    wanted = min(store.rows, most, max(lists * ROWS_PER_LIST, 16_384))
    rows = np.sort(rng.choice(store.rows, wanted, replace=False))
    sample = store.take(rows)
    sample = sample[np.isfinite(sample).all(1)]
    lists = max(1, min(lists, len(sample) // ROWS_PER_LIST))
    codes = next(m for m in CODES if store.dimension % m == 0)
    if len(sample) < 2:
        raise ValueError(f"{store.path} has too few vectors for an ivfpq index; choose --kind flat")
    log.info(
        "an ivfpq index of %d lists and %d bytes a vector, trained on %d rows",
        lists, codes, len(sample),
    )  # fmt: skip
    index = VectorIndex.ivfpq(sample, _metric(similarity), lists=lists, codes=codes, seed=seed)
    return index, {"lists": lists, "codes": codes, "trained": len(sample)}


def _write(folder: Folder, name: str, similarity: Metric, index: VectorIndex) -> dict[str, Any]:
    """Write the index whole; return its file, size and sha256."""
    file = f"store/{name}/index-{similarity}.faiss"
    folder.delete(_json(name, similarity))  # what told of the one that goes now
    folder.delete(file)
    with scratch_file(folder, file) as path:
        index.write(str(path))
        with path.open("rb") as written:
            os.fsync(written.fileno())
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        said = {"file": file, "bytes": path.stat().st_size, "sha256": digest}
        local = folder.local_path()
        if local is not None:
            commit.adopt(local, file, path)
        else:
            folder.create(file, path.read_bytes())
    return said


def _store(
    table: ScoreTable, name: str, similarity: Metric, checkpoints: Sequence[int] | None
) -> Store:
    if similarity not in SIMILARITIES:
        raise ValueError(f"unknown similarity {similarity!r}; choose cosine, dot or euclidean")
    return open_store(table, name, checkpoints=checkpoints, unit=similarity == "cosine")


def _metric(similarity: Metric) -> Metric:
    """Return how vectors are compared: those for the cosine have length 1 already."""
    return "euclidean" if similarity == "euclidean" else "dot"


def _digest(table: ScoreTable, name: str) -> str:
    """Return one sha256 over the files of a store."""
    recorded = table.success.get("stores", {})
    return digest_of_parts({f: s for f, s in recorded.items() if f.startswith(f"store/{name}/")})


def _json(name: str, similarity: str) -> str:
    return f"store/{name}/index-{similarity}.json"
