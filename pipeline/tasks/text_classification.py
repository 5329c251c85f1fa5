"""Texts, or pairs of texts, with a class, for any Hugging Face encoder.

Shapes: B rows, T tokens.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import combined, lists, padded, ragged
from curate.pipeline.tasks.blank import empty_texts
from curate.pipeline.tasks.classification import Classification, described
from curate.pipeline.tasks.labels import find_labels
from curate.pipeline.tasks.schema import id_column
from curate.pipeline.tasks.task import Columns
from curate.pipeline.tasks.texts import (
    POSITION_KEYS,
    config_value,
    pad_token,
    read_config,
    text_columns,
    tokenize,
    tokenizer_source,
    warn_of_positions,
)
from curate.pipeline.tasks.tokenizers import BYTE_VOCABULARY, BYTES, tokenizer, tokenizer_digest
from curate.scorers.protocol import Batch

LONGEST = 512
"""Tokens of a text that are read unless `max_length` says more: BERT's limit."""
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})
"""Models whose positions start after the padding index, so that two of them are never used."""
log = logging.getLogger("curate.tasks")


@dataclass
class TextClassification(Classification):
    """One text column, or two that form pairs, and a label.

    `tokenizer` is a folder, a hub name, or `bytes`. Texts are cut at `max_length` tokens.
    """

    tokenizer: str = BYTES
    tokenizer_digest: str | None = None
    max_length: int = LONGEST
    kind = "text_classification"

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        *,
        model: str | None = None,
        inputs: str | Sequence[str] | None = None,
        label: str | None = None,
        classes: int | str | Sequence[str | int] | None = None,
        tokenizer: str | None = None,
        max_length: int | str | None = None,
    ) -> "TextClassification":
        """Return the task for this corpus, with the model's tokenizer unless one is given.

        Raises:
            ValueError: no column is evidently the text or the label, or there is no tokenizer.
        """
        label, labels = find_labels(corpus, label, classes, model)
        columns = text_columns(corpus.schema, inputs, label, most=2)
        source = tokenizer_source(tokenizer, model)
        if source is None:
            raise ValueError(
                "text classification needs a tokenizer: a Hugging Face folder as --model, "
                "or --task-option tokenizer=FOLDER (or tokenizer=bytes)"
            )
        if max_length is not None:
            (length,) = options.sizes(max_length, "max_length")
            warn_of_positions("max_length", length, model)
        else:
            length = _longest(source, model)
            log.info("texts are cut at %d tokens (--task-option max_length=N)", length)
        return cls(
            columns,
            label,
            labels,
            id_column(corpus.schema),
            source,
            tokenizer_digest(source),
            length,
        )

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "TextClassification":
        """Return the task that `describe` described."""
        kept = {k: v for k, v in description["preprocess"].items() if k != "labels"}
        return cls(**described(description), **kept)

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the text and label columns, and `id` where the corpus has it."""
        found = super().columns(schema)
        text_columns(schema, self.inputs, self.label, most=2)
        return found

    def preprocess(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer,
            "tokenizer_digest": self.tokenizer_digest,
            "max_length": self.max_length,
        }

    def model_args(self) -> dict[str, Any]:
        """Return the number of classes, and the vocabulary for models that start from nothing."""
        return {"num_classes": len(self.labels.classes), "vocab_size": vocabulary(self.tokenizer)}

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return `input_ids` (and `token_type_ids` where the tokenizer has them) and `label`."""
        label = self.encode_label(rows)
        columns = [rows.column(name) for name in self.inputs]
        for name, column in zip(self.inputs, columns, strict=True):
            if column.null_count:
                raise ValueError(f"text column {name!r} is null")
        stripped = [pc.utf8_trim_whitespace(combined(column)) for column in columns]
        blank = [
            pc.equal(pc.utf8_length(text), 0).to_numpy(zero_copy_only=False) for text in stripped
        ]
        if np.logical_and.reduce(blank).any():
            raise ValueError("the text is empty")
        tokens = tokenize(self.tokenizer, columns, self.max_length)
        made = {name: _as_lists(values) for name, values in tokens.items()}
        return pa.table({**made, "label": pa.array(label)})

    def cost(self, encoded: pa.Table) -> np.ndarray:
        """Return each text's tokens, int64 [B]."""
        return np.diff(ragged(encoded.column("input_ids"))[1])

    def collate(self, encoded: pa.Table) -> Batch:
        """Return `input_ids`, `attention_mask` (and `token_type_ids`), int64 [B, T]."""
        values, offsets = ragged(encoded.column("input_ids"))
        starts, lengths = offsets[:-1], np.diff(offsets)
        inputs = {
            "input_ids": padded(values, starts, lengths, pad_token(self.tokenizer)),
            "attention_mask": padded(np.ones_like(values), starts, lengths, 0),
        }
        if "token_type_ids" in encoded.column_names:
            types, _ = ragged(encoded.column("token_type_ids"))
            inputs["token_type_ids"] = padded(types, starts, lengths, 0)
        targets = torch.from_numpy(encoded.column("label").to_numpy().copy())
        return Batch({k: torch.from_numpy(v) for k, v in inputs.items()}, targets, encoded.num_rows)

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with the special tokens of the empty text, or pair, in every row."""
        return empty_texts(batch, self.tokenizer, self.inputs)


def vocabulary(source: str) -> int:
    """Return how many tokens a tokenizer knows."""
    return BYTE_VOCABULARY if source == BYTES else len(tokenizer(source))


def _longest(source: str, model: str | None) -> int:
    limits = [LONGEST]
    if source != BYTES:
        limits.append(int(min(tokenizer(source).model_max_length, LONGEST)))
    positions = config_value(model, *POSITION_KEYS)
    if positions is not None:
        shifted = read_config(model).get("model_type") in OFFSET_POSITIONS
        limits.append(positions - 2 if shifted else positions)
    return min(limits)


def _as_lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return lists(np.concatenate([np.empty(0, np.int32), *rows]), lengths)
