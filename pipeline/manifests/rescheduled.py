"""A selection with a schedule: the same rows, and what each epoch shows of them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32
from numpy import ndarray

from curate.pipeline.manifests.algebra import Path_, first_columns
from curate.pipeline.manifests.claim import found_again, make_free, of_manifests
from curate.pipeline.manifests.curriculum import hard_end
from curate.pipeline.manifests.manifest import Manifest, is_part, write_manifest, write_parts
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.manifests.schedules import make_schedule, refuse_rates, schedule_content
from curate.pipeline.storing.storage import Folder
from curate.scorers.registry import scorer_from_spec

log = logging.getLogger("curate.manifest")

MAX_GROUPS = 10_000


def schedule(
    manifest: Path_,
    rule: str,
    out: str | Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    params: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Return the manifest of the same rows and weights with a static schedule.

    `rule` is `rs2`, `curriculum` or `cooldown`, `params` its parameters (`Rs2`, `Curriculum`,
    `Cooldown`). A curriculum finds out by itself which end of the ranks is hard where the scorer
    says what high values mean. Cooldown takes `by_group`, a column of the corpus, for its groups;
    a mixture has its corpora as groups already.

    Raises:
        ValueError: the rule, a parameter or the weights are wrong, ranks or groups are missing, or
            `out` holds something else (unless `overwrite`).
    """
    opened = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest)
    refuse_rates(rule, opened.weight_kind)
    folder = Folder(str(out))
    if folder == opened.folder:
        raise ValueError(f"{folder.uri} is the manifest to read; choose another folder")
    asked = dict(params or {})
    by_group = asked.pop("by_group", None) if rule == "cooldown" else None
    if not isinstance(by_group, str | None):
        raise ValueError(f"by_group must name a column of the corpus, not {by_group!r}")
    selection = opened.content["selection"]
    if rule == "curriculum":
        has_ranks = "rank" in first_columns(opened)
        asked = _curriculum_params(opened.content, has_ranks, opened.path, epochs, asked)
    request = {
        **selection,
        "params": {
            **selection["params"],
            "scheduled": {
                "of": of_manifests([opened]),
                "rule": rule,
                "seed": seed,
                "epochs": epochs,
                "asked": asked,
                "by_group": by_group,
            },
        },
    }
    groups = _Groups(opened, by_group) if rule == "cooldown" else None
    if groups is None:
        made = make_schedule(rule, seed, epochs, asked)  # all is checked before anything is written
    else:
        make_schedule(rule, seed, epochs, {**asked, "groups": ("any",), "rows": (1,)})
    if (found := found_again(folder, request, overwrite)) is not None:
        log.info("%s holds this schedule already", folder.uri)
        return found
    make_free(folder)
    try:
        files, _ = write_parts(folder, groups.batches() if groups else _batches(opened))
    except Exception:
        for name in filter(is_part, folder.names()):
            folder.delete(name)
        raise
    if groups is not None:
        counted = {"groups": tuple(groups.names), "rows": tuple(groups.rows)}
        made = make_schedule(rule, seed, epochs, {**asked, **counted})
    content = {
        **{k: v for k, v in opened.content.items() if k not in ("format", "version")},
        "selection": request,
        "schedule": schedule_content(rule, made),
        "files": files,
    }
    return Manifest(folder, write_manifest(folder, content), opened.corpus)


