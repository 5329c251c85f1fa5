"""Tokenizers from Hugging Face folders, and the bytes of UTF-8 as a vocabulary of their own."""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from curate.pipeline.reading.hub import is_reachable

BYTES = "bytes"
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
BYTE_VOCABULARY = 257
DOCUMENT = 256
"""The byte vocabulary's extra token: it opens every document and parts packed ones."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


@lru_cache(maxsize=4)
def tokenizer(source: str) -> Any:
    """Return the tokenizer of a Hugging Face folder (or hub name, when online).

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    place = located(source)
    try:
        return AutoTokenizer.from_pretrained(
            place, local_files_only=Path(place).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"no tokenizer can be loaded from {source}: {said}") from error


def located(source: str) -> str:
    """Return a folder or hub name that needs no network where there is none.

    The hub's client would retry for half a minute, for each file that a folder may have.

    Raises:
        ValueError: it is no folder, the hub cannot be reached, and its cache has no copy.
    """
    if Path(source).is_dir() or is_reachable(HUB):
        return source
    cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
    if not isinstance(cached, str):
        raise ValueError(
            f"{source} is no folder; as a name on the hub it needs the network, or a cached copy, "
            "and there is neither"
        )
    return str(Path(cached).parent)


def tokenizer_digest(source: str) -> str | None:
    """Return the sha256 over a tokenizer's files, None for one that is not in a folder."""
    if not Path(source).is_dir():
        return None
    total = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (file := Path(source) / name).is_file():
            total.update(name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def byte_tokens(text: str) -> np.ndarray:
    """Return DOCUMENT and the UTF-8 bytes of the text, int32."""
    content = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    return np.concatenate([np.array([DOCUMENT], np.int32), content.astype(np.int32)])


def has_tokenizer(folder: str) -> bool:
    """Tell whether a folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def same_tokenizer(a: tuple[str | None, str | None], b: tuple[str | None, str | None]) -> bool:
    """Tell whether two tokenizers, (source, digest), make the same tokens of every text.

    Their files may differ in what plays no part there, such as settings of padding.
    """
    if a == b or (a[1] is not None and a[1] == b[1]):
        return True
    if None in (a[0], b[0]) or BYTES in (a[0], b[0]):
        return False
    ours, theirs = _rules(str(a[0])), _rules(str(b[0]))
    return ours is not None and ours == theirs


def _rules(source: str) -> dict[str, Any] | None:
    """Return how a fast tokenizer cuts texts up, None for any other."""
    backend = getattr(tokenizer(source), "backend_tokenizer", None)
    if backend is None:
        return None
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {k: v for k, v in rules.items() if k not in ("padding", "truncation")}
