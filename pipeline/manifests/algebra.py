"""Set algebra of selections: union, intersection, difference, and a random part of one.

All are merges of sorted streams: memory is a batch of each manifest, whatever their size.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64
from numpy import ndarray

from curate.pipeline.manifests.claim import (
    found_again,
    of_manifests,
    refuse_operand,
    taking_place,
    unlike,
)
from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.manifests.merge import Source, Window, windows
from curate.pipeline.manifests.mixed_corpus import split_description
from curate.pipeline.storing.storage import Folder
from curate.selectors.budget import budget_rows, parse_budget
from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

log = logging.getLogger("curate.manifest")

RULES = ("first", "last", "sum", "max", "min")
"""Whose weight a row gets that several selections hold."""

Path_ = str | Path | Manifest
Chosen = Callable[[Bool[ndarray, "s n"]], Bool[ndarray, " n"]]


def union(
    manifests: Sequence[Path_],
    out: str | Path,
    *,
    weights: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest of all rows that any of the selections keeps.

    All must have weights of one kind. A row that several keep gets, by default, the weight that the
    first one gives it (`loss`, `sampling`) or the sum of its counts (`repeat`); `weights` names
    another rule of RULES. Loss and sampling weights are divided by their mean afterwards, so that
    it is 1 again. Ranks of different selections do not compare: the result has none.

    Raises:
        ValueError: fewer than two manifests, different corpora or kinds of weights, or `out` holds
            something else (unless `overwrite`).
    """
    opened = _opened(manifests, at_least=2)
    _one_corpus(opened)
    kind = _one_kind(opened)
    rule = _rule(weights, "sum" if kind == "repeat" else "first")
    request = _Request("union", opened, out, kind, rule, overwrite, keeps_order=False)
    return request.write(_sources(opened), lambda present: np.any(present, axis=0))


