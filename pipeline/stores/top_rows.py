"""For each row of a target, the corpus rows whose gradients agree with it most and least.

Shapes: Q target rows at a time, D numbers of a vector, n rows of either end.

    similarity(z, z') = mean over seeds of Σ_k η_k cos(s_k(z), s_k(z'))        or s_k(z)·s_k(z')

with s_k the stored sketch of the loss gradient at checkpoint k and η the learning rates, 1 in sum
(TracInCP: Pruthi et al. 2020, arXiv 2002.08484, section 3.2). With vectors concatenated over
checkpoints, each times √η_k, it is one inner product, so the search is one exact pass.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from curate.pipeline.stores.store import Store
from curate.selectors.neighbors import strongest

QUERY_BYTES = 256 << 20
"""Target vectors, and their negatives, that are searched for in one pass over the corpus."""
SIGNS = np.array(["proponent", "opponent"])
FIELDS = (
    pa.field("target", pa.int64(), nullable=False),
    pa.field("sign", pa.string(), nullable=False),
    pa.field("rank", pa.int32(), nullable=False),
    pa.field("number", pa.int64(), nullable=False),
    pa.field("similarity", pa.float32(), nullable=False),
)


def top_rows(corpus: Store, target: Store, n: int) -> pa.Table:
    """Return up to `n` proponents and `n` opponents of each target row, strongest first.

    Proponents have a similarity above 0, opponents one below: a row that neither helps nor harms
    is neither. `target` and `number` are places in the two stores; equal similarities come in the
    order of the corpus, and where n cuts through them any of them may be named. Both stores are to
    be opened alike (`unit` for the cosine).

    Raises:
        ValueError: the stores cannot be compared.
    """
    corpus.check_comparable(target)
    found = [pa.schema(FIELDS).empty_table()]
    for first, queries in _queries(target):
        # Least is most of the negative: one pass over the corpus serves both ends.
        values, numbers = strongest(np.concatenate([queries, -queries]), corpus.blocks(), n)
        by_target = values.reshape(2, len(queries), n).swapaxes(0, 1)
        target_row, sign, rank = np.nonzero(by_target > 0)
        at = sign * len(queries) + target_row, rank
        columns = [
            first + target_row,
            SIGNS[sign],
            rank.astype(np.int32),
            numbers[at],
            np.where(sign, -values[at], values[at]),
        ]
        found.append(pa.table(columns, schema=pa.schema(FIELDS)))
    return pa.concat_tables(found).combine_chunks()


def _queries(target: Store) -> Iterator[tuple[int, np.ndarray]]:
    """Yield places of target rows and their vectors, as many as one pass takes."""
    step = max(1, QUERY_BYTES // (8 * target.dimension))
    for first in range(0, target.rows, step):
        yield first, target.take(np.arange(first, min(first + step, target.rows)))
