"""How the classes share a corpus, and what a selection leaves of each."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.scoring.score_table import ScoreTable

ROWS = np.int64(1) << 40
"""More rows than a shard has: `shard * ROWS + row` sorts as (shard, row)."""


def class_counts(
    table: ScoreTable, label: str, manifests: list[Manifest]
) -> tuple[Counter[str], list[Counter[str]]]:
    """Return rows per class in the corpus, and in each manifest over the same corpus.

    One pass over the score table, which holds the label, beside each manifest: both are in corpus
    order. Memory is a batch of each.
    """
    before: Counter[str] = Counter()
    after: list[Counter[str]] = [Counter() for _ in manifests]
    kept = [KeptRows(manifest) for manifest in manifests]
    for batch in table.scan(["shard", "row", label]):
        keys = row_keys(batch)
        labels = batch.column(label)
        _count(before, labels)
        for counter, rows in zip(after, kept, strict=True):
            _count(counter, labels.filter(pa.array(rows.contain(keys))))
    return before, after


class KeptRows:
    """Tells which rows of a corpus, asked for in corpus order, a manifest keeps."""

    def __init__(self, manifest: Manifest) -> None:
        self._batches: Iterator[pa.RecordBatch] = manifest.batches(["shard", "row"])
        self._keys = np.empty(0, dtype=np.int64)

    def contain(self, keys: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which of these keys are kept; keys ascend within and between calls."""
        if len(keys) == 0:
            return np.zeros(0, dtype=bool)
        waiting = [self._keys[np.searchsorted(self._keys, keys[0]) :]]
        while len(waiting[-1]) == 0 or waiting[-1][-1] < keys[-1]:
            batch = next(self._batches, None)
            if batch is None:
                break
            waiting.append(row_keys(batch))
        self._keys = np.concatenate(waiting)
        return np.isin(keys, self._keys, assume_unique=True)


def row_keys(batch: pa.RecordBatch) -> Int[np.ndarray, " n"]:
    """Return one int64 per row that sorts as (shard, row)."""
    shard, row = (batch.column(name).to_numpy() for name in ("shard", "row"))
    return np.asarray(shard.astype(np.int64) * ROWS + row)


def shares(counts: Counter[str]) -> dict[str, float]:
    """Return each class's share of all rows."""
    total = counts.total()
    return {name: count / total for name, count in counts.items()} if total else {}


def _count(counter: Counter[str], labels: pa.Array) -> None:
    if isinstance(labels, pa.DictionaryArray):
        labels = labels.dictionary_decode()
    tally: list[dict[str, Any]] = pc.value_counts(labels).to_pylist()
    for entry in tally:
        value = entry["values"]
        counter["no label" if value is None else str(value)] += entry["counts"]
