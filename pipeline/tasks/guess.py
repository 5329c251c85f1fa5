"""Which task a corpus is for, as far as its columns tell."""

import logging

import pyarrow as pa

from curate.pipeline.tasks.arrays import is_string, leaf_type, list_shape, storage_type
from curate.pipeline.tasks.schema import (
    TEXT_NAMES,
    TEXT_PAIRS,
    TOKEN_NAMES,
    inputs_left,
    is_image,
    is_square_list,
    label_column,
)
from curate.pipeline.tasks.tabular_classification import is_feature

log = logging.getLogger("curate.task")


def guess_aloud(schema: pa.Schema, label: str | None = None) -> str:
    """Return `guess_task` and tell the user what was guessed."""
    task = guess_task(schema, label)
    log.info("task: %s, guessed from the columns; --task names another", task)
    return task


def guess_task(schema: pa.Schema, label: str | None = None) -> str:
    """Return the only task that suits the columns; `label` names the label if the user did.

    Raises:
        ValueError: several suit, or none; the message lists what `--task` may be.
    """
    label = label or label_column(schema)
    suits = _with_label(schema, label) if label else _without_label(schema)
    if len(suits) == 1:
        return suits[0]
    columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
    if not suits:
        raise ValueError(
            f"no task suits the columns {columns}; name the task with --task and the columns with "
            "--task-option inputs=… and label=…"
        )
    raise ValueError(
        f"the columns {columns} suit several tasks: choose --task {' or '.join(suits)}"
    )


def _with_label(schema: pa.Schema, label: str | None) -> list[str]:
    left = inputs_left(schema, label)
    images = [name for name in left if is_image(schema, name)]
    images = images or [name for name in left if is_square_list(schema, name)]
    strings = [n for n in left if is_string(storage_type(schema.field(n).type))]
    numbers = [n for n in left if n not in images and n not in strings and is_feature(schema, n)]
    named = any(n in strings for n in TEXT_NAMES) or any(set(p) <= set(strings) for p in TEXT_PAIRS)
    if named or any(name not in strings for name in images):
        images = [name for name in images if name not in strings]  # a path beside the content
    strings = [name for name in strings if name not in images]
    suits = []
    if images:
        suits.append("image_classification")
    if named or (strings and not images and len(strings) <= 2):
        suits.append("text_classification")
    if not images and not named and (numbers or len(strings) > 1):
        suits.append("tabular_classification")
    return suits


def _without_label(schema: pa.Schema) -> list[str]:
    left = inputs_left(schema, None)
    strings = [n for n in left if is_string(storage_type(schema.field(n).type))]
    tokens = [
        n
        for n in schema.names
        if n in TOKEN_NAMES
        and len(list_shape(schema.field(n).type)) == 1
        and pa.types.is_integer(leaf_type(schema.field(n).type))
    ]
    is_text = len(strings) == 1 or any(name in strings for name in TEXT_NAMES)
    return ["causal_lm"] if tokens or is_text else []
