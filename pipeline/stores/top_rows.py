"""For each row of a target, the corpus rows whose gradients agree with it most and least.

Shapes: Q target rows at a time, N pairs, D numbers of a vector, n rows of either end.

    similarity(z, z') = mean over seeds of Σ_k η_k cos(g_k(z), g_k(z'))        or g_k(z)·g_k(z')

with g_k the loss gradient at checkpoint k and η the learning rates, 1 in sum (TracInCP: Pruthi et
al. 2020, arXiv 2002.08484, section 3.2). Rows are retrieved by their stored sketches in place of
g_k: with vectors concatenated over checkpoints, each times √η_k, the estimate is one inner product,
so the search is one exact pass. Of more rows than are asked for, exact similarities then decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from curate.pipeline.stores.store import Store
from curate.selectors.neighbors import strongest

MORE = 2
"""Rows retrieved by sketches for each that is asked for, at either end."""
QUERY_BYTES = 256 << 20
"""Target vectors, and their negatives, that are searched for in one pass over the corpus."""
FIELDS = (
    pa.field("target", pa.int64(), nullable=False),
    pa.field("sign", pa.string(), nullable=False),
    pa.field("rank", pa.int32(), nullable=False),
    pa.field("number", pa.int64(), nullable=False),
    pa.field("similarity", pa.float32(), nullable=False),
    pa.field("estimate", pa.float32(), nullable=False),
)


@dataclass(frozen=True)
class Pairs:
    """Target rows and corpus rows, by their places in the two stores and in that order."""

    target: Int64[np.ndarray, " n"]
    number: Int64[np.ndarray, " n"]
    estimate: Float32[np.ndarray, " n"]


def retrieve(corpus: Store, target: Store, n: int) -> Pairs:
    """Return for each target row the `n` corpus rows at either end, by the stored vectors.

    Where n cuts through equal similarities any of the rows may be there. Both stores are to be
    opened alike (`unit` for the cosine).

    Raises:
        ValueError: the stores cannot be compared.
    """
    corpus.check_comparable(target)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for first, queries in _queries(target):
        # Least is most of the negative: one pass over the corpus serves both ends.
        values, numbers = strongest(np.concatenate([queries, -queries]), corpus.blocks(), n)
        values[len(queries) :] *= -1
        of = np.tile(np.arange(first, first + len(queries)), 2).repeat(n)
        there = numbers.ravel() >= 0
        pairs = np.stack([of, numbers.ravel()])[:, there]
        # A row may be at both ends, of a small corpus; the sums are those of one product.
        each, places = np.unique(pairs, axis=1, return_index=True)
        found.append((each[0], each[1], values.ravel()[there][places]))
    return Pairs(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def top_rows(pairs: Pairs, similarity: Float64[np.ndarray, " n"] | None, n: int) -> pa.Table:
    """Return up to `n` proponents and `n` opponents of each target row, strongest first.

    Proponents have a similarity above 0, opponents one below: a row that neither helps nor harms
    is neither. Equal similarities come in the order of the corpus. None: by the estimates.
    """
    by = pairs.estimate.astype(np.float64) if similarity is None else similarity
    parts = []
    for sign, turn in (("proponent", 1), ("opponent", -1)):
        places = np.flatnonzero(turn * by > 0)
        order = np.lexsort((pairs.number[places], -turn * by[places], pairs.target[places]))
        places = places[order]
        of = pairs.target[places]
        rank = np.arange(len(of)) - np.searchsorted(of, of)
        places, rank = places[rank < n], rank[rank < n]
        columns = [
            pairs.target[places],
            pa.array([sign] * len(places), pa.string()),
            rank.astype(np.int32),
            pairs.number[places],
            by[places].astype(np.float32),
            pairs.estimate[places],
        ]
        parts.append(pa.table(columns, schema=pa.schema(FIELDS)))
    both = pa.concat_tables(parts)
    order = np.argsort(both["target"].to_numpy(), kind="stable")
    return both.take(pa.array(order)).combine_chunks()


def _queries(target: Store) -> Iterator[tuple[int, np.ndarray]]:
    """Yield places of target rows and their vectors, as many as one pass takes."""
    step = max(1, QUERY_BYTES // (8 * target.dimension))
    for first in range(0, target.rows, step):
        yield first, target.take(np.arange(first, min(first + step, target.rows)))