@dataclass(frozen=True)
class Wish:
    """A schedule that a selection is to have as soon as its rows are known: rs2 or curriculum.

    Raises:
        ValueError: the rule or a parameter is wrong, or groups have to be counted first.
    """

    rule: str
    seed: int
    epochs: int | None
    params: dict[str, Any]

    def __post_init__(self) -> None:
        if self.rule == "cooldown":
            raise ValueError(
                "cooldown counts the groups of a finished selection: select without --schedule, "
                "then `curate manifest schedule --rule cooldown`"
            )
        if self.rule == "curriculum" and self.epochs == 1:
            make_schedule(self.rule, self.seed, 1, {"start": 1.0, **self.params})
        else:
            make_schedule(self.rule, self.seed, self.epochs, self.params)

    def content(self) -> dict[str, Any]:
        """Return what the manifest says was asked for."""
        asked = {"rule": self.rule, "epochs": self.epochs, "params": self.params}
        return {k: v for k, v in asked.items() if v is not None and v != {}}

    def fulfilled(self, content: dict[str, Any], has_ranks: bool, path: str) -> dict[str, Any]:
        """Return the manifest's `schedule`, for a manifest whose rest is `content`.

        Raises:
            ValueError: the weights or missing ranks contradict it.
        """
        refuse_rates(self.rule, content["weight_kind"])
        asked = self.params
        if self.rule == "curriculum":
            asked = _curriculum_params(content, has_ranks, path, self.epochs, asked)
        made = make_schedule(self.rule, self.seed, self.epochs, asked)
        return schedule_content(self.rule, made)


def _curriculum_params(
    content: dict[str, Any], has_ranks: bool, path: str, epochs: int | None, asked: dict[str, Any]
) -> dict[str, Any]:
    selection = content["selection"]
    if not has_ranks:
        raise ValueError(
            f"a curriculum needs ranks and {path} has none: method {selection['method']!r} orders "
            "no rows; select by a score"
        )
    if epochs == 1:
        asked = {"start": 1.0, "stages": 256, **asked}
    if "hard" not in asked:
        end = hard_end(selection, _high_means(content, selection["by"]))
        if end is None:
            raise ValueError(
                f"it is not known whether the first ranks of {path} are the hard rows; "
                "say so: hard=first or hard=last"
            )
        asked = {**asked, "hard": end}
    return asked


def _high_means(content: dict[str, Any], by: str | None) -> str | None:
    for table in content["scores"]:
        if by in table["scorers"]:
            return scorer_from_spec(table["scorers"][by]).direction.high_means
    return None


def _batches(manifest: Manifest) -> Iterator[pa.RecordBatch]:
    for batch in manifest.batches():
        yield _whole(batch)


def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Give the batch the column `rank`, null where the selection has none."""
    if "rank" in batch.schema.names:
        return batch
    return batch.append_column("rank", pa.nulls(batch.num_rows, pa.int32()))


class _Groups:
    """Gives each row its group while the parts are written, and counts the groups."""

    def __init__(self, manifest: Manifest, by_group: str | None) -> None:
        self.names: list[str] = []
        self.rows: list[int] = []
        self._manifest = manifest
        self._codes: dict[str, int] = {}
        self._source: RowSource | None = None
        if by_group is not None:
            self._column = by_group
            self._source = RowSource.of_manifest(manifest, [by_group])
        elif "group" in first_columns(manifest):
            self._known = list(manifest.content["selection"]["params"]["groups"])
        else:
            raise ValueError(
                "cooldown needs groups: by_group=COLUMN, a column of the corpus, or a mixture"
            )

    def batches(self) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in map(_whole, self._manifest.batches()):
            stop = start + batch.num_rows
            if self._source is None:
                codes = self._counted([self._known[i] for i in batch.column("group").to_pylist()])
            else:
                tables = self._source.stream(start, stop)
                codes = self._counted([v for t in tables for v in t[self._column].to_pylist()])
            if "group" in batch.schema.names:
                batch = batch.drop_columns(["group"])
            yield batch.append_column("group", pa.array(codes))
            start = stop

    def _counted(self, values: list[Any]) -> Int32[ndarray, " n"]:
        codes = np.empty(len(values), dtype=np.int32)
        for i, value in enumerate(values):
            name = str(value)
            if name not in self._codes:
                if len(self.names) == MAX_GROUPS:
                    raise ValueError(
                        f"column {self._column!r} has more than {MAX_GROUPS} values; cooldown "
                        "needs a column of groups"
                    )
                self._codes[name] = len(self.names)
                self.names.append(name)
                self.rows.append(0)
            codes[i] = self._codes[name]
            self.rows[codes[i]] += 1
        return codes
