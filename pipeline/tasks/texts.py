"""Text columns as tokens: which columns, which tokenizer, and the tokens themselves."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curate.pipeline.models.huggingface import is_huggingface
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import combined, is_string, storage_type
from curate.pipeline.tasks.schema import TEXT_NAMES, TEXT_PAIRS, inputs_left
from curate.pipeline.tasks.tokenizers import BYTES, byte_tokens, tokenizer

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
log = logging.getLogger("curate.tasks")


def text_columns(
    schema: pa.Schema, inputs: str | Sequence[str] | None, label: str | None, most: int
) -> tuple[str, ...]:
    """Return the text column, or the pair of them where `most` is 2.

    Raises:
        ValueError: none or too many could be meant, or one holds no text.
    """
    if inputs is None:
        found = guess_text(schema, label, most)
    else:
        found = options.names(inputs)
    strings = [n for n in schema.names if is_string(storage_type(schema.field(n).type))]
    if found is None or not 1 <= len(found) <= most:
        raise ValueError(
            f"which column is the text? it may be {', '.join(n for n in strings if n != label)}; "
            "name it with --task-option inputs=COLUMN"
            if len(strings) > (label in strings)
            else f"no column holds text; the corpus has {', '.join(schema.names)}"
        )
    for name in found:
        if name not in schema.names:
            raise ValueError(f"no column {name!r}; the corpus has {', '.join(schema.names)}")
        if name not in strings:
            raise ValueError(f"column {name!r} holds {schema.field(name).type}, not text")
    return found


def guess_text(schema: pa.Schema, label: str | None, most: int) -> tuple[str, ...] | None:
    """Return the text columns that the names tell, or the only string column; else None."""
    strings = [
        n for n in inputs_left(schema, label) if is_string(storage_type(schema.field(n).type))
    ]
    for pair in TEXT_PAIRS:
        if most > 1 and set(pair) <= set(strings):
            return pair
    named = [name for name in TEXT_NAMES if name in strings]
    if named:
        return (named[0],)
    return (strings[0],) if len(strings) == 1 else None


def tokenizer_source(given: str | None, model: str | None) -> str | None:
    """Return where a task's tokenizer is: the option, or the model's folder if it has one."""
    source = given or (model if model is not None and is_huggingface(model) else None)
    if source is None or source == BYTES:
        return source
    tokenizer(source)
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def read_config(model: str | None) -> dict[str, Any]:
    """Return a model folder's config.json, {} for a model that is no folder."""
    path = Path(model) / "config.json" if model else None
    if path is None or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def config_value(model: str | None, *keys: str) -> int | None:
    """Return the first of these integers in a model folder's config.json; None if there is none."""
    config = read_config(model)
    for values in (config, config.get("text_config") or {}):
        for key in keys:
            if isinstance(values.get(key), int):
                return int(values[key])
    return None


def warn_of_positions(setting: str, given: int, model: str | None) -> None:
    """Say so where rows may be longer than the model was made for; some models can take that."""
    positions = config_value(model, *POSITION_KEYS)
    if positions is not None and given > positions:
        log.warning(
            "%s=%d is more than the model's %d positions: longer rows may fail, by name",
            setting,
            given,
            positions,
        )


def tokenize(
    source: str,
    columns: Sequence[pa.ChunkedArray],
    max_length: int | None,
    is_start: bool = True,
) -> dict[str, list[np.ndarray]]:
    """Return `input_ids`, and `token_type_ids` where the tokenizer has them, per row.

    One column, or two as pairs. What the tokenizer adds by itself (such as [CLS]) is added; more
    than `max_length` tokens are cut off. `is_start`: False where other text comes before it; then
    the tokenizer adds nothing.

    Raises:
        ValueError: a text is null.
    """
    texts = [combined(column).to_pylist() for column in columns]
    if any(text is None for column in texts for text in column):
        raise ValueError("the text is null")
    if source == BYTES:
        joined = ["\n".join(parts) for parts in zip(*texts, strict=True)]
        first = 0 if is_start else 1
        return {"input_ids": [byte_tokens(text)[first:][:max_length] for text in joined]}
    if not texts[0]:
        return {"input_ids": []}
    made = tokenizer(source)(
        *texts,
        truncation=max_length is not None,
        max_length=max_length,
        add_special_tokens=is_start,
        verbose=False,
    )
    return {
        name: [np.asarray(row, dtype=np.int32) for row in made[name]]
        for name in ("input_ids", "token_type_ids")
        if name in made
    }


def pad_token(source: str | None) -> int:
    """Return what fills up short rows: the tokenizer's padding or end token, else 0."""
    if source is None or source == BYTES:
        return 0
    found = tokenizer(source)
    return next((t for t in (found.pad_token_id, found.eos_token_id) if t is not None), 0)
