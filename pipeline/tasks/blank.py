"""Inputs that say nothing: what a null-input model is trained on and asked about.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64

from curate.pipeline.tasks.texts import tokenize
from curate.pipeline.tasks.tokenizers import BYTES, tokenizer
from curate.scorers.protocol import IGNORE, Batch


def zero_inputs(batch: Batch) -> Batch:
    """Return the batch with zeros in place of its inputs: black, or the mean of standardised
    numbers."""
    return replace(batch, inputs={n: torch.zeros_like(x) for n, x in batch.inputs.items()})


def empty_texts(batch: Batch, source: str, columns: Sequence[str]) -> Batch:
    """Return the batch with the empty text in place of its texts, as `empty_tokens` has it.

    Raises:
        ValueError: the tokenizer adds no special token and has no end token.
    """
    made = empty_tokens(source, len(columns))
    made["attention_mask"] = [1] * len(made["input_ids"])
    inputs = {}
    for name, given in batch.inputs.items():
        row = torch.tensor(made[name], dtype=given.dtype, device=given.device)
        inputs[name] = row.expand(len(given), -1).contiguous()
    return replace(batch, inputs=inputs)


def empty_tokens(source: str, columns: int = 1) -> dict[str, list[int]]:
    """Return what the tokenizer makes of the empty text, or of empty ones: special tokens alone.

    A tokenizer that adds none gives its end token, as models need at least one.

    Raises:
        ValueError: the tokenizer adds no special token and has no end token.
    """
    empty = [pa.chunked_array([[""]]) for _ in range(columns)]
    made: dict[str, list[int]] = {
        name: row.tolist() for name, (row,) in tokenize(source, empty, None).items()
    }
    if made["input_ids"]:
        return made
    assert source != BYTES, "its texts begin with a token of their own"
    known = tokenizer(source)
    end = known.eos_token_id if known.eos_token_id is not None else known.pad_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer {source} makes nothing of the empty text and has no end token: "
            "an empty input cannot be shown to the model"
        )
    return {name: [end if name == "input_ids" else 0] for name in made}


def behind_prompts(
    batch: Batch,
) -> tuple[list[Int64[np.ndarray, " t"]], Int64[np.ndarray, " b"]]:
    """Return the tokens of each document behind its prompt, and how many of them are no targets.

    That is its first where the prompt has no token, so that nothing predicts it.
    """
    assert batch.prompt is not None, "collated by a task with prompts"
    prompt, inputs, goals = (
        x.cpu().numpy() for x in (batch.prompt, batch.inputs["input_ids"], batch.targets)
    )
    rows = np.arange(batch.rows) if batch.row_ids is None else batch.row_ids.cpu().numpy()
    given = (np.bincount(rows, prompt, minlength=batch.rows) == 0).astype(np.int64)
    tokens = []
    for row, n in enumerate(given):
        windows = np.flatnonzero(rows == row)
        targets = goals[windows][goals[windows] != IGNORE]
        tokens.append(np.concatenate([inputs[windows[0], :n], targets]))
    return tokens, given
