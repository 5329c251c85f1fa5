"""importance, softmax, gumbel and pa_da: what is drawn, how often, and that nothing is biased."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector
from curate.selectors.softmax import softmax_weights, switched_tau

SCORES = np.array([0.1, 0.2, 0.2, 0.5, 1.0, 1.5, 3.0, 4.5], dtype=np.float32)
X = np.array([3.0, -1.0, 2.0, 5.0, 0.5, -2.0, 1.0, 4.0])


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(selection, n):
    """Return the weight of each of n rows, 0 where it is not selected."""
    weights = np.zeros(n)
    for batch in selection.batches:
        place = batch["shard"].to_numpy().astype(np.int64) * 10 + batch["row"].to_numpy()
        weights[place] = 1 if batch["weight"].null_count else batch["weight"].to_numpy()
    return weights


def draws(make_table, name, budget, seeds, **params):
    """Return the weights of the 8 rows for each seed."""
    table = make_table(SCORES)
    selector = make_selector(name, by="score", **params)
    return np.array([drawn(selector.select(table, budget, rng(s)), 8) for s in range(seeds)])


def replicas(make_table, name, n, times, **params):
    """Return the weights of 8 rows in `times` independent draws of n: each is a group of one table.

    Thousands of draws for the price of one; budgets of groups are cut at thresholds of their own.
    """
    group = pa.array(np.repeat(np.arange(times), 8))
    table = make_table(np.tile(SCORES, times), batch_rows=4096, group=group)
    params = {"by": "score", "by_group": "group", "group_shares": "equal", **params}
    selection = make_selector(name, **params).select(table, Budget("rows", n * times), rng())
    return drawn(selection, 8 * times).reshape(times, 8)


def within(samples, truth, deviations=4.5):
    """True if the mean of the samples is the truth within so many standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    return (np.abs(samples.mean(0) - truth) <= deviations * error + 1e-9).all()


def successive(p, k):
    """P(row is among k draws without replacement), by enumerating the orders."""
    if k == 0:
        return np.zeros(len(p))
    total = np.zeros(len(p))
    for i in np.flatnonzero(p):
        rest = p.copy()
        rest[i] = 0
        inner = successive(rest / rest.sum(), k - 1) if rest.any() else 0
        total += p[i] * inner
        total[i] += p[i]
    return total


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_without_replacement_rows_come_as_often_as_successive_draws(make_table, mix):
    weights = replicas(make_table, "importance", 3, 4000, mix=mix, unbiased=False)
    p = (1 - mix) * SCORES.astype(float) / SCORES.sum() + mix / 8
    assert (weights.sum(1) == 3).all()
    assert within(weights, successive(p, 3))


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_weighted_means_are_unbiased(make_table, mix):
    # Every row's expected weight is n / N, so the mean of any x is estimated without bias.
    weights = replicas(make_table, "importance", 3, 8000, mix=mix)
    assert within(weights, np.full(8, 3 / 8))
    assert within(weights @ X / 3, X.mean())


@pytest.mark.parametrize("replacement", [False, True])
def test_weighted_means_are_unbiased_over_seeds(make_table, replacement):
    params = {"mix": 0.3, "replacement": replacement}
    weights = draws(make_table, "importance", Budget("rows", 3), 200, **params)
    assert within(weights, np.full(8, 3 / 8))
    assert within(weights @ X / 3, X.mean())


def test_weights_of_drawing_in_proportion_have_the_least_variance(make_table):
    # Drawn with p proportional to x, each draw's x / (N p) is the mean itself.
    table = make_table(SCORES)
    exact = make_selector("importance", by="score", replacement=True)
    for seed in range(20):
        weights = drawn(exact.select(table, Budget("rows", 5), rng(seed)), 8)
        assert weights @ SCORES / 5 == pytest.approx(SCORES.mean(), rel=1e-5)
    uniform = draws(make_table, "importance", Budget("rows", 5), 200, mix=1.0, replacement=True)
    # Of a single uniform draw the variance is the mean square less the squared mean; that of 200
    # samples of it deviates by about sqrt(2/200) = 10 %.
    assert np.var(uniform @ SCORES / 5) * 5 == pytest.approx(SCORES.astype(float).var(), rel=0.45)


def test_draws_with_replacement_are_multinomial(make_table):
    counts = draws(
        make_table, "importance", Budget("rows", 6), 200, replacement=True, unbiased=False
    )
    assert (counts.sum(1) == 6).all()
    p = SCORES.astype(float) / SCORES.sum()
    assert within(counts, 6 * p)
    centred = counts - 6 * p
    products = centred[:, :, None] * centred[:, None, :]
    assert within(products.reshape(200, -1), (6 * (np.diag(p) - np.outer(p, p))).ravel())


def test_a_row_that_takes_nearly_all_draws_is_counted_exactly(make_table, kept):
    scores = np.full(3000, 1e-6, dtype=np.float32)
    scores[1234] = 100.0
    table = make_table(scores, batch_rows=701)
    selector = make_selector("importance", by="score", replacement=True, unbiased=False)
    weights = drawn(selector.select(table, Budget("rows", 2999), rng()), 3000)
    assert weights.sum() == 2999
    assert weights[1234] > 2990


