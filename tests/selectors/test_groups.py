"""random, stratified and balanced."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.selectors.apportion import apportion
from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

FREE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_random_depends_on_seed_and_row_only(make_table, kept):
    scores = np.arange(200.0)
    random = make_selector("random")

    def draw(seed=0, **how):
        return kept(random.select(make_table(scores, **how), Budget("rows", 50), rng(seed)))

    assert draw().tolist() == draw(batch_rows=1).tolist() == draw(batch_rows=200).tolist()
    assert draw().tolist() != draw(seed=1).tolist()
    # Shards in another order: the same (shard, row) pairs are kept.
    table = make_table(scores)
    table.data = table.data.take(pa.array(np.arange(200).reshape(20, 10)[::-1].ravel()))
    assert sorted(kept(random.select(table, Budget("rows", 50), rng()))) == draw().tolist()


def test_random_is_uniform_and_without_scores(make_table, kept):
    table = make_table(np.full(100, np.nan), errors=[3, 7])
    random = make_selector("random")
    counts = np.zeros(100)
    for seed in range(400):
        chosen = kept(random.select(table, Budget("rows", 49), rng(seed)))
        assert len(set(chosen.tolist())) == 49
        counts[chosen] += 1
    assert counts[3] == counts[7] == 0
    # Each of 98 rows is kept with probability 1/2: 400 draws have a standard deviation of 10.
    assert np.abs(np.delete(counts, [3, 7]) - 200).max() < 45
    pairs = np.corrcoef(np.delete(counts, [3, 7])[:-1], np.delete(counts, [3, 7])[1:])[0, 1]
    assert abs(pairs) < 0.4


@FREE
@given(
    scores=st.lists(st.sampled_from([None, -np.inf, np.inf, 0.0, 0.5, 1.0, 7.0]), min_size=2),
    strata=st.integers(1, 6),
    shares=st.sampled_from(["proportional", "equal"]),
    data=st.data(),
)
def test_strata_of_equal_width_get_their_share(make_table, kept, scores, strata, shares, data):
    values = np.array([np.nan if s is None else s for s in scores])
    scored = np.flatnonzero(~np.isnan(values))
    if not len(scored):
        return
    budget = data.draw(st.integers(1, len(scores)))
    finite = values[np.isfinite(values)]
    edges = np.linspace(finite.min(), finite.max(), strata + 1)[1:-1] if len(finite) else []
    if len(finite) and finite.min() < finite.max():
        of = np.searchsorted(edges, values, side="right")
    else:
        of = np.where(values == np.inf, strata - 1, 0)
    sizes = [int((of[scored] == s).sum()) for s in range(strata)]
    expected = apportion(budget, sizes if shares == "proportional" else [1] * strata, sizes)
    selector = make_selector("stratified", by="score", strata=strata, shares=shares)
    selection = selector.select(make_table(scores), Budget("rows", budget), rng())
    chosen = kept(selection)
    assert [int((of[chosen] == s).sum()) for s in range(strata)] == expected
    assert not np.isnan(values[chosen]).any()


def test_quantile_strata_have_equal_sizes_and_split_ties_in_row_order(make_table, kept):
    scores = np.repeat([1.0, 2.0], [70, 30])
    selector = make_selector("stratified", by="score", strata=4, edges="quantile", shares="equal")
    chosen = kept(selector.select(make_table(scores), Budget("rows", 40), rng()))
    # Ascending order is the row order here, so strata are the quarters.
    assert np.bincount(chosen // 25, minlength=4).tolist() == [10, 10, 10, 10]
    shuffled = np.random.default_rng(5).permutation(1000).astype(np.float32)
    chosen = kept(selector.select(make_table(shuffled), Budget("fraction", 0.1), rng()))
    assert np.bincount(shuffled[chosen].astype(int) // 250).tolist() == [25, 25, 25, 25]


def test_stratified_is_random_inside_a_stratum(make_table, kept):
    table = make_table(np.zeros(60))
    selector = make_selector("stratified", by="score", strata=3)
    draws = {tuple(kept(selector.select(table, Budget("rows", 20), rng(s)))) for s in range(5)}
    assert len(draws) == 5


@FREE
@given(
    groups=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=50),
    shares=st.sampled_from(["equal", "proportional"]),
    direction=st.sampled_from(["high", "low"]),
    data=st.data(),
)
def test_balanced_keeps_the_best_of_each_group(make_table, kept, groups, shares, direction, data):
    n = len(groups)
    scores = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), float)
    budget = data.draw(st.integers(1, n))
    names = sorted({str(g) if g else "null" for g in groups})
    rows = {v: [i for i, g in enumerate(groups) if (g or "null") == v] for v in names}
    sizes = [len(rows[v]) for v in names]
    amounts = apportion(budget, sizes if shares == "proportional" else [1] * len(names), sizes)
    sign = -1 if direction == "high" else 1
    expected = []
    for value, amount in zip(names, amounts, strict=True):
        expected += sorted(rows[value], key=lambda i: sign * scores[i])[:amount]
    selector = make_selector(
        "balanced", by="score", by_group="lang", direction=direction, shares=shares
    )
    table = make_table(scores, lang=pa.array(groups, pa.string()))
    selection = selector.select(table, Budget("rows", budget), rng())
    assert kept(selection).tolist() == sorted(expected)


def test_balanced_with_named_shares_token_budgets_and_class_ids(make_table, kept):
    labels = pa.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    table = make_table(np.arange(10.0), label=labels, tokens=pa.array([3] * 10, pa.int32()))
    shared = make_selector("balanced", by="score", by_group="label", shares={0: 0.25, 1: 0.75})
    assert kept(shared.select(table, Budget("rows", 4), rng())).tolist() == [3, 4, 5, 6]
    equal = make_selector("balanced", by="score", by_group="label")
    # 21 tokens: 7 for each class, which is two rows of three tokens.
    chosen = kept(equal.select(table, Budget("tokens", 21), rng()))
    assert chosen.tolist() == [2, 3, 5, 6, 8, 9]
    with pytest.raises(ValueError, match="shares names '7': no row that can be chosen has it"):
        make_selector("balanced", by_group="label", shares={"7": 1.0}).select(
            table, Budget("rows", 2), rng()
        )
    at_random = make_selector("balanced", by_group="label")
    chosen = kept(at_random.select(table, Budget("rows", 6), rng()))
    assert np.bincount(labels.to_numpy()[chosen]).tolist() == [2, 2, 2]


def test_a_column_of_ids_is_no_group_column(make_table):
    n = 10_001
    table = make_table(np.zeros(n), batch_rows=4096, id=pa.array([str(i) for i in range(n)]))
    with pytest.raises(ValueError, match="more than 10000 different values"):
        make_selector("balanced", by_group="id").select(table, Budget("rows", 1), rng())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("stratified", {"by": "score", "strata": 0}, "at least 1"),
        ("stratified", {"by": "score", "edges": "x"}, "width or quantile"),
        ("stratified", {"by": "score", "shares": "x"}, "proportional or equal"),
        ("balanced", {"by_group": "label", "shares": "x"}, "equal, proportional or a mapping"),
        ("balanced", {"by_group": "label", "shares": {"a": -1}}, "positive numbers"),
        ("balanced", {}, "by_group"),
    ],
)
def test_wrong_settings_are_one_sentence(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_selector(name, **params)
