from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from curate.selectors.apportion import apportion

GROUPS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=8)


def test_a_case_worked_by_hand():
    # Quotas 10*(5, 3, 2)/10 are whole; of 11 the largest remainder .5 goes to the first.
    assert apportion(10, [5, 3, 2], [9, 9, 9]) == [5, 3, 2]
    assert apportion(11, [5, 3, 2], [9, 9, 9]) == [6, 3, 2]
    # Equal shares of 60 with sizes 5 and 10 filled: the third takes the rest.
    assert apportion(60, [1, 1, 1], [5, 10, 100]) == [5, 10, 45]
    assert apportion(100, [1, 1, 1], [100, 100, 100]) == [34, 33, 33]


@given(groups=GROUPS, budget=st.integers(0, 200))
def test_sums_to_the_budget_within_capacity(groups, budget):
    shares, capacity = (list(column) for column in zip(*groups, strict=True))
    amounts = apportion(budget, shares, capacity)
    possible = sum(c for s, c in groups if s > 0)
    assert sum(amounts) == min(budget, possible)
    assert all(0 <= a <= c for a, c in zip(amounts, capacity, strict=True))
    assert all(a == 0 for a, s in zip(amounts, shares, strict=True) if s == 0)


@given(groups=GROUPS, budget=st.integers(0, 200))
def test_unfilled_groups_differ_from_their_quota_by_less_than_one(groups, budget):
    shares, capacity = (list(column) for column in zip(*groups, strict=True))
    amounts = apportion(budget, shares, capacity)
    unfilled = [i for i, s in enumerate(shares) if s > 0 and amounts[i] < capacity[i]]
    left = budget - sum(capacity[i] for i, s in enumerate(shares) if s > 0 and i not in unfilled)
    total = sum(shares[i] for i in unfilled)
    for i in unfilled:
        # A group may also be full by rounding up, which takes less than one from the others.
        assert abs(amounts[i] - Fraction(left * shares[i], total)) < len(shares)
        for j in unfilled:
            if shares[i] == shares[j]:
                assert abs(amounts[i] - amounts[j]) <= 1


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), data=st.data())
def test_proportional_shares_stay_within_one_of_the_exact_quota(sizes, data):
    budget = data.draw(st.integers(0, sum(sizes)))
    for amount, size in zip(apportion(budget, sizes, sizes), sizes, strict=True):
        assert abs(amount - Fraction(budget * size, sum(sizes))) < 1
