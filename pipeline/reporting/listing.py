"""Nested dicts and lists as aligned text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

LINE = 100
CELL = 48
"""Prose in a table is cut here; names, paths and digests never are."""
LINES = 60


def format_text(found: Mapping[str, Any]) -> str:
    """Return a JSON-ready dict as text: short values first in two columns, then a block for each
    table (a dict of dicts or a list of dicts) and each value too long for a line.

    `kind` and `path` make the first line; empty values are left out. A list of more than LINES
    entries is cut, and says so: JSON has it all. Named entries with sentences in them are told one
    by one, in full.
    """
    rest = {k: v for k, v in found.items() if k not in ("kind", "path") and not _is_empty(v)}
    head = " ".join(str(found[key]) for key in ("kind", "path") if key in found)
    short = {k: v for k, v in rest.items() if not _is_table(v) and len(text(v)) <= LINE}
    blocks = [head] if head else []
    if short:
        blocks.append("\n".join(_pairs({_words(k): v for k, v in short.items()})))
    for name, value in rest.items():
        if name not in short:
            lines = _block(value)
            blocks.append(
                "\n".join([_words(name), *(lines if _is_told(value) else _limited(lines))])
            )
    return "\n\n".join(blocks) if len(blocks) > 2 else "\n".join(blocks)


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
        there = {k: v for k, v in value.items() if not _is_empty(v)}
        return ", ".join(f"{k}={_nested(v)}" for k, v in there.items())
    if isinstance(value, list | tuple):
        return ", ".join(_nested(v) for v in value)
    return str(value)


def _block(value: Any) -> list[str]:
    if _is_told(value):
        return [line for k, v in value.items() for line in (f"  {k}", *_indented(_entry(v)))]
    if _is_table(value):
        return _table(value)
    if isinstance(value, Mapping):
        return _pairs({k: v for k, v in value.items() if not _is_empty(v)})
    if isinstance(value, list | tuple):
        return [f"  {text(v)}" for v in value]
    return [f"  {text(value)}"]


def _pairs(values: Mapping[str, Any]) -> list[str]:
    width = max(map(len, values))
    return [f"  {name:<{width}}  {text(value)}" for name, value in values.items()]


def _table(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a header and one line per entry; columns that are empty everywhere are left out."""
    rows = [{"": k, **v} for k, v in value.items()] if isinstance(value, Mapping) else list(value)
    used = dict.fromkeys(k for row in rows for k, v in row.items() if not _is_empty(v))
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if n in used]
    cells = [[_words(n) for n in names], *([_cell(row.get(n)) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    numbers = [all(_is_number(row.get(n)) for row in rows) for n in names]
    lines = []
    for line in cells:
        padded = [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numbers, strict=True)
        ]
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return lines


def _cell(value: Any) -> str:
    shown = text(value)
    is_prose = " " in shown and len(shown) > CELL
    return f"{shown[: CELL - 1]}…" if is_prose else shown


def _limited(lines: list[str]) -> list[str]:
    if len(lines) <= LINES:
        return lines
    return [*lines[: LINES - 1], f"  … and {len(lines) - LINES + 1:,} more (--json has them all)"]


def _nested(value: Any) -> str:
    return f"({text(value)})" if isinstance(value, Mapping | list | tuple) else text(value)


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


def _is_told(value: Any) -> bool:
    """Return whether these are named entries with sentences in them, which are not to be cut."""
    return (
        _is_table(value)
        and isinstance(value, Mapping)
        and any(_cell(v) != text(v) for entry in value.values() for v in entry.values())
    )


def _entry(value: Mapping[str, Any]) -> list[str]:
    return _pairs({_words(k): v for k, v in value.items() if not _is_empty(v)})


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | list | tuple | str) and len(value) == 0)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
