"""Which columns of a score table a selection is by, and which end of them it keeps."""

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa

from curate.pipeline.scoring.score_table import ScoreTable
from curate.scorers.registry import scorer_from_spec
from curate.selectors.budget import need_columns
from curate.selectors.expression import Expression, Sense
from curate.selectors.settings import did_you_mean

End = Literal["high", "low"]

GROUP_COLUMNS = ("label", "group", "class", "domain", "language", "lang", "source")
"""Columns whose values are counted without being asked for, the first one there is."""


def score_column(
    table: ScoreTable, by: str | None, is_needed: bool
) -> tuple[str | None, Expression | None]:
    """Return the column asked for, or the only score; None where several could be meant.

    What is no column is an expression over columns, and is returned parsed as well.
    """
    names = list(table.scorers)
    if by is not None:
        if by in table.schema.names and by not in ("shard", "row", "error"):
            return by, None
        if by.isidentifier() or not any(mark in by for mark in "()+-*/"):
            raise ValueError(
                f"the score table has no score {by!r}; it has: {', '.join(names)}"
                + did_you_mean(by, names)
            )
        return by, Expression(by)
    if len(names) == 1:
        return str(names[0]), None
    if is_needed:
        raise ValueError(
            f"the score table has several scores; choose one, --by: {', '.join(names)}"
        )
    return None, None


def direction_of(
    table: ScoreTable,
    by: str,
    composite: Expression | None,
    is_needed: bool,
    end_of: Callable[[dict[str, Any]], End],
) -> End | None:
    """Return the end of the score that `end_of` says of its scorer, or of all in an expression."""
    if composite is not None:
        ends = {_turned(table, name, sense, end_of) for name, sense in composite.sense().items()}
        if len(ends := ends - {"any"}) == 1 and (end := ends.pop()) is not None:
            return "high" if end == "high" else "low"
        raise ValueError(
            f"the scores in {by!r} do not agree on which end to keep; "
            "say --direction high or --direction low"
        )
    if by in table.scorers:
        return end_of(table.scorers[by])
    if is_needed:
        raise ValueError(
            f"column {by!r} is not a scorer's, so there is no known direction to keep; "
            "say --direction high or low, or choose --method top or bottom"
        )
    return None


def kept_end(spec: dict[str, Any]) -> End:
    """Return which end the scorer's source keeps."""
    return scorer_from_spec(spec).direction.keep


def hard_end(spec: dict[str, Any]) -> End:
    """Return which end is hard; of AUM and its like a high value means easy."""
    means = scorer_from_spec(spec).direction.high_means.partition(";")[0]
    return "low" if "easy" in means else "high"


def _turned(
    table: ScoreTable, name: str, sense: Sense, end_of: Callable[[dict[str, Any]], End]
) -> Literal["high", "low", "any"] | None:
    """Return the end of an expression that one of its columns asks for; None where unknown."""
    if sense == "flat":
        return "any"
    if name not in table.scorers or sense == "unknown":
        return None
    end = end_of(table.scorers[name])
    if sense == "up":
        return end
    return "low" if end == "high" else "high"


def group_column(table: ScoreTable, asked: str | None, is_needed: bool) -> str | None:
    """Return the column of classes or groups: as asked, else the task's label or a usual name."""
    if asked is not None:
        need_columns(table, frozenset({asked}))
        return asked
    label = ((table.meta.get("task") or {}).get("columns") or {}).get("label")
    for name in (label, *GROUP_COLUMNS):
        if name and name in table.schema.names and name not in table.scorers:
            if is_needed or _has_few_values(table, name):
                return name
    return None


def _has_few_values(table: ScoreTable, column: str) -> bool:
    """True unless the first batch shows that the column holds values, not groups."""
    kind = table.schema.field(column).type
    if pa.types.is_floating(kind) or pa.types.is_nested(kind):
        return False
    first = next(iter(table.scan([column])), None)
    return first is None or len(first.column(0).unique()) <= 1000


def known_classes(table: ScoreTable, label: object) -> dict[str, Any]:
    """Return the classes in the order of stored probabilities, where `label` is what was learnt."""
    task = table.meta.get("task") or {}
    known = task.get("classes")
    is_learnt = known is not None and label == (task.get("columns") or {}).get("label")
    return {"classes": known} if is_learnt else {}
