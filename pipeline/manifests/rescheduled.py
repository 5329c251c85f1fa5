"""A selection with a schedule: the same rows, and what each epoch shows of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from curate.pipeline.manifests.algebra import Path_, first_columns
from curate.pipeline.manifests.claim import (
    found_again,
    of_manifests,
    refuse_operand,
    taking_place,
    unlike,
)
from curate.pipeline.manifests.curriculum import hard_end
from curate.pipeline.manifests.grouping import ANY, Grouping, ManifestGroups, split_group
from curate.pipeline.manifests.manifest import Manifest, write_manifest, write_parts
from curate.pipeline.manifests.schedules import make_schedule, refuse_rates, schedule_content
from curate.pipeline.storing.storage import Folder
from curate.scorers.registry import scorer_from_spec


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
    a mixture has its corpora as groups already. With `by_group` rs2 is stratified by that column.

    Raises:
        ValueError: the rule, a parameter or the weights are wrong, ranks or groups are missing, or
            `out` holds something else (unless `overwrite`).
    """
    opened = manifest if isinstance(manifest, Manifest) else Manifest.open(manifest)
    refuse_rates(rule, opened.weight_kind)
    folder = Folder(str(out))
    refuse_operand(folder, [opened.folder])
    by_group, asked = split_group(rule, dict(params or {}))
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
    is_grouped = rule == "cooldown" or by_group is not None
    groups = ManifestGroups(opened, by_group) if is_grouped else None
    # All is checked before anything is written.
    made = make_schedule(rule, seed, epochs, {**asked, **(ANY if is_grouped else {})})
    if (found := found_again(folder, unlike(request), overwrite)) is not None:
        return found
    with taking_place(folder) as place:
        batches = opened.batches() if groups is None else groups.batches()
        files, _ = write_parts(place, map(_whole, batches))
        if groups is not None:
            made = make_schedule(rule, seed, epochs, {**asked, **groups.counted()})
        content = {
            **{k: v for k, v in opened.content.items() if k not in ("format", "version")},
            "selection": request,
            "schedule": schedule_content(rule, made),
            "files": files,
        }
        content = write_manifest(place, content)
    return Manifest(folder, content, opened.corpus)


@dataclass(frozen=True)
class Wish:
    """A schedule that a selection is to have as soon as its rows are known.

    `by_group` among its parameters names the column of the score table that groups are counted in.

    Raises:
        ValueError: the rule or a parameter is wrong, or cooldown has no column of groups.
    """

    rule: str
    seed: int
    epochs: int | None
    params: dict[str, Any]

    def __post_init__(self) -> None:
        by_group, asked = split_group(self.rule, self.params)
        if self.rule == "cooldown" and by_group is None:
            raise ValueError(
                "cooldown needs groups: by_group=COLUMN, a column of the score table, or "
                "`curate manifest schedule` with one of the corpus"
            )
        if self.rule == "curriculum" and self.epochs == 1:
            asked = {"start": 1.0, **asked}
        make_schedule(self.rule, self.seed, self.epochs, {**asked, **(ANY if by_group else {})})

    @property
    def by_group(self) -> str | None:
        """The column of the score table that groups are counted in."""
        return split_group(self.rule, self.params)[0]

    def content(self) -> dict[str, Any]:
        """Return what the manifest says was asked for."""
        asked = {"rule": self.rule, "epochs": self.epochs, "params": self.params}
        return {k: v for k, v in asked.items() if v is not None and v != {}}

    def fulfilled(
        self, content: dict[str, Any], has_ranks: bool, path: str, grouping: Grouping | None
    ) -> dict[str, Any]:
        """Return the manifest's `schedule`, for a manifest whose rest is `content`.

        `grouping` has counted the rows that were kept, where there is a column of groups.

        Raises:
            ValueError: a curriculum's ranks are missing, or it is unknown which are hard.
        """
        _, asked = split_group(self.rule, self.params)
        if grouping is not None:
            asked = {**asked, **grouping.counted()}
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


def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Give the batch the column `rank`, null where the selection has none."""
    if "rank" in batch.schema.names:
        return batch
    return batch.append_column("rank", pa.nulls(batch.num_rows, pa.int32()))
