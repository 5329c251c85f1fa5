"""Budgets of groups, least shares, ccs and moderate, against plain Python."""

from fractions import Fraction
from math import ceil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.selectors.apportion import apportion
from curate.selectors.ccs import allocate
from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

FREE = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rng(seed=0):
    return np.random.default_rng(seed)


@FREE
@given(data=st.data(), n=st.integers(1, 5))
def test_amounts_between_floors_and_capacity_are_nearest_to_the_shares(data, n):
    draw = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))  # noqa: E731
    capacity, shares = draw(0, 9), draw(0, 4)
    floors = [min(f, c) for f, c in zip(draw(0, 9), capacity, strict=True)]
    budget = data.draw(st.integers(sum(floors), sum(capacity) + 2))
    amounts = apportion(budget, shares, capacity, floors)
    most = sum(c if s else f for s, c, f in zip(shares, capacity, floors, strict=True))
    assert sum(amounts) == min(budget, most)

    def clamped(level):
        rows = zip(shares, capacity, floors, strict=True)
        return [min(max(level * s, f), c) if s else Fraction(f) for s, c, f in rows]

    # The exact real amounts are clamp(level * share); bisect the level.
    low, high = Fraction(0), Fraction(100)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clamped(middle)) < sum(amounts) else (low, middle)
    for amount, exact, f, c in zip(amounts, clamped(high), floors, capacity, strict=True):
        assert f <= amount <= c and abs(amount - exact) < 1 + 1e-6


