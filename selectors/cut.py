"""Exact cuts through an order that is too long to sort.

Two scans with radix histograms: the first counts the upper 16 bits of the keys, the second the
lower 16 bits of those in the bins where cuts fall. Counters are kept for bins that occur, at most
65 536 per group, whatever the number of rows.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.ordering import First, Ordering

Totals = Int64[ndarray, " g"]
PENDING = 1 << 18
EVERYTHING = 1 << 62


def find_cuts(
    ordering: Ordering, amounts: Callable[[Totals], list[Totals]]
) -> tuple[list[First], Totals]:
    """Return, for each list of amounts, the front of the order that has this size per group.

    `amounts` is asked once, with the total size of each group. An amount of a group that is not
    below its total takes the whole group. Also returns the totals. Reads the table twice, or once
    when no cut falls inside a group.
    """
    upper = Tally()
    for rows in ordering.scan():
        upper.add((rows.group << 16) | (rows.key >> 16), rows.size)
    totals = upper.totals()
    asked = amounts(totals)
    cuts = [_bin_of(upper, totals, amount) for amount in asked]
    open_bins = np.unique(np.concatenate([bins[bins >= 0] for bins, _ in cuts] or [_NONE]))
    lower = Tally(width=2)
    if len(open_bins):
        for rows in ordering.scan():
            code = (rows.group << 16) | (rows.key >> 16)
            at = np.minimum(np.searchsorted(open_bins, code), len(open_bins) - 1)
            inside = open_bins[at] == code
            size = rows.size[inside]
            lower.add((at[inside] << 16) | (rows.key[inside] & 0xFFFF), size, np.ones_like(size))
    return [_refined(lower, open_bins, bins, rest) for bins, rest in cuts], totals


class Tally:
    """Sums by code, kept for the codes that occur; `width` sums for each."""

    def __init__(self, width: int = 1) -> None:
        self.codes = _NONE
        self.sums: list[Totals] = [_NONE] * width
        self._pending: list[tuple[Totals, list[Totals]]] = []
        self._waiting = 0

    def add(self, codes: Int64[ndarray, " n"], *amounts: Int64[ndarray, " n"]) -> None:
        found, where = np.unique(codes, return_inverse=True)
        # bincount sums in float64: exact below 2^53, and a batch is far below.
        sums = [np.bincount(where, a, minlength=len(found)).astype(np.int64) for a in amounts]
        self._pending.append((found, sums))
        self._waiting += len(found)
        if self._waiting > max(PENDING, len(self.codes)):
            self.settle()

    def settle(self) -> None:
        """Merge what is pending into the sorted counters."""
        pending, self._pending, self._waiting = self._pending, [], 0
        codes = np.concatenate([self.codes, *(found for found, _ in pending)])
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        begins = np.flatnonzero(np.diff(codes, prepend=-1))
        self.codes = codes[begins]
        for i, total in enumerate(self.sums):
            amounts = np.concatenate([total, *(sums[i] for _, sums in pending)])
            self.sums[i] = np.add.reduceat(amounts[order], begins) if len(begins) else _NONE

    def totals(self) -> Totals:
        """Return the size of each group (the upper part of the code)."""
        self.settle()
        groups = int(self.codes[-1] >> 16) + 1 if len(self.codes) else 1
        totals = np.zeros(groups, dtype=np.int64)
        np.add.at(totals, self.codes >> 16, self.sums[0])
        return totals


_NONE = np.empty(0, dtype=np.int64)


def _bin_of(upper: Tally, totals: Totals, amount: Totals) -> tuple[Totals, Totals]:
    """Return, per group, the bin in which its amount ends (-1: takes all) and the rest there."""
    assert len(amount) == len(totals)
    sizes = upper.sums[0]
    before = np.cumsum(sizes)  # over all groups; groups are consecutive
    target = np.cumsum(totals) - totals + amount
    bins = np.searchsorted(before, target, side="right")  # first bin that goes beyond it
    is_open = amount < totals
    bins = np.where(is_open, bins, 0)
    rest = target - (before[bins] - sizes[bins]) if len(before) else target
    return np.where(is_open, upper.codes[bins], -1) if len(before) else -np.ones_like(amount), rest


def _refined(lower: Tally, open_bins: Int64[ndarray, " b"], bins: Totals, rest: Totals) -> First:
    lower.settle()
    key = np.full(len(bins), 0xFFFFFFFF, dtype=np.uint32)
    ties = np.full(len(bins), EVERYTHING, dtype=np.int64)
    tied = np.zeros(len(bins), dtype=np.int64)
    for group in np.flatnonzero(bins >= 0):
        index = int(np.searchsorted(open_bins, bins[group]))
        low, high = np.searchsorted(lower.codes, [index << 16, (index + 1) << 16])
        sizes = np.cumsum(lower.sums[0][low:high])
        at = int(np.searchsorted(sizes, rest[group], side="right"))
        key[group] = (int(bins[group]) & 0xFFFF) << 16 | int(lower.codes[low + at]) & 0xFFFF
        ties[group] = rest[group] - (sizes[at] - lower.sums[0][low + at])
        met = lower.sums[1][low + at]
        # One row that is too long for what is left of a token budget meets no other.
        tied[group] = met if ties[group] > 0 and met > 1 else 0
    return First(key, ties, tied)