def intersect(
    manifests: Sequence[Path_],
    out: str | Path,
    *,
    weights: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest of the rows that all of the selections keep.

    By default the first selection's weights stay, whatever the others' kinds (of several with
    `repeat` weights the smallest count); another rule of RULES needs one kind. Ranks are the
    first's. Weights are brought back to mean 1 as by `union`.

    Raises:
        ValueError: as `union`, or nothing is in all of them.
    """
    opened = _opened(manifests, at_least=2)
    _one_corpus(opened)
    kinds = {m.weight_kind for m in opened}
    rule = _rule(weights, "min" if kinds == {"repeat"} else "first")
    if rule != "first":
        _one_kind(opened)
    request = _Request("intersect", opened, out, opened[0].weight_kind, rule, overwrite)
    return request.write(_sources(opened), lambda present: np.all(present, axis=0))


def subtract(manifests: Sequence[Path_], out: str | Path, *, overwrite: bool = False) -> Manifest:
    """Return the manifest of the first selection's rows that none of the others keeps.

    A row goes whatever weight the others give it. What stays has the first's ranks and weights,
    brought back to mean 1 as by `union`.

    Raises:
        ValueError: as `union`, or nothing is left.
    """
    opened = _opened(manifests, at_least=2)
    _one_corpus(opened)
    request = _Request("subtract", opened, out, opened[0].weight_kind, "first", overwrite)
    return request.write(
        _sources(opened), lambda present: np.asarray(present[0] & ~present[1:].any(0))
    )


def sample(
    manifest: Path_,
    like: Path_ | None = None,
    out: str | Path = "run/sample",
    *,
    budget: float | int | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest of a uniform random part of a selection, without replacement.

    Its size is `budget` (rows, or a fraction of the selection) or as many rows as `like` keeps, for
    a random baseline of that size. A smaller part with the same seed is a subset. Weights and ranks
    are the selection's, weights brought back to mean 1 as by `union`.

    Raises:
        ValueError: not exactly one of `like` and `budget`, more rows than there are, or a budget in
            tokens, which manifests do not count.
    """
    if (like is None) == (budget is None):
        raise ValueError(
            "say how many rows to sample: --budget, or a second manifest of that size; not both"
        )
    opened = _opened([manifest] if like is None else [manifest, like], at_least=1)
    first = opened[0]
    amount = Budget("rows", len(opened[1])) if budget is None else parse_budget(budget)
    if amount.kind == "tokens":
        raise ValueError("a manifest does not count tokens; give a budget in rows or a fraction")
    rows = budget_rows(amount, len(first))
    request = _Request(
        "sample", opened, out, first.weight_kind, "first", overwrite, seed=seed, rows=rows
    )
    return request.write(
        [*_sources([first]), partial(sampled, first, rows, seed)],
        lambda present: np.all(present, axis=0),
    )


def sampled(manifest: Manifest, rows: int, seed: int) -> Iterator[pa.RecordBatch]:
    """Yield `shard` and `row` of a uniform sample of the selection, sorted."""
    selector = make_selector("random")
    table = _Listed(manifest)
    return iter(selector.select(table, Budget("rows", rows), np.random.default_rng(seed)).batches)


@dataclass(frozen=True)
class _Listed:
    """A selection as a table that selectors can read."""

    manifest: Manifest
    schema = pa.schema([("shard", pa.int32()), ("row", pa.int64())])

    @property
    def rows(self) -> int:
        return len(self.manifest)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in self.manifest.batches(["shard", "row"]):
            yield batch.select(list(columns))


@dataclass(frozen=True)
class _Request:
    """What is asked: the operation, its operands, where to and by which rule."""

    method: str
    manifests: list[Manifest]
    out: str | Path
    weight_kind: str
    rule: str
    overwrite: bool
    keeps_order: bool = True
    seed: int = 0
    rows: int | None = None

    def write(
        self,
        sources: Sequence[Source],
        chosen: Chosen,
    ) -> Manifest:
        """Return the manifest of the rows for which `chosen` is true; two passes."""
        folder = Folder(str(self.out))
        refuse_operand(folder, [m.folder for m in self.manifests])
        for manifest in self.manifests:
            if manifest.content["schedule"] is not None:
                log.warning(
                    "%s has a schedule, which the result has not; `curate manifest schedule` gives "
                    "it one",
                    manifest.path,
                )
        request = self._selection()
        if (found := found_again(folder, unlike(request), self.overwrite)) is not None:
            return found
        total, rows = 0.0, 0
        for weight, _ in self._kept(sources, chosen):
            total, rows = total + float(weight.sum()), rows + len(weight)
        if not rows:
            names = ", ".join(m.path for m in self.manifests)
            raise ValueError(f"nothing is left: {self.method} of {names} gives no row")
        scale = rows / total if self._is_relative and total > 0 else 1.0
        with taking_place(folder) as place:
            files, written = write_parts(place, self._batches(sources, chosen, scale))
            assert written == rows, "the second pass met other rows than the first"
            selection = {**request, "budget": {"kind": "rows", "value": rows}, "selected": rows}
            content = write_manifest(place, self._content(selection, files))
        return Manifest(folder, content)

    @property
    def _is_relative(self) -> bool:
        return self.weight_kind in ("loss", "sampling")

    def _kept(
        self,
        sources: Sequence[Source],
        chosen: Chosen,
    ) -> Iterator[tuple[Float64[ndarray, " n"], pa.Table]]:
        """Yield the rows that stay, with their weights."""
        weighted = len(self.manifests)
        if self.method == "sample":
            weighted = 1  # the other operands only say which rows or how many
        for window in windows(sources, self._further(len(sources))):
            kept = np.flatnonzero(chosen(window.present))
            if len(kept):
                weight = combined(window, self.rule, weighted)[kept]
                yield weight, window.rows.take(pa.array(kept))

    def _batches(
        self,
        sources: Sequence[Source],
        chosen: Chosen,
        scale: float,
    ) -> Iterator[pa.RecordBatch]:
        for weight, rows in self._kept(sources, chosen):
            columns: dict[str, Any] = {"shard": rows["shard"], "row": rows["row"]}
            if "id" in rows.column_names:
                columns["id"] = rows["id"]
            is_weighted = self.weight_kind != "none"
            scaled = (weight * scale).astype(np.float32) if is_weighted else None
            columns["weight"] = pa.nulls(len(weight), pa.float32()) if scaled is None else scaled
            has_rank = "rank" in rows.column_names
            columns["rank"] = rows["rank"] if has_rank else pa.nulls(len(weight), pa.int32())
            yield from pa.table(columns).to_batches()

    def _further(self, sources: int) -> list[list[str]]:
        """Return which columns come from which operand: all the first's, or what all have."""
        there = first_columns(self.manifests[0])
        first = [str(n) for n in ("id", "rank") if n in there]
        if self.keeps_order:
            return [first, *([] for _ in range(sources - 1))]
        has_id = all("id" in first_columns(manifest) for manifest in self.manifests)
        return [["id"] if has_id else [] for _ in range(sources)]

    def _selection(self) -> dict[str, Any]:
        first = self.manifests[0].content["selection"]
        params: dict[str, Any] = {"of": of_manifests(self.manifests), "weights": self.rule}
        if self.rows is not None:
            params["rows"] = self.rows
        return {
            "method": self.method,
            "by": first["by"] if self.keeps_order else None,
            "direction": first["direction"] if self.keeps_order else None,
            "seed": self.seed,
            "params": params,
        }

    def _content(self, selection: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
        scores: list[Any] = []
        for manifest in self.manifests:
            scores += [s for s in manifest.content["scores"] if s not in scores]
        return {
            "corpus": self.manifests[0].content["corpus"],
            "selection": selection,
            "weight_kind": self.weight_kind,
            "schedule": None,
            "groups": {},
            "scores": scores,
            "files": files,
        }


def combined(window: Window, rule: str, weighted: int) -> Float64[ndarray, " n"]:
    """Return each row's weight by the rule, over the first `weighted` selections that have it."""
    present, weight = window.present[:weighted], window.weight[:weighted].astype(np.float64)
    if rule in ("first", "last"):
        at = present.argmax(0) if rule == "first" else weighted - 1 - present[::-1].argmax(0)
        return np.asarray(np.take_along_axis(weight, at[None], 0)[0])
    if rule == "sum":
        return np.asarray(np.where(present, weight, 0.0).sum(0))
    if rule == "max":
        return np.asarray(np.where(present, weight, -np.inf).max(0))
    return np.asarray(np.where(present, weight, np.inf).min(0))


def first_columns(manifest: Manifest) -> list[str]:
    """Return the names of the columns that a manifest's parts have."""
    batch = next(manifest.batches(), None)
    return [] if batch is None else list(batch.schema.names)


def _sources(manifests: Sequence[Manifest]) -> list[Source]:
    return [manifest.batches for manifest in manifests]


def _opened(paths: Sequence[Path_], at_least: int) -> list[Manifest]:
    if len(paths) < at_least:
        raise ValueError(f"name at least {at_least} manifests; {len(paths)} given")
    opened = [p if isinstance(p, Manifest) else Manifest.read(p) for p in paths]
    for manifest in opened:
        manifest.check_files()
    return opened


def _one_corpus(manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        ours, theirs = first.content["corpus"], other.content["corpus"]
        if not same_data(ours, theirs):
            raise ValueError(
                f"{first.path} selects from {_place(ours)} and {other.path} from {_place(theirs)}: "
                "not the same data; `curate manifest mix` makes a mixture of several corpora"
            )


def same_data(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Tell whether two descriptions of a corpus are of the same shards, wherever these lie."""
    return _shards(ours) == _shards(theirs)


def _shards(description: dict[str, Any]) -> list[Any]:
    return [part["shards"] for part in split_description(description)]


def _place(description: dict[str, Any]) -> str:
    return str(description["uri"]).replace("\n", " + ")


def _one_kind(manifests: Sequence[Manifest]) -> str:
    first = manifests[0]
    for other in manifests[1:]:
        if other.weight_kind != first.weight_kind:
            raise ValueError(
                f"{first.path} has weights of kind {first.weight_kind!r} and {other.path} of kind "
                f"{other.weight_kind!r}, which do not combine; select again with the same "
                "--weight-kind"
            )
    return first.weight_kind


def _rule(asked: str | None, default: str) -> str:
    if asked is not None and asked not in RULES:
        raise ValueError(f"unknown rule {asked!r} for weights; choose one of: {', '.join(RULES)}")
    return asked or default
