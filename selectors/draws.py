"""Drawing rows with unequal probabilities: what importance, softmax and Gumbel selection share.

Every row is a clock: it rings after exponential times at its own rate, and these times are a
function of (seed, shard, row) alone, so neither shards nor order nor workers matter.

Without replacement the n rows that ring first are kept. That is drawing n times in proportion to
the rates among the rows that are left (Efraimidis and Spirakis 2006), and it is Gumbel-top-k on
the logarithms of the rates (-log of an exponential time is a Gumbel variable). The weight of a row
is 1 / P(it rings before T), P = 1 - exp(-rate T), with T the first ring that is not kept. T does
not depend on when a kept row rings as long as it stays kept, so sums weighted like this are
unbiased exactly (rank conditioning: Cohen and Kaplan 2007, Duffield, Lund and Thorup 2007; for
budgets in tokens: Ting 2017, substitutable thresholds).

With replacement every clock goes on ringing and the first n rings of all are the draws: n
independent draws in proportion to the rates, because a superposition of Poisson processes forgets
whose ring was whose. A row drawn c times has the weight c / (n p), unbiased exactly.

Times are compared in float32 (without replacement their logarithms): up to one part in a million
for logarithms below 16, equal ones in corpus order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64, UInt32, UInt64
from numpy import ndarray

from curate.selectors.budget import need_score
from curate.selectors.choose import Choice, Weights, amount_of, finished
from curate.selectors.cut import find_cuts
from curate.selectors.exact_sum import Moments
from curate.selectors.keyed import exponentials, mix64, row_bits
from curate.selectors.ordering import Candidates, First, Ordering
from curate.selectors.protocol import Budget, Selection, Table
from curate.selectors.score_keys import key_score, score_column, sort_keys

LogRates = Callable[[pa.RecordBatch], "Float64[ndarray, ' n']"]
"""Logarithms of the rates of a batch's rows, up to one constant; -inf: never, NaN: no score."""

BLOCK = 64  # rings made at once for rows that go on ringing
CHUNK = 16_384  # rows for which they are made at once
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Rates:
    """How often the rows of a table are drawn.

    `rows` is the number of rows with a score, `able` of those with a rate above 0; `total` is the
    sum of the rates and `highest` the largest logarithm, where they are needed.
    """

    columns: frozenset[str]
    log: LogRates
    rows: int
    able: int
    total: float = np.nan
    highest: float = np.nan

    def can_ring(self, batch: pa.RecordBatch) -> Bool[ndarray, " n"]:
        return np.asarray(self.log(batch) > -np.inf)


@dataclass(frozen=True, kw_only=True)
class Draw(Choice):
    """A choice at random with unequal probabilities.

    `unbiased`: rows carry loss weights, 1 / probability, under which sums over the selection
    estimate sums over all rows without bias. Rows without a score are never drawn.
    """

    unbiased: bool = False

    def draw(self, table: Table, budget: Budget, rng: np.random.Generator, by: Rates) -> Selection:
        """Return rows drawn without replacement; rank 0 rang first, so smaller budgets nest.

        With groups each group's budget is drawn from its rows in proportion to the rates.
        """
        key = int(rng.bit_generator.random_raw())

        def keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
            rings = np.log(exponentials(_bits(key, batch))) - by.log(batch)
            return sort_keys(rings.astype(np.float32), "low")

        ordering = Ordering(table, by.columns, keys, passes=by.can_ring)
        weigh = _inverse(by) if self.unbiased else _even
        selection = self.choose(ordering, budget, weigh=weigh)
        if not self.unbiased:
            return selection
        return replace(selection, params={**selection.params, "weight_kind": "loss"})

    def draw_again(
        self, table: Table, budget: Budget, rng: np.random.Generator, by: Rates
    ) -> Selection:
        """Return rows drawn with replacement: each once, weighted by how often it was drawn.

        The budget counts draws. Weights are the counts (kind `repeat`) or, where `unbiased`,
        counts / (N p) of kind `loss`. No ranks.

        Raises:
            ValueError: the budget is in tokens or divided among groups.
        """
        if budget.kind == "tokens":
            raise ValueError("draws with replacement are counted in rows, not in tokens")
        if self.by_group is not None:
            raise ValueError(
                "draws with replacement have no budgets of groups; draw without replacement"
            )
        key = int(rng.bit_generator.random_raw())
        draws = amount_of(budget, Ordering(table, by.columns, _no_keys))
        until = draws + 8 * draws**0.5 + 40  # more than `draws` rings are all but certain by then
        while True:
            rings = Rings(table, by.columns, _no_keys, passes=by.can_ring)
            rings = replace(rings, by=by, key=key, until=until)
            (front,), totals = find_cuts(rings, lambda totals: [np.minimum(totals, draws)])
            if int(totals.sum()) > draws:
                break
            until *= 2
        rows = _counted(rings, front, self.carry, by if self.unbiased else None)
        params: dict[str, object] = {"draws": draws}
        params["weight_kind"] = "loss" if self.unbiased else "repeat"
        return Selection(finished(rows, ranked=False), params)