def test_drawing_everything_weighs_evenly(make_table):
    weights = draws(make_table, "importance", Budget("rows", 8), 3)
    assert (weights == 1).all()


def test_smaller_draws_are_the_first_ranks_of_larger_ones(make_table, ranked):
    table = make_table(np.arange(1.0, 91.0))
    for name in ("importance", "softmax", "gumbel"):
        orders = [
            ranked(make_selector(name, by="score").select(table, Budget("rows", b), rng(5)))
            for b in (10, 40, 90)
        ]
        assert orders[0].tolist() == orders[2][:10].tolist(), name
        assert orders[1].tolist() == orders[2][:40].tolist(), name


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("importance", {"mix": 0.1}),
        ("importance", {"mix": 0.1, "replacement": True}),
        ("softmax", {"tau": -1.0}),
        ("softmax", {"use": "weight"}),
        ("gumbel", {"unbiased": True}),
        ("pa_da", {}),
    ],
)
def test_the_order_of_the_table_and_its_batches_change_nothing(make_table, name, params):
    scores = rng(1).gamma(0.5, size=200).astype(np.float32)
    selector = make_selector(name, by="score", **params)
    table = make_table(scores)
    first = drawn(selector.select(table, Budget("rows", 60), rng(2)), 200)
    for batch_rows in (1, 64, 200):
        table.batch_rows = batch_rows
        assert np.array_equal(drawn(selector.select(table, Budget("rows", 60), rng(2)), 200), first)
    table.data = table.data.take(pa.array(rng(3).permutation(200)))
    assert np.array_equal(drawn(selector.select(table, Budget("rows", 60), rng(2)), 200), first)
    assert not np.array_equal(drawn(selector.select(table, Budget("rows", 60), rng(9)), 200), first)


def test_budgets_of_groups_are_met_and_unbiased(make_table):
    # Groups of 3 and 5 rows, each of a half of the budget: 2 rows each.
    times = 3000
    label = pa.array([f"{i}{c}" for i in range(times) for c in "aaabbbbb"])
    table = make_table(np.tile(SCORES, times), batch_rows=4096, label=label)
    selector = make_selector("importance", by="score", by_group="label", group_shares="equal")
    selection = selector.select(table, Budget("rows", 4 * times), rng())
    weights = drawn(selection, 8 * times).reshape(times, 8)
    assert ((weights[:, :3] > 0).sum(1) == 2).all() and ((weights[:, 3:] > 0).sum(1) == 2).all()
    assert within(weights @ X / 4, X.mean())


def test_token_budgets_are_unbiased_too(make_table):
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    table = make_table(SCORES, tokens=pa.array(tokens, pa.int32()))
    selector = make_selector("importance", by="score", mix=0.2)
    found = []
    for seed in range(200):
        weights = drawn(selector.select(table, Budget("tokens", 14), rng(seed)), 8)
        assert tokens[weights > 0].sum() <= 14
        found.append(weights * tokens.sum() / 14)  # w = budget / supply / P
    assert within(np.array(found), np.ones(8))


def test_softmax_draws_with_the_gumbel_probabilities(make_table):
    for tau in (-1.0, 0.0, 2.0):
        weights = replicas(make_table, "softmax", 2, 4000, tau=tau)
        p = softmax_weights(SCORES.astype(float), tau)
        assert within(weights, successive(p, 2)), tau
    weights = replicas(make_table, "gumbel", 2, 4000, tau=0.5)
    p = np.exp(0.5 * SCORES.astype(float))
    assert within(weights, successive(p / p.sum(), 2))


def test_dsir_with_equal_ratios_is_a_uniform_sample(make_table):
    table = make_table(np.zeros(4000), batch_rows=4096)
    gumbel = make_selector("gumbel", by="score")
    counts = sum(drawn(gumbel.select(table, Budget("rows", 1000), rng(s)), 4000) for s in range(40))
    # Binomial(40, 1/4) each: mean 10 by construction, variance 7.5, of 4000 rows within 4.5 errors.
    assert counts.mean() == 10
    assert counts.var() == pytest.approx(7.5, rel=4.5 * (2 / 4000) ** 0.5)


def test_presence_weights_are_those_of_the_card(make_table):
    s = np.array([1.0, 2.0, 4.0])
    assert softmax_weights(s, 1.0) == pytest.approx([0.0699, 0.1558, 0.7743], abs=5e-5)
    assert softmax_weights(s, -1.0) == pytest.approx([0.6499, 0.2915, 0.0586], abs=5e-5)
    assert softmax_weights(-s, -1.0) == pytest.approx(softmax_weights(s, 1.0))
    assert softmax_weights(3 * s + 7, 0.7) == pytest.approx(softmax_weights(s, 0.7))
    assert softmax_weights(s, 0.0) == pytest.approx([1 / 3] * 3)
    assert softmax_weights(np.ones(4), 1.0) == pytest.approx([0.25] * 4)
    assert [switched_tau(step, 10) for step in (1, 10, 11)] == [1.0, 1.0, -1.0]
    for params, tau in (({}, 1.0), ({"tau": -1.0}, -1.0), ({"temperature": 0.5}, 2.0)):
        selector = make_selector("softmax", by="score", use="weight", **params)
        weights = drawn(selector.select(make_table(s), Budget("fraction", 1.0), rng()), 3)
        assert weights / weights.sum() == pytest.approx(softmax_weights(s, tau), rel=1e-6)


