"""What each class or group gets of a budget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from curate.selectors.apportion import apportion
from curate.selectors.groups import GroupNumbers

Shares = Literal["equal", "proportional"] | Mapping[str | int, float]
MinShares = float | Mapping[str | int, float]


@dataclass(frozen=True)
class GroupBudgets:
    """Amounts for the values of the column `by_group`, in whole rows or tokens.

    `shares="equal"` gives every value the same, `"proportional"` its share of the rows that can be
    chosen, and a mapping {value: share} what it says (values it does not name get their minimum);
    by largest remainder, the smaller value first among equal remainders. `min_shares` is the
    least share of the budget for every value, or {value: share}; rounded up to whole rows where
    the budget allows that for all, else down, and never more than the value has. Groups too small
    for their amount give the rest to the others.
    """

    by_group: str
    shares: Shares = "proportional"
    min_shares: MinShares | None = None
    numbers: GroupNumbers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", GroupNumbers(self.by_group))

    def divide(self, totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
        """Divide in the order of the values, not of their first appearance."""
        values, order = self._in_order(totals)
        sizes = [int(totals[i]) for i in order]
        floors = self._floors(values, sizes, amount)
        amounts = np.zeros(len(totals), dtype=np.int64)
        amounts[order] = apportion(amount, self._shares(values, sizes), sizes, floors)
        return amounts

    def floors(self, totals: Int64[ndarray, " g"], amount: int) -> Int64[ndarray, " g"]:
        """Return the least amount of each group."""
        values, order = self._in_order(totals)
        amounts = np.zeros(len(totals), dtype=np.int64)
        amounts[order] = self._floors(values, [int(totals[i]) for i in order], amount)
        return amounts

    def _in_order(self, totals: Int64[ndarray, " g"]) -> tuple[list[str], list[int]]:
        values = self.numbers.values
        order = sorted(range(len(totals)), key=lambda i: values[i] if i < len(values) else "")
        return [values[i] for i in order if i < len(values)], order if values else []

    def _shares(self, values: list[str], sizes: list[int]) -> list[int] | list[Fraction]:
        if not isinstance(self.shares, Mapping):
            return sizes if self.shares == "proportional" else [1] * len(sizes)
        return self._named("shares", self.shares, values)

    def _floors(self, values: list[str], sizes: list[int], amount: int) -> list[int]:
        if self.min_shares is None:
            return [0] * len(sizes)
        if isinstance(self.min_shares, Mapping):
            least = self._named("min_shares", self.min_shares, values)
        else:
            least = [Fraction(str(self.min_shares))] * len(values)
        if sum(least) > 1:
            raise ValueError(
                f"min_shares {self.min_shares} for {len(values)} values of {self.by_group!r} is "
                f"more than the whole budget; give at most {1 / max(1, len(values)):.3g} to each"
            )
        for whole in (ceil, floor):
            wanted = [whole(share * amount) for share in least]
            wanted = [min(want, size) for want, size in zip(wanted, sizes, strict=True)]
            if sum(wanted) <= amount:
                break
        return wanted

    def _named(
        self, name: str, shares: Mapping[str | int, float], values: list[str]
    ) -> list[Fraction]:
        named = {str(value): Fraction(str(share)) for value, share in shares.items()}
        if unknown := sorted(named.keys() - set(values)):
            known = ", ".join(sorted(values)[:20])
            raise ValueError(
                f"{name} names {unknown[0]!r}: no row that can be chosen has it in column "
                f"{self.by_group!r}; they have: {known}"
            )
        return [named.get(value, Fraction(0)) for value in values]


def check_shares(name: str, shares: Shares | None, min_shares: MinShares | None) -> None:
    """Raise ValueError for what can be no shares, whatever the groups are."""
    if isinstance(shares, Mapping):
        if not all(_is_share(s, 1e18) for s in shares.values()) or not sum(shares.values()):
            raise ValueError(f"{name} must be positive numbers, such as {{en: 0.7, de: 0.3}}")
    elif shares not in (None, "equal", "proportional"):
        raise ValueError(f"{name} must be equal, proportional or a mapping, not {shares!r}")
    least = list(min_shares.values()) if isinstance(min_shares, Mapping) else [min_shares]
    if min_shares is not None and not all(_is_share(s, 1) for s in least):
        raise ValueError(
            f"min_shares must be a share in [0, 1] or a mapping such as {{de: 0.1}}, "
            f"not {min_shares!r}"
        )


def _is_share(value: object, most: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= float(value) <= most  # type: ignore[arg-type]
