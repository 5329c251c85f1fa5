"""Hashed n-grams of a text: which of a fixed number of buckets each one falls into.

Xie et al. 2023, *Data Selection for Language Models via Importance Resampling* (arXiv 2302.03169),
section 4, as their package has it: lower case, words and runs of punctuation apart, n-grams joined
by a space, and the sha256 of their UTF-8 bytes modulo the number of buckets.

Shapes: N n-grams of a text.
"""

import hashlib
import re

import numpy as np
from jaxtyping import Int64

WORDS = re.compile(r"\w+|[^\w\s]+")
"""Runs of letters, digits and underscores; runs of anything else that is no space."""


def words(text: str) -> list[str]:
    """Return the text's words and runs of punctuation, in lower case."""
    return WORDS.findall(text.lower())


def bucket(gram: str, buckets: int) -> int:
    """Return where an n-gram is counted: its sha256 as a number, modulo `buckets`."""
    # A lone surrogate has no UTF-8 form; a text that holds one is scored like any other.
    digest = hashlib.sha256(gram.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % buckets


def gram_buckets(text: str, n: int, buckets: int) -> Int64[np.ndarray, " n"]:
    """Return the bucket of every 1- to n-gram of the text; a text without words has none."""
    found = words(text)
    grams = [
        " ".join(found[i : i + size])
        for size in range(1, n + 1)
        for i in range(len(found) - size + 1)
    ]
    return np.array([bucket(gram, buckets) for gram in grams], dtype=np.int64)