def test_softmax_of_a_far_outlier_does_not_overflow(make_table):
    scores = np.zeros(2000)
    scores[0] = 1.0
    selector = make_selector("softmax", by="score", use="weight", tau=50.0)
    weights = drawn(selector.select(make_table(scores), Budget("fraction", 1.0), rng()), 2000)
    assert np.isfinite(weights).all() and weights[0] > 1e30 * weights[1]


def test_pa_da_repeats_rows_in_proportion(make_table):
    counts = draws(make_table, "pa_da", Budget("rows", 8), 150, tau=0.6)
    assert (counts.sum(1) == 8).all()
    assert within(counts, 8 * (0.6 * SCORES.astype(float) / SCORES.sum() + 0.4 / 8))
    weights = draws(make_table, "pa_da", Budget("rows", 8), 150, tau=0.6, unbiased=True)
    assert within(weights @ X / 8, X.mean())


def test_kinds_of_weights_are_said(make_table):
    kinds = {
        ("importance", ()): "loss",
        ("importance", (("replacement", True),)): "loss",
        ("importance", (("replacement", True), ("unbiased", False))): "repeat",
        ("importance", (("unbiased", False),)): None,
        ("softmax", ()): None,
        ("softmax", (("use", "weight"),)): "loss",
        ("gumbel", ()): None,
        ("pa_da", ()): "repeat",
        ("pa_da", (("unbiased", True),)): "loss",
    }
    for (name, params), kind in kinds.items():
        selector = make_selector(name, by="score", **dict(params))
        selection = selector.select(make_table(SCORES), Budget("rows", 4), rng())
        assert selection.params.get("weight_kind") == kind


def test_zero_scores_are_never_drawn_and_said(make_table, caplog):
    table = make_table([0.0, 1.0, 0.0, 2.0])
    importance = make_selector("importance", by="score")
    weights = drawn(importance.select(table, Budget("rows", 2), rng()), 4)
    assert weights.tolist() == [0, 0.5, 0, 0.5]  # the mean of 4 rows, 2 of which count as 0
    assert "2 rows have score 0" in caplog.text
    mixed = make_selector("importance", by="score", mix=0.5)
    assert (drawn(mixed.select(table, Budget("rows", 4), rng()), 4) == 1).all()


@pytest.mark.parametrize(
    ("scores", "name", "message"),
    [
        ([1.0, -0.5, 2.0], "importance", "row 1 of shard 0 is -0.5; .* finite and at least 0"),
        ([1.0, 2.0, np.inf], "importance", "row 2 of shard 0 is inf"),
        ([np.nan, 2.0, 1.0], "pa_da", "row 0 of shard 0 is nan"),
        ([0.0, 0.0, 0.0], "importance", "all scores of 'score' are 0"),
        ([1.0, -np.inf, 2.0], "gumbel", "row 1 of shard 0 is -inf; .*scores must be finite"),
        ([1.0, np.inf, 2.0], "softmax", "row 1 of shard 0 is inf"),
        ([None, None, None], "softmax", "no row is left to choose"),
    ],
)
def test_scores_that_are_no_rates_are_refused(make_table, scores, name, message):
    selector = make_selector(name, by="score")
    with pytest.raises(ValueError, match=message):
        selector.select(make_table(scores), Budget("rows", 1), rng())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("importance", {"mix": 1.5}, r"mix must be a share in \[0, 1\]"),
        ("importance", {"mix": float("nan")}, "mix must be a share"),
        ("pa_da", {"tau": -0.1}, "tau must be a share"),
        ("gumbel", {"tau": float("inf")}, "tau must be a finite number"),
        ("softmax", {"tau": 1.0, "temperature": 1.0}, "give one of the two"),
        ("softmax", {"temperature": 0.0}, "must not be 0"),
        ("softmax", {"use": "x"}, "draw or weight"),
        ("softmax", {"use": "weight", "unbiased": True}, "choose one"),
    ],
)
def test_wrong_settings_are_one_sentence(name, params, message):
    with pytest.raises(ValueError, match=message):
        make_selector(name, by="score", **params)


def test_draws_with_replacement_refuse_groups_and_tokens(make_table):
    table = make_table(SCORES, tokens=pa.array([1] * 8, pa.int32()), label=pa.array([0] * 8))
    again = make_selector("importance", by="score", replacement=True)
    with pytest.raises(ValueError, match="counted in rows, not in tokens"):
        again.select(table, Budget("tokens", 3), rng())
    grouped = make_selector("pa_da", by="score", by_group="label")
    with pytest.raises(ValueError, match="no budgets of groups"):
        grouped.select(table, Budget("rows", 3), rng())
