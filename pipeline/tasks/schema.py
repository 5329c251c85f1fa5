"""What a corpus schema says about images, text and labels, and samples of its rows."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.arrays import (
    is_binary,
    is_list,
    is_number,
    is_string,
    leaf_type,
    list_shape,
    storage_type,
)
from curate.pipeline.tasks.task import Columns

LABEL_NAMES = ("label", "labels", "target", "class", "y", "category")
TEXT_NAMES = ("text", "content", "sentence", "document", "review")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
IMAGE_NAMES = ("image", "img", "pixel_values", "picture", "photo")
PATH_NAMES = (*IMAGE_NAMES, "image_path", "file_name", "filename", "file", "path")
TOKEN_NAMES = ("input_ids", "tokens", "token_ids", "ids")
ID_NAMES = ("id", "idx", "uid", "guid", "__index_level_0__")


def features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the `datasets` features written in the schema's metadata, {} where there are none."""
    text = (schema.metadata or {}).get(b"huggingface")
    found = json.loads(text).get("info", {}).get("features", {}) if text else {}
    return {name: feature for name, feature in found.items() if isinstance(feature, dict)}


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the names of a `datasets` ClassLabel column, None for any other column."""
    feature = features(schema).get(column, {})
    names = feature.get("names")
    return tuple(names) if feature.get("_type") == "ClassLabel" and names else None


def label_column(schema: pa.Schema) -> str | None:
    """Return the column that must be the label: by its usual name, or the only ClassLabel."""
    named = [name for name in LABEL_NAMES if name in schema.names and _may_be_label(schema, name)]
    declared = [name for name in schema.names if class_names(schema, name)]
    if named:
        return named[0]
    return declared[0] if len(declared) == 1 else None


def id_column(schema: pa.Schema) -> str | None:
    """Return the user's own row identity, if the corpus has one."""
    return (
        "id"
        if "id" in schema.names and not is_list(storage_type(schema.field("id").type))
        else None
    )


def inputs_left(schema: pa.Schema, label: str | None) -> list[str]:
    """Return the columns that are neither the label nor a row's identity."""
    return [name for name in schema.names if name != label and name not in ID_NAMES]


def is_image(schema: pa.Schema, name: str) -> bool:
    """Tell whether a column can only be an image: encoded bytes or a 2- or 3-dimensional array."""
    kind = schema.field(name).type
    if features(schema).get(name, {}).get("_type") == "Image":
        return True
    if pt.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    if is_string(storage_type(kind)):
        return name in PATH_NAMES
    return is_binary(storage_type(kind)) or (
        is_number(leaf_type(kind)) and len(list_shape(kind)) in (2, 3)
    )


def is_square_list(schema: pa.Schema, name: str) -> bool:
    """Tell whether a column is a flat list that a square gray or RGB image would fill."""
    shape = list_shape(schema.field(name).type)
    if len(shape) != 1 or not is_number(leaf_type(schema.field(name).type)):
        return False
    return name in IMAGE_NAMES or (shape[0] is not None and square_shape(shape[0]) is not None)


def square_shape(length: int) -> tuple[int, int, int] | None:
    """Return (1, s, s) or (3, s, s) for a length s² or 3·s² with s at least 4, else None."""
    for channels in (1, 3):
        side = round((length / channels) ** 0.5)
        if side >= 4 and channels * side * side == length:
            return channels, side, side
    return None


def require(schema: pa.Schema, columns: Columns) -> Columns:
    """Return `columns` unchanged if the corpus has them all.

    Raises:
        ValueError: one is missing; the message lists those that are there.
    """
    for name in columns.all:
        if name not in schema.names:
            raise ValueError(
                f"the task reads column {name!r}, but the corpus has {', '.join(schema.names)}"
            )
    return columns


def sample(corpus: Corpus, columns: Sequence[str], rows: int = 512, shards: int = 4) -> pa.Table:
    """Return up to `rows` rows: the first ones of a few shards spread over the corpus."""
    filled = [i for i, shard in enumerate(corpus.shards) if shard.rows]
    step = max(1, len(filled) // shards)
    picks = filled[::step][:shards]
    batches = [
        batch
        for i in picks
        for batch in corpus.read(i, 0, min(rows // len(picks), corpus.shards[i].rows), columns)
    ]
    if not batches:
        raise ValueError(f"corpus {corpus.uri} has no rows")
    return pa.Table.from_batches(batches)


def _may_be_label(schema: pa.Schema, name: str) -> bool:
    kind = storage_type(schema.field(name).type)
    return bool(is_number(kind) or is_string(kind) or pt.is_null(kind))
