"""top, bottom, keep, window and threshold against a plain stable sort."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

# Few distinct values: most cuts go through ties. Infinities, both zeros, NaN and null occur.
SCORES = st.lists(
    st.sampled_from([None, np.nan, -np.inf, np.inf, -0.0, 0.0, 1.0, 1.0000001, -2.5, 3e38, 1e-45]),
    min_size=1,
    max_size=60,
)
FREE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stable(scores, first, eligible):
    """Positions of eligible rows, best first, equal scores in row order: the oracle."""
    values = np.array([np.nan if s is None else s for s in scores], dtype=np.float32)
    key = values if first == "low" else -values
    rows = [i for i in range(len(values)) if eligible[i] and not np.isnan(values[i])]
    return np.array(sorted(rows, key=lambda i: key[i]), dtype=np.int64)


def rng():
    return np.random.default_rng(0)


@FREE
@given(scores=SCORES, data=st.data())
@pytest.mark.parametrize("first", ["high", "low"])
def test_kept_rows_are_those_of_a_stable_sort(make_table, kept, ranked, scores, data, first):
    n = len(scores)
    errors = data.draw(st.sets(st.integers(0, n - 1)))
    budget = data.draw(st.integers(1, n))
    drop = data.draw(st.integers(0, n - 1))
    batch_rows = data.draw(st.integers(1, 20))
    table = make_table(scores, errors=errors, batch_rows=batch_rows)
    expected = stable(scores, first, [i not in errors for i in range(n)])[drop : drop + budget]
    methods = {
        "top" if first == "high" else "bottom": {},
        "keep": {"direction": first},
        "window": {"direction": first},
    }
    for name, params in methods.items():
        selector = make_selector(name, by="score", drop_top=drop, **params)
        if not len(expected):
            with pytest.raises(ValueError, match="no row is left"):
                list(selector.select(table, Budget("rows", budget), rng()).batches)
            continue
        select = lambda: selector.select(table, Budget("rows", budget), rng())  # noqa: B023, E731
        assert kept(select()).tolist() == sorted(expected.tolist())
        assert ranked(select()).tolist() == expected.tolist()


@FREE
@given(scores=SCORES, data=st.data())
def test_token_budget_takes_rows_until_one_would_exceed_it(make_table, ranked, scores, data):
    n = len(scores)
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    drop = data.draw(st.integers(0, n - 1))
    order = stable(scores, "high", [True] * n)[drop:]
    total = sum(tokens[i] for i in order)
    if total == 0:
        return
    budget = data.draw(st.integers(1, total))
    expected, used = [], 0
    for i in order:
        if used + tokens[i] > budget:
            break
        expected.append(i)
        used += tokens[i]
    table = make_table(scores, tokens=pa.array(tokens, pa.int32()))
    selector = make_selector("top", by="score", drop_top=drop)
    selection = selector.select(table, Budget("tokens", budget), rng())
    if not expected:
        assert list(selection.batches) == []
    else:
        assert ranked(selection).tolist() == expected


def test_window_slices_ascending_order_as_data_diet_does(make_table, ranked):
    scores = np.random.default_rng(1).permutation(40).astype(np.float32)
    table = make_table(scores)
    for offset in (0, 5):  # a slide begins at 0, which is not the hard end
        window = make_selector("window", by="score", offset=offset)
        selection = window.select(table, Budget("rows", 12), rng())
        assert ranked(selection).tolist() == scores.argsort()[offset : offset + 12].tolist()


def test_windows_given_as_shares_are_shares_of_all_rows(make_table, kept):
    table = make_table(np.arange(20.0), errors=[19])
    selector = make_selector("top", by="score", drop_top=0.25)
    selection = selector.select(table, Budget("fraction", 0.5), rng())
    # 5 of 20 rows dropped below the failed row 19: 18..14; then 10 of 20: 13..4
    assert kept(selection).tolist() == list(range(4, 14))


def test_a_smaller_budget_is_a_prefix_by_rank(make_table, ranked):
    scores = np.random.default_rng(2).integers(0, 5, 90)
    table = make_table(scores)
    for name in ("top", "random"):
        params = {"by": "score"} if name == "top" else {}
        orders = [
            ranked(make_selector(name, **params).select(table, Budget("rows", b), rng()))
            for b in (10, 33, 90)
        ]
        assert orders[0].tolist() == orders[1][:10].tolist() == orders[2][:10].tolist()
        assert orders[1].tolist() == orders[2][:33].tolist()


def test_ties_at_the_cut_are_recorded(make_table):
    table = make_table([3, 2, 2, 2, 1])
    top = make_selector("top", by="score")
    ties = {b: top.select(table, Budget("rows", b), rng()).params["ties"] for b in (1, 2, 4, 5)}
    assert {b: t["at_cut"] for b, t in ties.items()} == {1: 0, 2: 3, 4: 0, 5: 0}
    assert ties[1]["rule"] == "row order"
    # A row that is too long for the tokens that are left ties with none.
    long = make_table([5, 4, 3], tokens=pa.array([4, 4, 4], pa.int32()))
    assert top.select(long, Budget("tokens", 6), rng()).params["ties"]["at_cut"] == 0


def test_rows_with_errors_come_last_when_included(make_table, ranked):
    table = make_table([1, None, np.nan, 5], errors=[1])
    selector = make_selector("bottom", by="score", include_errors=True)
    assert ranked(selector.select(table, Budget("rows", 4), rng())).tolist() == [0, 3, 1, 2]


def test_carried_columns_come_along(make_table):
    table = make_table([1.0, 3.0, 2.0], id=pa.array(["a", "b", "c"]))
    for is_ranked in (True, False):
        selector = make_selector("top", by="score", carry=("id",), ranked=is_ranked)
        rows = pa.Table.from_batches(list(selector.select(table, Budget("rows", 2), rng()).batches))
        assert rows["id"].to_pylist() == ["b", "c"]
        assert rows["weight"].null_count == 2
        assert rows["rank"].to_pylist() == ([0, 1] if is_ranked else [None, None])


@FREE
@given(scores=SCORES, low=st.sampled_from([None, -2.5, 0.0, 1.0]), data=st.data())
def test_threshold_keeps_what_passes(make_table, kept, scores, low, data):
    high = data.draw(st.sampled_from([0.0, 1.0, np.inf] if low is None else [None, 0.0, 1.0]))
    passing = [
        i
        for i, s in enumerate(scores)
        if s is not None
        and not np.isnan(s)
        and (low is None or np.float32(s) >= low)
        and (high is None or np.float32(s) <= high)
    ]
    selector = make_selector("threshold", by="score", at_least=low, at_most=high)
    table = make_table(scores)
    budget = data.draw(st.integers(1, len(scores)))
    if not passing:
        with pytest.raises(ValueError, match="no row is left"):
            selector.select(table, Budget("rows", budget), rng())
        return
    assert kept(selector.select(table, Budget("fraction", 1.0), rng())).tolist() == passing
    first = "low" if low is None else "high"
    is_passing = [i in passing for i in range(len(scores))]
    best = stable(scores, first, is_passing)[:budget]
    chosen = kept(selector.select(table, Budget("rows", budget), rng()))
    assert chosen.tolist() == sorted(best.tolist())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("threshold", {"by": "score"}, "needs a limit"),
        ("threshold", {"by": "score", "at_least": float("nan")}, "cannot be NaN"),
        ("window", {"by": "score", "drop_top": 1, "offset": 1}, "give one"),
        ("window", {"by": "score", "direction": "up"}, "high or low"),
        ("keep", {"by": "score"}, "direction"),
        ("top", {"by": "score", "drop": 3}, "has no parameter 'drop'; it takes"),
        ("topp", {}, "unknown method 'topp'; choose from: balanced, bottom"),
    ],
)
def test_wrong_settings_are_one_sentence(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_selector(name, **params)


@pytest.mark.parametrize("drop", [-1, 6, 1.0, -0.5, float("nan")])
def test_dropping_everything_or_less_than_nothing_is_refused(make_table, drop):
    table = make_table([1, 2, 3, 4, 5, 6])
    selector = make_selector("top", by="score", drop_top=drop)
    with pytest.raises(ValueError, match="fewer than the 6 rows"):
        selector.select(table, Budget("rows", 1), rng())


def test_columns_that_are_missing_or_no_scores_are_named(make_table):
    table = make_table([1, 2], name=pa.array(["a", "b"]))
    with pytest.raises(ValueError, match="no column 'el2n'; it has: shard, row, score"):
        make_selector("top", by="el2n").select(table, Budget("rows", 1), rng())
    with pytest.raises(ValueError, match="'name' holds string, not scores"):
        make_selector("top", by="name").select(table, Budget("rows", 1), rng())
    with pytest.raises(ValueError, match="no column 'tokens'"):
        make_selector("top", by="score").select(table, Budget("tokens", 10), rng())


def test_budgets_beyond_the_supply(make_table, kept, caplog):
    table = make_table([1, 2, None], tokens=pa.array([5, 5, 5], pa.int32()))
    top = make_selector("top", by="score")
    assert kept(top.select(table, Budget("rows", 3), rng())).tolist() == [0, 1]
    assert "only 2 can be chosen" in caplog.text
    with pytest.raises(ValueError, match="budget of 4 rows is more than the 3 rows there are"):
        top.select(table, Budget("rows", 4), rng())
    with pytest.raises(ValueError, match="budget of 11 tokens is more than the 10 tokens"):
        top.select(table, Budget("tokens", 11), rng())
