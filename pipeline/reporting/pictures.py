"""Rows of a corpus as a person would look at them: a picture, a piece of text, a few values.

Everything comes back as HTML that needs nothing outside itself.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from PIL import Image

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.arrays import combined, is_list, storage_type
from curate.pipeline.tasks.task import Columns, Task

PIXELS = 88
TEXT_CHARS = 260
VALUES = 8


@dataclass(frozen=True)
class Picture:
    """One row: its own identity and label as text, what it shows as HTML."""

    name: str
    label: str | None
    body: str


def picture_rows(
    corpus: Corpus, task: Task, places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Picture]:
    """Return the picture of each (shard, row); reads only these rows."""
    columns = task.columns(corpus.schema)
    pictures: dict[tuple[int, int], Picture] = {}
    for shard in sorted({shard for shard, _ in places}):
        rows = np.unique([row for s, row in places if s == shard])
        table = corpus.take(shard, rows, list(columns.all))
        for i, row in enumerate(rows.tolist()):
            pictures[shard, row] = _picture(table.slice(i, 1), columns, task, f"{shard}:{row}")
    return pictures


def image_tag(pixels: np.ndarray) -> str:
    """Return uint8 [C, H, W] (1, 3 or 4 channels) as an <img> with the PNG inside.

    Small images are enlarged without smoothing, so that every pixel is seen.
    """
    channels, height, width = pixels.shape
    array = pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(array))
    if max(height, width) > 2 * PIXELS:
        image.thumbnail((2 * PIXELS, 2 * PIXELS))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    scale = PIXELS / max(height, width)
    size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
    smooth = "" if scale <= 1 else ' class="pixels"'
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="" {size}{smooth} src="data:image/png;base64,{data}">'


def _picture(row: pa.Table, columns: Columns, task: Task, place: str) -> Picture:
    name = place if columns.id is None else str(row.column(columns.id)[0].as_py())
    label = None if columns.label is None else _label(row.column(columns.label)[0].as_py(), task)
    return Picture(name, label, _body(row, columns, task))


def _label(value: object, task: Task) -> str:
    """Return the class name of an integer label where the task has names, else the value."""
    names = task.classes or ()
    if isinstance(value, int) and 0 <= value < len(names) and isinstance(names[value], str):
        return str(names[value])
    return "no label" if value is None else str(value)


def _body(row: pa.Table, columns: Columns, task: Task) -> str:
    if task.kind == "image_classification":
        try:
            return image_tag(_pixels(row, task))
        except ValueError as unreadable:
            return f'<p class="text">{html.escape(str(unreadable))}</p>'
    parts = [_text(row.column(name), name) for name in columns.inputs[:VALUES]]
    if len(columns.inputs) == 1:
        return f'<p class="text">{parts[0]}</p>'
    lines = (f"<b>{html.escape(n)}</b> {p}" for n, p in zip(columns.inputs, parts, strict=False))
    more = len(columns.inputs) - VALUES
    return f'<p class="text">{"<br>".join(lines)}{f"<br>… {more} more" if more > 0 else ""}</p>'


def _pixels(row: pa.Table, task: Task) -> np.ndarray:
    """Return the row's image as the model sees it before normalisation, uint8 [C, H, W]."""
    encoded = combined(task.encode(row).column("image"))
    values = np.asarray(encoded.flatten().to_numpy(zero_copy_only=False))
    shape: tuple[int, ...] = task.describe()["preprocess"]["shape"]
    pixels = values.reshape(shape)
    if pixels.dtype == np.uint8:
        return pixels
    return np.asarray(np.rint(255 * np.clip(pixels, 0.0, 1.0)), dtype=np.uint8)


def _text(column: pa.ChunkedArray, name: str) -> str:
    """Return a value as short, escaped text."""
    value = column[0].as_py()
    kind = storage_type(column.type)
    if value is None:
        return "<i>null</i>"
    if is_list(kind):
        shown = ", ".join(_number(v) for v in value[:16])
        return html.escape(f"[{shown}{', …' if len(value) > 16 else ''}] ({len(value)} values)")
    if pt.is_floating(kind):
        return _number(value)
    text = f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
    cut = text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]}… ({len(text)} characters)"
    return html.escape(cut)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
