"""Nested dicts and lists as aligned text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

LINE = 100


def format_text(found: Mapping[str, Any]) -> str:
    """Return a JSON-ready dict as text: scalars first in two columns, then one block per table.

    A dict of dicts or a list of dicts is a table, anything deeper stays JSON-like. `kind` and
    `path` make the first line; empty values are left out.
    """
    rest = {k: v for k, v in found.items() if k not in ("kind", "path") and not _is_empty(v)}
    head = " ".join(str(found[key]) for key in ("kind", "path") if key in found)
    scalars = {k: v for k, v in rest.items() if not _is_table(v)}
    blocks = [head] if head else []
    if scalars:
        blocks.append("\n".join(_pairs(scalars)))
    for name, value in rest.items():
        if _is_table(value):
            blocks.append("\n".join([_words(name), *_table(value)]))
    return "\n\n".join(blocks) if len(blocks) > 2 else "\n".join(blocks)


def _pairs(scalars: Mapping[str, Any]) -> list[str]:
    width = max(len(_words(name)) for name in scalars)
    return [f"  {_words(name):<{width}}  {text(value)}" for name, value in scalars.items()]


def _table(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a header and one line per entry; columns that are empty everywhere are left out."""
    rows = [{"": k, **v} for k, v in value.items()] if isinstance(value, Mapping) else list(value)
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if _is_used(n, rows)]
    cells = [[_words(n) for n in names], *([text(row.get(n)) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    numbers = [all(_is_number(row.get(n)) for row in rows) for n in names]
    return [
        "  " + "  ".join(
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in cells
    ]  # fmt: skip


def text(value: Any) -> str:
    """Return a value in as few characters as say it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return _cut(", ".join(f"{k}={text(v)}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return _cut(", ".join(text(v) for v in value))
    return str(value)


def _cut(line: str) -> str:
    return line if len(line) <= LINE else f"{line[: LINE - 1]}…"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_table(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, Mapping) for v in value)
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | list | tuple | str) and len(value) == 0)


def _is_used(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(not _is_empty(row.get(name)) for row in rows)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
