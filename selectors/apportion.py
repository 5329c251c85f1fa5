"""Dividing a budget among groups in whole units."""

from collections.abc import Sequence
from fractions import Fraction


def apportion(
    budget: int,
    shares: Sequence[int | Fraction],
    capacity: Sequence[int],
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Return whole amounts close to `shares` that sum to the budget, none above its capacity.

    Largest remainder (Hamilton): every group gets the floor of its quota, and what is left goes to
    the largest fractional parts, the first of equal ones. A group whose quota exceeds its capacity
    is filled and gives the rest to the others, in proportion to their shares. With `floors` no
    amount is below its own (they must be within the capacities and sum to the budget at most).
    Groups with share 0 get their floor; the sum is below the budget only when all others are
    full. Exact arithmetic.
    """
    assert len(shares) == len(capacity) and all(s >= 0 for s in shares)
    least = list(floors or [0] * len(shares))
    assert sum(least) <= budget and all(a <= b for a, b in zip(least, capacity, strict=True))
    amounts = [0 if share > 0 else low for share, low in zip(shares, least, strict=True)]
    left, open_groups = budget - sum(amounts), [i for i, share in enumerate(shares) if share > 0]
    while open_groups:
        total = sum(shares[i] for i in open_groups)
        quota = {i: Fraction(left) * shares[i] / total for i in open_groups}
        over = [i for i in open_groups if quota[i] >= capacity[i]]
        under = [i for i in open_groups if quota[i] < least[i]]
        if not over and not under:
            _give(amounts, quota, left)
            break
        excess = sum(quota[i] - capacity[i] for i in over)
        lack = sum(least[i] - quota[i] for i in under)
        # Which side is settled for good: what the full ones return, or what the others lack.
        closed = over if over and excess >= lack else under
        for i in closed:
            amounts[i] = capacity[i] if closed is over else least[i]
            left -= amounts[i]
        open_groups = [i for i in open_groups if i not in set(closed)]
    return amounts


def _give(amounts: list[int], quota: dict[int, Fraction], left: int) -> None:
    for i, share in quota.items():
        amounts[i] = int(share)
    rest = left - sum(amounts[i] for i in quota)
    by_remainder = sorted(quota, key=lambda i: (int(quota[i]) - quota[i], i))
    for i in by_remainder[:rest]:
        amounts[i] += 1
