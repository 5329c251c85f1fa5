"""A mixture: one manifest over several corpora, with proportions."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import floor, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curate.pipeline.manifests.algebra import Path_, first_columns, sampled
from curate.pipeline.manifests.claim import (
    found_again,
    of_manifests,
    refuse_operand,
    taking_place,
    unlike,
)
from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.manifests.merge import windows
from curate.pipeline.manifests.mixed_corpus import mix_corpora
from curate.pipeline.storing.storage import Folder
from curate.selectors.apportion import apportion
from curate.selectors.budget import parse_budget

MEANS = ("sampling", "loss", "rows")


def mix(
    manifests: Sequence[Path_],
    proportions: Sequence[float],
    out: str | Path,
    *,
    by: str = "sampling",
    budget: int | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest of several selections, each of a corpus of its own, in proportions.

    `by` says by what means the proportions come about:

    - `sampling`: all rows are kept, with sampling weights; a row's rate is its corpus's proportion
      divided by the corpus's rows, times its own rate where the selection has sampling weights.
    - `loss`: all rows are kept and shown once, with loss weights made likewise.
    - `rows`: rows are left out at random until the numbers of rows stand in the proportions (by
      largest remainder), as many as there can be, or `budget` rows in all. No row is weighted.

    Proportions are positive and count relative to their sum. Columns that not all corpora have are
    left out. Which corpus a row is of is in the column `group`, so that the mixture can be given
    the schedule `cooldown`.

    Raises:
        ValueError: proportions do not fit, two selections are of one corpus, kinds of weights do
            not combine, or `out` holds something else (unless `overwrite`).
    """
    opened = [p if isinstance(p, Manifest) else Manifest.open(p) for p in manifests]
    _check(opened, proportions, by, budget)
    folder = Folder(str(out))
    refuse_operand(folder, [m.folder for m in opened])
    total = sum(proportions)
    shares = [p / total for p in proportions]
    taken = _quotas(opened, proportions, budget) if by == "rows" else [len(m) for m in opened]
    request = {
        "method": "mix",
        "by": None,
        "direction": None,
        "budget": {"kind": "rows", "value": sum(taken)},
        "seed": seed,
        "params": {
            "of": of_manifests(opened),
            "proportions": shares,
            "groups": [m.content["corpus"]["uri"] for m in opened],
            "means": by,
        },
    }
    if (found := found_again(folder, unlike(request), overwrite)) is not None:
        return found
    corpus = mix_corpora([m.corpus for m in opened])
    scales = [1.0] * len(opened)
    if by != "rows":
        scales = [share * sum(taken) / _sum(m) for share, m in zip(shares, opened, strict=True)]
    groups = {
        m.content["corpus"]["uri"]: {"of": m.corpus.rows, "kept": kept}
        for m, kept in zip(opened, taken, strict=True)
    }
    with taking_place(folder) as place:
        batches = _batches(opened, taken, seed, scales if by != "rows" else None)
        files, rows = write_parts(place, batches)
        content = {
            "corpus": corpus.describe(),
            "selection": {**request, "selected": rows},
            "weight_kind": "none" if by == "rows" else by,
            "schedule": None,
            "groups": groups,
            "scores": [s for m in opened for s in m.content["scores"]],
            "files": files,
        }
        content = write_manifest(place, content)
    return Manifest(folder, content, corpus)


