"""Inputs that say nothing: what a null-input model is trained on and asked about.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import torch

from curate.pipeline.tasks.texts import tokenize
from curate.pipeline.tasks.tokenizers import BYTES, tokenizer
from curate.scorers.protocol import Batch


def zero_inputs(batch: Batch) -> Batch:
    """Return the batch with zeros in place of its inputs: black, or the mean of standardised
    numbers."""
    return replace(batch, inputs={n: torch.zeros_like(x) for n, x in batch.inputs.items()})


def empty_texts(batch: Batch, source: str, columns: Sequence[str]) -> Batch:
    """Return the batch with the empty text in place of its texts: special tokens alone.

    A tokenizer that adds none gives its end token, as models need at least one.

    Raises:
        ValueError: the tokenizer adds no special token and has no end token.
    """
    empty = [pa.chunked_array([[""]]) for _ in columns]
    made = {name: row.tolist() for name, (row,) in tokenize(source, empty, None).items()}
    if not made["input_ids"]:
        assert source != BYTES, "its texts begin with a token of their own"
        known = tokenizer(source)
        end = known.eos_token_id if known.eos_token_id is not None else known.pad_token_id
        if end is None:
            raise ValueError(
                f"the tokenizer {source} makes nothing of the empty text and has no end token: "
                "an empty input cannot be shown to the model"
            )
        made = {name: [end if name == "input_ids" else 0] for name in made}
    made["attention_mask"] = [1] * len(made["input_ids"])
    inputs = {}
    for name, given in batch.inputs.items():
        row = torch.tensor(made[name], dtype=given.dtype, device=given.device)
        inputs[name] = row.expand(len(given), -1).contiguous()
    return replace(batch, inputs=inputs)
