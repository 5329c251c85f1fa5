"""Sentence encoders: a transformer, pooled over its tokens, at length 1.

Shapes: N texts, B texts of a batch, T tokens, D dimensions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from numpy import ndarray
from torch import Tensor, nn

from curate.pipeline.models.huggingface import pretrained
from curate.pipeline.tasks.tokenizers import tokenizer

BATCH_TEXTS = 64
LONGEST = 512
"""Tokens of a text that are read where the folder states no limit of its own."""
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformer whose last hidden states are pooled into one vector for each text.

    `pooling` is `mean` over the tokens that are no padding, or `cls` for the first token.
    """

    model: nn.Module
    tokenizer: Any
    pooling: str
    longest: int
    dimension: int

    @classmethod
    def load(cls, folder: str) -> "SentenceEncoder":
        """Return the encoder of a local folder.

        What sentence-transformers says in the folder is followed: the pooling (mean or cls; mean
        where it says nothing) and the longest text. No code from the folder is run.

        Raises:
            ValueError: the folder holds no such model, or its pooling or modules are others.
        """
        pooling = _pooling(Path(folder))
        model = pretrained(folder, "AutoModel", {}).eval().requires_grad_(False)
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise ValueError(f"{folder} holds {type(model).__name__}, which is no text encoder")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokens = tokenizer(folder)
        longest = _longest(Path(folder), config, tokens)
        return cls(model.to(device), tokens, pooling, longest, int(config.hidden_size))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float32[ndarray, "n d"]:
        """Return a vector of length 1 for each text; NaN where a text has no token."""
        found = np.full((len(texts), self.dimension), np.nan, dtype=np.float32)
        if not len(texts):
            return found
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.longest)
        ids: list[list[int]] = encoded["input_ids"]
        lengths = np.array([len(x) for x in ids])
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        device = next(self.model.parameters()).device
        for start in range(0, len(order), BATCH_TEXTS):
            rows = order[start : start + BATCH_TEXTS]
            padded, mask = _padded([ids[i] for i in rows], self.tokenizer.pad_token_id or 0)
            mask = mask.to(device)
            hidden = self.model(input_ids=padded.to(device), attention_mask=mask)[0]
            found[rows] = pooled(hidden.float(), mask, self.pooling).cpu().numpy()
        return found


def pooled(
    hidden: Float[Tensor, "b t d"], mask: Int[Tensor, "b t"], pooling: str
) -> Float[Tensor, "b d"]:
    """Return the mean of the states where the mask is 1, or the first state, at length 1."""
    if pooling == "cls":
        vectors = hidden[:, 0]
    else:
        inside = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * inside).sum(1) / inside.sum(1)
    return nn.functional.normalize(vectors, dim=1)


def _padded(ids: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(x) for x in ids)
    padded = torch.full((len(ids), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return padded, mask


def _pooling(folder: Path) -> str:
    """Return `mean` or `cls`, as the folder of sentence-transformers says; `mean` elsewhere."""
    modules = _json(folder / "modules.json") or []
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ValueError(
                f"{folder}/modules.json has a module {kind!r}; encoders of a transformer, pooling "
                "and normalisation are supported"
            )
    named = [m.get("path") or "1_Pooling" for m in modules if "Pooling" in str(m.get("type"))]
    config = _json(folder / (named[0] if named else "1_Pooling") / "config.json") or {}
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode") and value]
    if config.get("pooling_mode") and isinstance(config["pooling_mode"], str):
        chosen = [f"pooling_mode_{config['pooling_mode']}"]
    if chosen in ([], ["pooling_mode_mean_tokens"], ["pooling_mode_mean"]):
        return "mean"
    if chosen in (["pooling_mode_cls_token"], ["pooling_mode_cls"]):
        return "cls"
    raise ValueError(f"{folder} pools by {', '.join(chosen)}; mean and cls are supported")


def _longest(folder: Path, config: Any, tokens: Any) -> int:
    """Return how many tokens of a text are read."""
    said = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    places = getattr(config, "max_position_embeddings", None)
    limits = [n for n in (said or LONGEST, places, tokens.model_max_length) if n]
    return int(min(limits))


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
