"""The groups of a selection's rows, numbered and counted while its parts are written."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64
from numpy import ndarray

from curate.pipeline.manifests.algebra import first_columns
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.manifests.schedules import COUNTED, takes_groups
from curate.selectors.groups import GroupNumbers

ANY = {"groups": ("any",), "rows": (1,)}
"""Stands for groups that are not counted yet, to check the other parameters of a schedule."""


class Grouping:
    """Gives each row the number of its value in a column, by first appearance, and counts them.

    Raises ValueError where the column has more values than a column of groups (`GroupNumbers`), or
    values that are no groups.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self._numbers = GroupNumbers(column)
        self._rows = np.zeros(0, dtype=np.int64)

    def codes(self, batch: pa.RecordBatch) -> Int32[ndarray, " n"]:
        """Return the number of each row's group; these rows are counted now."""
        if pa.types.is_nested(batch.schema.field(self.column).type):
            raise ValueError(f"column {self.column!r} holds lists, which are no groups")
        numbers: Int64[ndarray, " n"] = self._numbers.of(batch)
        more = np.bincount(numbers, minlength=len(self._numbers.values))
        more[: len(self._rows)] += self._rows
        self._rows = more
        return numbers.astype(np.int32)

    def counted(self) -> dict[str, tuple[Any, ...]]:
        """Return the groups so far and their numbers of rows, as schedules take them."""
        return {"groups": tuple(self._numbers.values), "rows": tuple(self._rows.tolist())}


class ManifestGroups:
    """The batches of a manifest with their column `group`, from a column of the corpus behind it.

    Without a column these are the groups that a mixture has already.
    """

    def __init__(self, manifest: Manifest, by_group: str | None) -> None:
        self._manifest = manifest
        self._source: RowSource | None = None
        if by_group is not None:
            self._source = RowSource.of_manifest(manifest, [by_group])
        elif "group" in first_columns(manifest):
            self._known = pa.array(manifest.content["selection"]["params"]["groups"], pa.string())
        else:
            raise ValueError(
                "cooldown needs groups: by_group=COLUMN, a column of the corpus, or a mixture"
            )
        self._grouping = Grouping("group" if by_group is None else by_group)

    def batches(self) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in self._manifest.batches():
            stop = start + batch.num_rows
            codes = [self._grouping.codes(named) for named in self._named(batch, start, stop)]
            if "group" in batch.schema.names:
                batch = batch.drop_columns(["group"])
            yield batch.append_column("group", pa.array(np.concatenate(codes)))
            start = stop

    def counted(self) -> dict[str, tuple[Any, ...]]:
        """Return the groups and their numbers of rows, once all batches were read."""
        return self._grouping.counted()

    def _named(self, batch: pa.RecordBatch, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        if self._source is None:
            names = self._known.take(batch.column("group"))
            yield pa.record_batch([names], ["group"])
            return
        for table in self._source.stream(start, stop):
            yield from table.select([self._grouping.column]).to_batches()


def split_group(rule: str, params: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the column that a schedule's groups are to be counted in, and its other parameters.

    Raises:
        ValueError: the rule is unknown, the column is no name, or counts were written by hand.
    """
    if not takes_groups(rule):
        return None, params
    rest = {k: v for k, v in params.items() if k != "by_group"}
    if given := [name for name in COUNTED if name in rest]:
        raise ValueError(
            f"{given[0]} of schedule {rule!r} are counted: name their column, by_group=COLUMN"
        )
    by_group = params.get("by_group")
    if not isinstance(by_group, str | None):
        raise ValueError(f"by_group must name a column, not {by_group!r}")
    return by_group, rest