@dataclass(frozen=True)
class Rings(Ordering):
    """The rings of every row up to the time `until`, as candidates: a row comes once for each.

    Rates are divided by their sum, so that one ring is expected in a unit of time. Memory: one
    batch and its rings.
    """

    by: Rates | None = None
    key: int = 0
    until: float = 0.0

    def scan(self, carry: tuple[str, ...] = ()) -> Iterator[Candidates]:
        assert self.by is not None and self.by.total > 0, "drawing again needs the sum of rates"
        for rows in super().scan(carry):
            rates = np.exp(self.by.log(rows.batch)) / self.by.total
            where, times = _rings(_bits(self.key, rows.batch), rates, self.until)
            if len(where):
                batch = rows.batch.take(pa.array(where))
                key = sort_keys(times.astype(np.float32), "low")
                yield Candidates(batch, key, rows.group[where], rows.size[where])


def read_scores(table: Table, by: str, least: float = -np.inf) -> tuple[Moments, int]:
    """Return the moments of the scores of rows without error, and how many are 0; one scan.

    Raises:
        ValueError: a score is NaN, infinite or below `least` (its row is named), or there is none.
    """
    need_score(table, by)
    moments, zeros = Moments(), 0
    for rows in Ordering(table, frozenset({by}), _no_keys).scan():
        scores = score_column(rows.batch, by)
        _refuse(rows.batch, by, scores, least)
        moments.add(scores.astype(np.float64))
        zeros += int((scores == 0).sum())
    if not moments.count:
        raise ValueError("no row is left to choose: all have errors or no score")
    return moments, zeros


def _rings(
    bits: UInt64[ndarray, " n"], rates: Float64[ndarray, " n"], until: float
) -> tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]:
    """Return the row and the time of every ring before `until`, rows ascending."""
    where, times = [np.empty(0, dtype=np.int64)], [np.empty(0)]
    waiting = [(np.arange(len(rates)), np.zeros(len(rates)), 1)]
    while waiting:
        alive, now, turn = waiting.pop()
        # Few rows ring more than a few times; those that do ring many times. How many rings are
        # summed at once depends on the row's own turn alone, so times are the same in any batch.
        turns = np.arange(turn, turn + (1 if turn < 4 else BLOCK), dtype=np.uint64)
        waits = exponentials(mix64(bits[alive, None] + turns * _GOLDEN)) / rates[alive, None]
        ring = now[:, None] + np.cumsum(waits, axis=1)
        inside = ring < until
        where.append(alive[np.nonzero(inside)[0]])
        times.append(ring[inside])
        more = np.flatnonzero(inside[:, -1])
        waiting += [
            (alive[part], ring[part, -1], turn + len(turns))
            for part in np.split(more, range(CHUNK, len(more), CHUNK))
            if len(part)
        ]
    rows = np.concatenate(where)
    order = np.argsort(rows, kind="stable")
    return rows[order], np.concatenate(times)[order]


def _counted(
    rings: Rings, front: First, carry: tuple[str, ...], by: Rates | None
) -> Iterator[tuple[pa.RecordBatch, UInt32[ndarray, " n"]]]:
    """Yield the rows that were drawn, once each, weighted by how often or, with `by`, unbiased."""
    inside = front.mask()
    for rows in rings.scan(carry):
        drawn = rows.where(inside(rows))
        if not len(drawn.key):
            continue
        place = [drawn.batch.column(name).to_numpy() for name in ("shard", "row")]
        is_new = np.append(True, (np.diff(place[0]) != 0) | (np.diff(place[1]) != 0))
        begins = np.flatnonzero(is_new)
        weight = np.diff(np.append(begins, len(is_new))).astype(np.float64)
        batch = drawn.batch.take(pa.array(begins))
        if by is not None:
            weight *= by.total / (by.rows * np.exp(by.log(batch)))
        batch = batch.select(["shard", "row", *dict.fromkeys(carry)])
        yield (
            batch.append_column("weight", pa.array(weight.astype(np.float32))),
            drawn.key[begins],
        )


def _bits(key: int, batch: pa.RecordBatch) -> UInt64[ndarray, " n"]:
    shard, row = (batch.column(name).to_numpy() for name in ("shard", "row"))
    return row_bits(key, shard, row)


def _no_keys(batch: pa.RecordBatch) -> UInt32[ndarray, " n"]:
    return np.zeros(batch.num_rows, dtype=np.uint32)


def _even(front: First, share: float) -> Weights | None:
    """Weigh nothing."""
    return None


def _inverse(by: Rates) -> Callable[[First, float], Weights]:
    """Return what weighs rows by share / P(kept): about 1 in the mean over the selection."""

    def weigh(front: First, share: float) -> Weights:
        last = np.array([key_score(int(key)) for key in front.key])  # log T; NaN: all are kept
        last = np.nan_to_num(last, nan=np.inf)
        share *= by.able / by.rows  # rows that cannot be drawn are rows of the mean, too

        def weights(rows: Candidates) -> Float64[ndarray, " n"]:
            with np.errstate(over="ignore"):
                kept = -np.expm1(-np.exp(last[rows.group] + by.log(rows.batch)))
            return np.asarray(share / kept)

        return weights

    return weigh


def _refuse(batch: pa.RecordBatch, by: str, scores: Float32[ndarray, " n"], least: float) -> None:
    """Raise ValueError naming the first score that cannot be a rate."""
    null = batch.column(by).is_null().to_numpy(zero_copy_only=False)
    bad = ~null & ~(np.isfinite(scores) & (scores >= least))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        shard, row = (batch.column(name)[at].as_py() for name in ("shard", "row"))
        wanted = "finite" if least == -np.inf else f"finite and at least {least:g}"
        raise ValueError(
            f"the score {by!r} of row {row} of shard {shard} is {scores[at]:g}; to draw by it, "
            f"scores must be {wanted}"
        )
