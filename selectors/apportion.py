"""Dividing a budget among groups in whole units."""

from collections.abc import Sequence
from fractions import Fraction


def apportion(budget: int, shares: Sequence[int | Fraction], capacity: Sequence[int]) -> list[int]:
    """Return whole amounts close to `shares` that sum to the budget, none above its capacity.

    Largest remainder (Hamilton): every group gets the floor of its quota, and what is left goes to
    the largest fractional parts, the first of equal ones. A group whose quota exceeds its capacity
    is filled and gives the rest to the others, in proportion to their shares. Groups with share 0
    get nothing; the sum is below the budget only when all others are full. Exact arithmetic.
    """
    assert len(shares) == len(capacity) and all(s >= 0 for s in shares)
    amounts = [0] * len(shares)
    left, open_groups = budget, [i for i, share in enumerate(shares) if share > 0]
    while open_groups:
        total = sum(shares[i] for i in open_groups)
        quota = {i: Fraction(left) * shares[i] / total for i in open_groups}
        full = [i for i in open_groups if quota[i] >= capacity[i]]
        if not full:
            _give(amounts, quota, left)
            break
        for i in full:
            amounts[i] = capacity[i]
            left -= capacity[i]
        open_groups = [i for i in open_groups if i not in set(full)]
    return amounts


def _give(amounts: list[int], quota: dict[int, Fraction], left: int) -> None:
    for i, share in quota.items():
        amounts[i] = int(share)
    rest = left - sum(amounts[i] for i in quota)
    by_remainder = sorted(quota, key=lambda i: (int(quota[i]) - quota[i], i))
    for i in by_remainder[:rest]:
        amounts[i] += 1