def _check(
    manifests: Sequence[Manifest],
    proportions: Sequence[float],
    by: str,
    budget: int | str | None,
) -> None:
    if by not in MEANS:
        raise ValueError(f"a mixture comes about by one of: {', '.join(MEANS)}; not {by!r}")
    if budget is not None and by != "rows":
        raise ValueError("--budget is for --by rows; the other mixtures keep all rows")
    if len(manifests) < 2:
        raise ValueError("a mixture needs at least two manifests")
    if len(proportions) != len(manifests):
        raise ValueError(
            f"{len(proportions)} proportions for {len(manifests)} manifests; give one for each"
        )
    if not all(isfinite(p) and p > 0 for p in proportions):
        raise ValueError(f"proportions must be positive numbers, not {list(proportions)}")
    allowed = ("none",) if by == "rows" else ("none", by)
    for i, manifest in enumerate(manifests):
        if manifest.weight_kind not in allowed:
            raise ValueError(
                f"{manifest.path} has weights of kind {manifest.weight_kind!r}, which do not "
                f"combine with a mixture by {by}; it takes: {', '.join(allowed)}"
            )
        if manifest.content["schedule"] is not None:
            raise ValueError(f"{manifest.path} has a schedule; give it to the mixture instead")
        for other in manifests[:i]:
            if other.content["corpus"]["shards"] == manifest.content["corpus"]["shards"]:
                raise ValueError(
                    f"{other.path} and {manifest.path} are of one corpus; unite them first"
                )


def _quotas(
    manifests: Sequence[Manifest], proportions: Sequence[float], budget: int | str | None
) -> list[int]:
    """Return how many rows each gives: in proportion, as many as there can be or as asked."""
    said = [Fraction(str(float(p))) for p in proportions]  # 0.1 is a tenth, no float near it
    exact = [share / sum(said) for share in said]
    sizes = [len(m) for m in manifests]
    most = floor(min(n / share for n, share in zip(sizes, exact, strict=True)))
    rows = most
    if budget is not None:
        asked = parse_budget(budget)
        if asked.kind != "rows":
            raise ValueError(f"the budget of a mixture is a number of rows, not {budget!r}")
        rows = int(asked.value)
        if rows > most:
            raise ValueError(
                f"{rows} rows in these proportions are more than there are; at most {most}"
            )
    quotas = apportion(rows, exact, sizes)
    for manifest, quota in zip(manifests, quotas, strict=True):
        if not quota:
            raise ValueError(f"{manifest.path} would give no row; raise its proportion")
    return quotas


def _sum(manifest: Manifest) -> float:
    weights = (b.column("weight").to_numpy() for b in manifest.batches(["weight"]))
    total = float(sum(w.sum(dtype=np.float64) for w in weights))
    if total <= 0:
        raise ValueError(f"the weights of {manifest.path} are all zero")
    return total


def _batches(
    manifests: Sequence[Manifest],
    taken: Sequence[int],
    seed: int,
    scales: Sequence[float] | None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one corpus after the other, shards counted through."""
    has_id = all("id" in first_columns(m) for m in manifests)
    id_types = {str(next(m.batches(["id"])).schema.field("id").type) for m in manifests if has_id}
    first = 0
    for i, manifest in enumerate(manifests):
        for batch in _chosen(manifest, taken[i], seed)():
            columns: dict[str, Any] = {
                "shard": pa.array(batch.column("shard").to_numpy() + np.int32(first)),
                "row": batch.column("row"),
            }
            if len(id_types) == 1:
                columns["id"] = batch.column("id")
            columns["weight"] = pa.nulls(batch.num_rows, pa.float32())
            if scales is not None:
                weight = batch.column("weight").to_numpy().astype(np.float64) * scales[i]
                columns["weight"] = pa.array(weight.astype(np.float32))
            columns["rank"] = pa.nulls(batch.num_rows, pa.int32())
            columns["group"] = pa.array(np.full(batch.num_rows, i, dtype=np.int32))
            yield pa.record_batch(columns)
        first += len(manifest.content["corpus"]["shards"])


def _chosen(manifest: Manifest, rows: int, seed: int) -> Callable[[], Iterator[pa.RecordBatch]]:
    if rows == len(manifest):
        return manifest.batches

    def part() -> Iterator[pa.RecordBatch]:
        extras = [n for n in ("id", "weight") if n in first_columns(manifest)]
        sources = [manifest.batches, lambda: sampled(manifest, rows, seed)]
        for window in windows(sources, [extras, []]):
            kept = np.flatnonzero(window.present.all(0))
            yield from window.rows.take(pa.array(kept)).combine_chunks().to_batches()

    return part
