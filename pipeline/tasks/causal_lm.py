"""Documents whose every token after the first is predicted from those before it.

Shapes: B documents, S windows, T tokens of a window, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from curate.kernels.cross_entropy import token_cross_entropy
from curate.kernels.linear_head import linear_cross_entropy
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import (
    combined,
    end_to_end,
    is_list,
    leaf_type,
    lists,
    padded,
    ragged,
    storage_type,
)
from curate.pipeline.tasks.blank import behind_prompts, empty_tokens
from curate.pipeline.tasks.calls import call
from curate.pipeline.tasks.packing import Packed as Packed
from curate.pipeline.tasks.packing import pack
from curate.pipeline.tasks.schema import TOKEN_NAMES, id_column, require
from curate.pipeline.tasks.task import Columns, Task
from curate.pipeline.tasks.text_classification import vocabulary
from curate.pipeline.tasks.texts import (
    POSITION_KEYS,
    config_value,
    text_columns,
    tokenize,
    tokenizer_source,
    warn_of_positions,
)
from curate.pipeline.tasks.tokenizers import BYTES, DOCUMENT, tokenizer, tokenizer_digest
from curate.scorers.protocol import IGNORE, Batch, Outputs
from curate.scorers.split_head import split_head

RowLoss = Literal["mean", "sum"]
LARGEST_CONTEXT = 2048
"""Tokens of a window unless `context` says otherwise: longer ones cost memory that few want."""
BUILT_IN_CONTEXT = 256
log = logging.getLogger("curate.tasks")


@dataclass
class CausalLM(Task):
    """One column of text, or of token ids.

    A document is what the tokenizer makes of its text, with an end token where `append_eos`. A
    document longer than `context` is cut into consecutive windows; every token but the
    document's first is a target exactly once, the first token of a window being predicted by the
    last position of the window before. A row's loss is the mean (or sum) over all its targets.

    `prompt` is another column, whose tokens come before the document's: the model reads them, and
    none of them is a target.
    """

    input: str
    id: str | None
    tokenizer: str | None
    tokenizer_digest: str | None
    vocab_size: int
    context: int
    row_loss: RowLoss = "mean"
    append_eos: bool = False
    prompt: str | None = None
    kind = "causal_lm"

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        *,
        model: str | None = None,
        inputs: str | Sequence[str] | None = None,
        tokenizer: str | None = None,
        context: int | str | None = None,
        row_loss: str = "mean",
        append_eos: bool | str = False,
        vocab_size: int | str | None = None,
        prompt: str | None = None,
    ) -> "CausalLM":
        """Return the task for this corpus, with the model's tokenizer and context unless given.

        Raises:
            ValueError: no column is evidently the document, or there is no tokenizer for it.
        """
        if row_loss not in ("mean", "sum"):
            raise ValueError(f"row_loss is 'mean' or 'sum', not {row_loss!r}")
        column, holds_tokens = _document_column(corpus.schema, inputs)
        source = None if holds_tokens else tokenizer_source(tokenizer, model)
        if source is None and not holds_tokens:
            source = BYTES
            log.info("documents are read byte by byte (--task-option tokenizer=FOLDER for another)")
        size = None if vocab_size is None else options.sizes(vocab_size, "vocab_size")[0]
        size = size or config_value(model, "vocab_size")
        if size is None:
            size = vocabulary(source) if source else _scan_vocabulary(corpus, column, prompt)
        return cls(
            column,
            id_column(corpus.schema),
            source,
            None if source is None else tokenizer_digest(source),
            size,
            _context(context, model),
            cast(RowLoss, row_loss),
            options.flag(append_eos, "append_eos"),
            prompt,
        )

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "CausalLM":
        """Return the task that `describe` described."""
        columns = description["columns"]
        document, *prompt = columns["inputs"]
        return cls(
            document,
            columns.get("id"),
            row_loss=description["row_loss"],
            prompt=prompt[0] if prompt else None,
            **description["preprocess"],
        )

    def describe(self) -> dict[str, Any]:
        """Return the description kept in checkpoints; `from_description` reads it."""
        return {
            "kind": self.kind,
            "columns": {"inputs": list(self._inputs), "label": None, "id": self.id},
            "classes": None,
            "preprocess": {
                "tokenizer": self.tokenizer,
                "tokenizer_digest": self.tokenizer_digest,
                "vocab_size": self.vocab_size,
                "context": self.context,
                "append_eos": self.append_eos,
            },
            "row_loss": self.row_loss,
        }

    def model_args(self) -> dict[str, Any]:
        """Return the vocabulary's size, and the context for models that start from nothing."""
        return {"vocab_size": self.vocab_size, "context": self.context}

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the document and prompt columns, and `id` where the corpus has it."""
        require(schema, Columns(self._inputs))
        for name in self._inputs:
            holds_tokens = is_list(storage_type(schema.field(name).type))
            if holds_tokens != (self.tokenizer is None):
                expected = "token ids" if self.tokenizer is None else "text"
                raise ValueError(f"column {name!r} holds {schema.field(name).type}, not {expected}")
        return Columns(self._inputs, id=self.id if self.id in schema.names else None)

    @property
    def _inputs(self) -> tuple[str, ...]:
        return (self.input,) if self.prompt is None else (self.input, self.prompt)

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return `tokens`, one list of ids per document, and how many of them are its `prompt`'s.

        Raises:
            ValueError: a document is null or has no target token, or an id is out of range.
        """
        prompt = None
        values, offsets = self._tokens(rows, self.input, follows=self.prompt is not None)
        if self.append_eos:
            values, offsets = self._with_end(values, offsets)
        if self.prompt is not None:
            before = self._tokens(rows, self.prompt)
            prompt = np.diff(before[1])
            values, offsets = end_to_end(before, (values, offsets))
        lengths = np.diff(offsets)
        targets = lengths - np.maximum(1, 0 if prompt is None else prompt)
        if (targets < 1).any():
            shortest = int(lengths.min())
            raise ValueError(f"the document has no target token ({shortest} token{'s'[shortest:]})")
        if values.size and (values.min() < 0 or values.max() >= self.vocab_size):
            odd = values[(values < 0) | (values >= self.vocab_size)][0]
            raise ValueError(
                f"token id {odd} is outside the vocabulary of {self.vocab_size}, which training "
                "takes from --task-option vocab_size=N, the model or its rows"
            )
        made = {"tokens": lists(values.astype(np.int32), lengths)}
        return pa.table(made if prompt is None else {**made, "prompt": pa.array(prompt)})

    def _tokens(
        self, rows: pa.Table, name: str, follows: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a column's tokens and where each row's begin and end.

        `follows`: other text comes before it, so it starts with no token that means a start.
        """
        column = rows.column(name)
        if column.null_count:
            raise ValueError(f"document column {name!r} is null")
        if self.tokenizer is None:
            values, offsets = ragged(column)
            if np.isnan(values).any() if values.dtype.kind == "f" else values.dtype.kind == "O":
                raise ValueError("a token id is null")
            return values, offsets
        made = tokenize(self.tokenizer, [column], None, is_start=not follows)["input_ids"]
        values = np.concatenate([np.empty(0, np.int32), *made])
        return values, np.concatenate([[0], np.cumsum([len(r) for r in made])]).astype(np.int64)

    def cost(self, encoded: pa.Table) -> np.ndarray:
        """Return each document's tokens, int64 [B]."""
        return np.diff(ragged(encoded.column("tokens"))[1])

    def collate(self, encoded: pa.Table) -> Batch:
        """Return the documents' windows in order, int64 [S, T], padded on the right.

        There is no attention mask: what stands behind a token never changes its prediction.
        """
        values, offsets = ragged(encoded.column("tokens"))
        predictors = np.diff(offsets) - 1  # the last token predicts nothing
        windows = -(-predictors // self.context)
        row_ids = np.repeat(np.arange(len(windows)), windows)
        nth = np.arange(len(row_ids)) - np.repeat(np.cumsum(windows) - windows, windows)
        lengths = np.minimum(predictors[row_ids] - nth * self.context, self.context)
        starts = offsets[row_ids] + nth * self.context
        inputs = torch.from_numpy(padded(values, starts, lengths, self._filler()))
        goals, prompt = values, None
        if self.prompt is not None:
            given = encoded.column("prompt").to_numpy()
            place = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
            goals = np.where(place < np.repeat(given, np.diff(offsets)), IGNORE, values)
            prompt = torch.from_numpy(np.clip(given[row_ids] - nth * self.context, 0, lengths))
        targets = torch.from_numpy(padded(goals, starts + 1, lengths, IGNORE))
        is_cut = len(row_ids) > encoded.num_rows
        ids = torch.from_numpy(row_ids) if is_cut else None
        return Batch({"input_ids": inputs}, targets, encoded.num_rows, ids, prompt=prompt)

    def blank(self, batch: Batch) -> Batch:
        """Return the documents after an empty prompt, cut into windows anew; the same targets.

        The empty prompt is what the tokenizer makes of the empty text, or its end token where that
        is nothing; of token ids, which no tokenizer made, it is the token 0. Every document is then
        predicted from its own preceding tokens alone.

        Raises:
            ValueError: the task has no prompts, or the tokenizer has no token for an empty one.
        """
        if self.prompt is None:
            raise ValueError(
                "a document of causal_lm is all target, with no input beside it that could be "
                "empty: null inputs need a prompt, a column named by --task-option prompt=COLUMN"
            )
        empty = [0] if self.tokenizer is None else empty_tokens(self.tokenizer)["input_ids"]
        tokens, given = behind_prompts(batch)
        lengths = np.array([len(empty) + len(row) for row in tokens])
        values = np.concatenate([part for row in tokens for part in (empty, row)])
        made = pa.table({
            "tokens": lists(values.astype(np.int32), lengths),
            "prompt": pa.array(len(empty) + given),
        })  # fmt: skip
        return replace(self.collate(made).to(batch.targets.device), weights=batch.weights)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Return each document's loss, in nats, with targets and logits per window.

        Or with hidden states and head in place of logits, which then never exist.
        """
        out, head = split_head(model, lambda: call(model, batch.inputs))
        if head is None:
            tokens = token_cross_entropy(out, batch.targets)
        else:
            tokens = linear_cross_entropy(out, head.weight, batch.targets, head.bias)
        loss = _by_row(tokens.sum(1), batch)
        if self.row_loss == "mean":
            counts = _by_row((batch.targets != IGNORE).sum(1).to(loss.dtype), batch)
            loss = loss / counts
        found = {"logits": out} if head is None else {"hidden": out}
        return Outputs(loss, batch.targets, **found, head=head, row_ids=batch.row_ids)

    def pack_batch(self, encoded: pa.Table, weights: Float[Tensor, " b"] | None = None) -> Packed:
        """Return the documents end to end in full contexts, each followed by an end token.

        For training: a window may hold several documents, and attention sees across them. Every
        token but the stream's first is a target, with its document's weight (1 by default).

        Raises:
            ValueError: the task has prompts, whose tokens are no targets.
        """
        if self.prompt is not None:
            raise ValueError("documents with a prompt are not packed: leave --pack out")
        values, offsets = ragged(encoded.column("tokens"))
        end, fill = self._end_token(), self._filler()
        return pack(values, offsets, weights, context=self.context, end=end, fill=fill)

    def packed_loss(self, model: nn.Module, packed: Packed) -> Float[Tensor, ""]:
        """Return sum(w_doc · loss_token) / sum(w_doc) over the packed target tokens."""
        tokens = token_cross_entropy(call(model, {"input_ids": packed.input_ids}), packed.targets)
        return (tokens * packed.weights).sum() / packed.weights.sum()

    def _with_end(self, values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = self._end_token()
        if end is None:
            raise ValueError("append_eos needs a tokenizer that has an end token")
        return np.insert(values, offsets[1:], end), offsets + np.arange(len(offsets))

    def _filler(self) -> int:
        """Return a token that means nothing: models ask for a mask where they see padding."""
        if self.tokenizer in (None, BYTES):
            return 0
        return int(tokenizer(self.tokenizer).pad_token_id == 0)

    def _end_token(self) -> int | None:
        if self.tokenizer is None:
            return None
        if self.tokenizer == BYTES:
            return DOCUMENT
        return cast("int | None", tokenizer(self.tokenizer).eos_token_id)


def _by_row(of_windows: Tensor, batch: Batch) -> Tensor:
    """Return the sum over each row's windows."""
    if batch.row_ids is None:
        return of_windows
    return of_windows.new_zeros(batch.rows).index_add(0, batch.row_ids, of_windows)


def _document_column(schema: pa.Schema, inputs: str | Sequence[str] | None) -> tuple[str, bool]:
    tokens = [n for n in schema.names if _holds_tokens(schema.field(n).type)]
    if inputs is not None:
        names = options.names(inputs)
        if len(names) == 1 and names[0] in tokens:
            return names[0], True
        return text_columns(schema, inputs, None, most=1)[0], False
    named = [name for name in TOKEN_NAMES if name in tokens]
    if named:
        return named[0], True
    return text_columns(schema, None, None, most=1)[0], False


def _holds_tokens(kind: pa.DataType) -> bool:
    kind = storage_type(kind)
    return bool(is_list(kind) and not is_list(kind.value_type) and pt.is_integer(leaf_type(kind)))


def _scan_vocabulary(corpus: Corpus, *columns: str | None) -> int:
    names, largest = [name for name in columns if name is not None], 0
    require(corpus.schema, Columns(tuple(names)))
    for name in names:
        if not _holds_tokens(corpus.schema.field(name).type):
            raise ValueError(
                f"column {name!r} holds {corpus.schema.field(name).type}, not token ids"
            )
    for shard in range(len(corpus.shards)):
        for batch in corpus.read(shard, columns=names):
            for column in batch.columns:
                values, _ = ragged(combined(column).drop_null())
                largest = max(largest, int(np.nanmax(values, initial=0)))
    log.info("the largest token id is %d: the vocabulary has %d", largest, largest + 1)
    return largest + 1


def _context(given: int | str | None, model: str | None) -> int:
    if given is not None:
        (length,) = options.sizes(given, "context")
        warn_of_positions("context", length, model)
        return length
    positions = config_value(model, *POSITION_KEYS)
    if positions is None:
        return BUILT_IN_CONTEXT if model in (None, "gpt") else LARGEST_CONTEXT
    if positions > LARGEST_CONTEXT:
        log.info(
            "the model takes %d tokens; windows have %d (--task-option context=N)",
            positions,
            LARGEST_CONTEXT,
        )
    return min(positions, LARGEST_CONTEXT)