def least_first(scores, groups, budget, floors, drop=0):
    """The oracle of least shares: the first of each group, then the first of all others."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[drop:]
    kept = []
    for group, floor in floors.items():
        kept += [i for i in order if groups[i] == group][:floor]
    kept += [i for i in order if i not in kept][: budget - len(kept)]
    return sorted(kept)


@FREE
@given(
    groups=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    share=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.3]),
    batch_rows=st.integers(1, 15),
    data=st.data(),
)
def test_least_shares_are_kept_and_the_rest_is_the_best_of_all(
    make_table, kept, groups, share, batch_rows, data
):
    n = len(groups)
    scores = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), float)
    budget = data.draw(st.integers(1, n))
    drop = data.draw(st.sampled_from([0, 1])) if n > budget else 0
    order = sorted(range(n), key=lambda i: -scores[i])[drop:]
    sizes = {g: sum(groups[i] == g for i in order) for g in sorted({groups[i] for i in order})}
    least = Fraction(str(share)) * budget
    floors = {g: min(ceil(least), size) for g, size in sizes.items()}
    if sum(floors.values()) > budget:
        floors = {g: min(int(least), size) for g, size in sizes.items()}
    expected = least_first(scores, groups, budget, floors, drop)
    table = make_table(scores, batch_rows=batch_rows, lang=pa.array(groups))
    selector = make_selector("top", by="score", by_group="lang", min_shares=share, drop_top=drop)
    assert kept(selector.select(table, Budget("rows", budget), rng())).tolist() == expected
    assert len(table.scans) <= 7


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("top", {}),
        ("keep", {"direction": "low"}),
        ("window", {"offset": 5}),
        ("random", {}),
        ("stratified", {"strata": 5}),
        ("ccs", {"drop_top": 0.1, "strata": 5}),
        ("moderate", {}),
        ("moderate", {"closest": "value"}),
        ("threshold", {"at_least": -9.0}),
        ("importance", {}),
        ("softmax", {}),
        ("gumbel", {}),
    ],
)
def test_every_method_divides_its_budget_among_groups(make_table, kept, name, params):
    scores = rng(1).gamma(2.0, size=120)
    groups = np.repeat(["a", "b", "c"], [80, 30, 10])
    table = make_table(scores, lang=pa.array(groups), batch_rows=17)
    by = {} if name == "random" else {"by": "score"}

    def shares(**how):
        selector = make_selector(name, **by, **params, by_group="lang", **how)
        chosen = kept(selector.select(table, Budget("rows", 24), rng()))
        assert len(set(chosen.tolist())) == 24
        return [int((groups[chosen] == g).sum()) for g in "abc"]

    assert shares(group_shares="equal") == [8, 8, 8]
    assert shares(group_shares={"a": 0.25, "c": 0.25}) == [14, 0, 10] or name in ("ccs", "window")
    assert all(
        a >= b for a, b in zip(shares(min_shares={"c": 0.2, "b": 0.3}), [0, 8, 5], strict=True)
    )
    if name not in ("ccs", "window"):  # these drop rows first, so proportions are of what is left
        assert shares() == [16, 6, 2]
        assert shares(group_shares="proportional", min_shares=0.25) == [12, 6, 6]


def test_a_least_share_is_rounded_up_where_small_groups_leave_room(make_table, kept):
    groups = np.repeat(["a", "b", "c", "d"], [30, 8, 1, 1])
    table = make_table(np.arange(40, 0, -1.0), lang=pa.array(groups))
    selector = make_selector("top", by="score", by_group="lang", min_shares=0.25)
    chosen = kept(selector.select(table, Budget("rows", 9), rng()))
    # 0.25 of 9 rows is 3 for a and b, and c and d have one row each: 8 of 9, so none is rounded
    # down although 4 x 3 would be more than 9.
    assert [int((groups[chosen] == g).sum()) for g in "abcd"] == [4, 3, 1, 1]


def test_group_budgets_in_tokens(make_table, kept):
    groups = np.repeat(["a", "b"], [30, 10])
    tokens = rng(2).integers(1, 6, 40)
    table = make_table(rng(3).normal(size=40), lang=pa.array(groups), tokens=pa.array(tokens))
    for name, params in (("top", {}), ("moderate", {}), ("ccs", {})):
        selector = make_selector(name, by="score", by_group="lang", group_shares="equal", **params)
        chosen = kept(selector.select(table, Budget("tokens", 40), rng()))
        for group in "ab":
            spent = tokens[chosen[groups[chosen] == group]].sum()
            # A row fits or not; of ccs every stratum rounds to a whole row.
            assert spent <= 20 and (name == "ccs" or spent > 20 - 6)
    least = make_selector("top", by="score", by_group="lang", min_shares={"b": 0.4})
    chosen = kept(least.select(table, Budget("tokens", 40), rng()))
    assert tokens[chosen].sum() <= 40 and tokens[chosen[groups[chosen] == "b"]].sum() > 16 - 6


def test_ccs_gives_small_strata_all_they_have():
    assert allocate(60, [5, 10, 100]) == [5, 10, 45]
    assert allocate(10, [5, 5, 5]) == [3, 3, 4]
    assert allocate(10, [0, 0, 30]) == [0, 0, 10]
    assert allocate(99, [3, 4]) == [3, 4]


@FREE
@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0, 7.0, 10.0]), min_size=2, max_size=60),
    strata=st.integers(1, 7),
    direction=st.sampled_from(["high", "low"]),
    data=st.data(),
)
def test_ccs_covers_ascending_strata_below_the_cut_off(
    make_table, kept, scores, strata, direction, data
):
    n = len(scores)
    drop = data.draw(st.integers(0, n - 1))
    budget = data.draw(st.integers(1, n))
    values = np.array(scores)
    order = np.argsort(-values if direction == "high" else values, kind="stable")
    left = np.sort(order[drop:])
    low, high = values[left].min(), values[left].max()
    edges = np.linspace(low, high, strata + 1)[1:-1] if high > low else [np.inf] * (strata - 1)
    of = np.searchsorted(edges, values, side="right")
    sizes = [int((of[left] == s).sum()) for s in range(strata)]
    expected, rest = [0] * strata, budget
    for done, s in enumerate(sorted(range(strata), key=lambda s: (sizes[s], s))):
        expected[s] = min(sizes[s], rest // (strata - done))
        rest -= expected[s]
    selector = make_selector("ccs", by="score", direction=direction, drop_top=drop, strata=strata)
    table = make_table(scores)
    chosen = kept(selector.select(table, Budget("rows", budget), rng()))
    assert set(chosen.tolist()) <= set(left.tolist())
    assert [int((of[chosen] == s).sum()) for s in range(strata)] == expected
    assert len(table.scans) <= 6


def test_ccs_is_random_inside_strata_and_drops_a_share(make_table, kept):
    table = make_table(np.arange(100.0))
    selector = make_selector("ccs", by="score", drop_top=0.3, strata=7)
    draws = [kept(selector.select(table, Budget("rows", 14), rng(s))) for s in range(4)]
    assert len({tuple(d) for d in draws}) == 4
    for chosen in draws:
        assert np.bincount(chosen // 10, minlength=10).tolist() == [2] * 7 + [0] * 3


@FREE
@given(
    scores=st.lists(st.sampled_from([None, 0.0, 1.0, 1.5, 4.0, 9.0, -3.0, np.inf]), min_size=1),
    data=st.data(),
)
def test_moderate_is_the_middle(make_table, kept, ranked, scores, data):
    values = np.array([np.nan if s is None else s for s in scores])
    there = np.flatnonzero(~np.isnan(values))
    if not len(there):
        return
    budget = data.draw(st.integers(1, len(scores)))
    k = min(budget, len(there))
    order = there[np.argsort(values[there], kind="stable")]
    start = (len(there) - k) // 2
    table = make_table(scores)
    middle = make_selector("moderate", by="score")
    chosen = kept(middle.select(table, Budget("rows", budget), rng()))
    assert chosen.tolist() == sorted(order[start : start + k].tolist())
    nearest = make_selector("moderate", by="score", closest="value")
    median = np.median(values[there])
    with np.errstate(invalid="ignore"):
        away = np.where(values == median, 0, np.abs(values - median)).astype(np.float32)
    if np.isnan(away[there]).any():  # the mean of the middle two is infinite
        return
    expected = there[np.argsort(away[there], kind="stable")][:k]
    assert (
        ranked(nearest.select(table, Budget("rows", budget), rng())).tolist() == expected.tolist()
    )


def test_moderate_has_a_median_for_each_group(make_table, kept):
    scores = np.concatenate([np.arange(20.0), 100 + np.arange(20.0)])
    table = make_table(scores, lang=pa.array(["a"] * 20 + ["b"] * 20))
    for closest in ("rank", "value"):
        selector = make_selector("moderate", by="score", by_group="lang", closest=closest)
        chosen = kept(selector.select(table, Budget("rows", 8), rng()))
        assert chosen.tolist() == [8, 9, 10, 11, 28, 29, 30, 31]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("top", {"min_shares": 0.1}, "need a column of groups"),
        ("top", {"group_shares": "equal"}, "need a column of groups"),
        ("top", {"by_group": "label", "group_shares": "x"}, "group_shares must be equal"),
        ("top", {"by_group": "label", "group_shares": {}}, "must be positive numbers"),
        (
            "top",
            {"by_group": "label", "min_shares": 1.5},
            r"min_shares must be a share in \[0, 1\]",
        ),
        ("top", {"by_group": "label", "min_shares": {"a": -1}}, "min_shares must be"),
        ("balanced", {"by_group": "label", "group_shares": "equal"}, "by shares="),
        ("ccs", {"strata": 0}, "at least 1"),
        ("ccs", {"direction": "up"}, "high or low"),
        ("moderate", {"closest": "x"}, "rank or value"),
    ],
)
def test_wrong_settings_are_one_sentence(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_selector(name, by="score", **params)


def test_impossible_least_shares_and_unknown_groups_are_said(make_table):
    table = make_table(np.arange(9.0), label=pa.array(list("aaabbbccc")))

    def choose(**how):
        selector = make_selector("top", by="score", by_group="label", **how)
        return selector.select(table, Budget("rows", 6), rng())

    with pytest.raises(ValueError, match=r"0.4 for 3 values .* give at most 0.333 to each"):
        choose(min_shares=0.4)
    with pytest.raises(ValueError, match="min_shares names 'x': no row that can be chosen has it"):
        choose(min_shares={"x": 0.1})
    with pytest.raises(ValueError, match="no column 'colour'"):
        make_selector("top", by="score", by_group="colour").select(table, Budget("rows", 1), rng())


@pytest.mark.parametrize("method", ["top", "importance", "moderate", "stratified"])
def test_groups_without_a_share_that_leave_the_budget_unfilled_are_no_secret(
    make_table, caplog, method
):
    lang = pa.array(["a", "a", "b", "b", "b", "b"])
    tokens = pa.array([2] * 6, pa.int32())
    table = make_table(np.arange(1, 7), lang=lang, tokens=tokens)
    shares = dict(by="score", by_group="lang", group_shares={"a": 1.0})
    selector = make_selector(method, **shares)
    batches = list(selector.select(table, Budget("rows", 4), rng()).batches)
    assert sum(batch.num_rows for batch in batches) == 2
    assert "the budget is 4 rows, only 2 can be chosen" in caplog.text
    with pytest.raises(ValueError, match="8 tokens is more than the 4 tokens that can be chosen"):
        selector.select(table, Budget("tokens", 8), rng())
