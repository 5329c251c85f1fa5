"""One self-contained HTML page from headings, paragraphs, tables and figures."""

import html
from collections.abc import Iterable, Sequence

CSS = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --accent: #2f5fd0; --paper: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 36px 44px 64px; background: var(--paper); }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0 10px; max-width: 74ch; }
.soft { color: var(--soft); }
.says { font-size: 16px; border-left: 3px solid var(--accent); padding: 4px 0 4px 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 12px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
td.n, th.n { text-align: right; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
figure { margin: 10px 0; }
figure svg { max-width: 100%; height: auto; font-family: inherit; }
.rows { display: flex; flex-wrap: wrap; gap: 12px 14px; margin: 4px 0 14px; }
.row { font-size: 12px; line-height: 1.35; max-width: 320px; }
.row img { display: block; border: 1px solid var(--line); margin-bottom: 3px; }
.row img.pixels { image-rendering: pixelated; }
.row .text { margin: 0 0 3px; padding: 6px 8px; background: #f5f6f8; width: 300px;
  overflow-wrap: anywhere; }
@media print { body { background: none; } main { padding: 0; } h2 { break-after: avoid; } }
"""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """Return the whole document. Sections are HTML, title and subtitle are text."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, *blocks: str) -> str:
    """Return a heading with its blocks of HTML; empty blocks are left out."""
    return f"<section><h2>{escape(title)}</h2>{''.join(blocks)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Return text as a paragraph; `kind` is a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def figure(svg: str, caption: str = "") -> str:
    """Return a drawing with what it shows in words."""
    words = f'<figcaption class="soft">{escape(caption)}</figcaption>' if caption else ""
    return f'<figure class="wide">{svg}{words}</figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; columns that hold only numbers are set flush right."""
    lines = [[cell(value) for value in row] for row in rows]
    kinds = [
        ' class="n"' if lines and all(line[i][1] for line in lines) else ""
        for i in range(len(head))
    ]
    top = "".join(f"<th{k}>{escape(h)}</th>" for h, k in zip(head, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{c}</td>' for (c, _), k in zip(line, kinds, strict=True))}</tr>"
        for line in lines
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return names with their values, one a line."""
    lines = "".join(f"<tr><th>{escape(n)}</th><td>{cell(v)[0]}</td></tr>" for n, v in pairs)
    return f"<table>{lines}</table>"


def cell(value: object) -> tuple[str, bool]:
    """Return a value as HTML, and whether it counts as a number in a table."""
    if value is None:
        return "", True
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, float):
        return f"{value:.4g}", True
    text = str(value)
    is_number = text[:1].isdigit() and not any(c.isalpha() for c in text)
    return escape(text), is_number


def escape(text: str) -> str:
    """Return text as HTML."""
    return html.escape(text, quote=True)
