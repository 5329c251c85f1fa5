"""From a table to the rows that may be chosen, as arrays, and from chosen places to a selection.

Geometric methods compare rows with each other, so unlike the score-based ones they hold a few
numbers for every row: about 30 bytes, vectors apart. Shapes: N candidates, G groups, K picks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int32, Int64
from numpy import ndarray

from curate.selectors.budget import need_columns, need_score
from curate.selectors.groups import GroupNumbers
from curate.selectors.protocol import SELECTION_SCHEMA, Selection, Table
from curate.selectors.score_keys import score_column
from curate.selectors.vectors import finite_rows


@dataclass(frozen=True)
class Candidates:
    """The rows that may be chosen, in the order of the table.

    `places` are their places in the table (and its vectors), ascending. `group` numbers their
    values of the group column, `groups` are these values as text (one empty text where there are
    no groups). `score` is NaN-free; None where no score was asked for, and `tokens` where the table
    counts none.
    """

    places: Int64[ndarray, " n"]
    group: Int32[ndarray, " n"]
    groups: tuple[str, ...]
    score: Float32[ndarray, " n"] | None
    tokens: Int64[ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.places)

    def members(self, group: int) -> Int64[ndarray, " m"]:
        """Return the numbers of the candidates in this group, ascending."""
        return np.flatnonzero(self.group == group)


def candidates(table: Table, by: str | None = None, by_group: str | None = None) -> Candidates:
    """Return the rows without error that have a finite vector and, with `by`, a score; one scan.

    A table without vectors is taken as one where no vector is wanted.

    Raises:
        ValueError: a column is missing or holds no scores, or the vectors are of another number
            of rows, or no row is left.
    """
    names = table.schema.names
    if by is not None:
        need_score(table, by)
    if by_group is not None:
        need_columns(table, frozenset({by_group}))
    vectors = getattr(table, "vectors", None)
    usable = None if vectors is None else finite_rows(vectors)
    if usable is not None and len(usable) != table.rows:
        raise ValueError(f"{len(usable)} vectors for a score table of {table.rows} rows")
    wanted = [by, by_group, *(name for name in ("tokens", "error") if name in names)]
    columns = list(dict.fromkeys(name for name in wanted if name is not None)) or ["shard"]
    numbers = GroupNumbers(by_group or "")
    places, group, score, tokens = [], [], [], []
    at = 0
    for batch in table.scan(columns):
        able = np.ones(batch.num_rows, dtype=bool)
        if "error" in names:
            able &= batch.column("error").is_null().to_numpy(zero_copy_only=False)
        if usable is not None:
            able &= usable[at : at + batch.num_rows]
        if by is not None:
            scores = score_column(batch, by)
            able &= ~np.isnan(scores)
            score.append(scores[able])
        if "tokens" in names:
            counts = batch.column("tokens").cast(pa.int64()).fill_null(0)
            tokens.append(counts.to_numpy(zero_copy_only=False)[able])
        here = np.flatnonzero(able)
        if by_group is not None:
            group.append(numbers.of(batch.filter(pa.array(able))).astype(np.int32))
        places.append(here + at)
        at += batch.num_rows
    found = _joined(places, np.int64)
    if not len(found):
        raise ValueError("no row is left to choose: all have errors, no vector or no score")
    return Candidates(
        found,
        np.zeros(len(found), np.int32) if by_group is None else _joined(group, np.int32),
        ("",) if by_group is None else tuple(numbers.values),
        None if by is None else _joined(score, np.float32),
        _joined(tokens, np.int64) if "tokens" in names else None,
    )


def picked(
    table: Table,
    places: Int64[ndarray, " k"],
    weights: Float64[ndarray, " k"] | Float32[ndarray, " k"] | None = None,
    ranks: Int64[ndarray, " k"] | None = None,
    params: dict[str, object] | None = None,
) -> Selection:
    """Return the rows at these places of the table, in any order but each once; one scan.

    `weights` and `ranks` belong to the places as given. `params` become the selection's.
    """
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    assert (np.diff(ordered) > 0).all(), "a place was picked twice"
    assert not len(ordered) or (0 <= ordered[0] and ordered[-1] < table.rows)
    weight = None if weights is None else weights[order].astype(np.float32)
    rank = None if ranks is None else ranks[order].astype(np.int32)
    return Selection(_rows(table, ordered, weight, rank), dict(params or {}))


def _rows(
    table: Table,
    places: Int64[ndarray, " k"],
    weight: Float32[ndarray, " k"] | None,
    rank: Int32[ndarray, " k"] | None,
) -> Iterator[pa.RecordBatch]:
    at = start = 0
    for batch in table.scan(["shard", "row"]):
        at += batch.num_rows
        stop = int(np.searchsorted(places, at))
        if stop == start:
            continue
        here = batch.take(pa.array(places[start:stop] - (at - batch.num_rows)))
        nulls = pa.nulls(stop - start)
        yield pa.record_batch(
            [
                here.column("shard"),
                here.column("row"),
                nulls.cast(pa.float32()) if weight is None else pa.array(weight[start:stop]),
                nulls.cast(pa.int32()) if rank is None else pa.array(rank[start:stop]),
            ],
            schema=SELECTION_SCHEMA,
        )
        start = stop


def _joined(parts: Sequence[ndarray], kind: type) -> ndarray:
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.empty(0, kind)
