"""Composite scores against NumPy and SciPy; malformed ones are refused at the right place."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from curate.selectors import average_ranks
from curate.selectors.composite import Composite
from curate.selectors.exact_sum import ExactSum, Moments
from curate.selectors.expression import Expression
from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector

FREE = settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rank(x):
    found = np.full(len(x), np.nan)
    there = ~np.isnan(x)
    found[there] = rankdata(x[there]) / max(1, there.sum())
    return found


def z(x):
    finite = x[np.isfinite(x)]
    if not len(finite) or finite.std() == 0:
        return np.where(np.isnan(x), np.nan, 0.0)
    return (x - finite.mean()) / finite.std()


NUMBERS = st.sampled_from(["2", "0.5", "-3", "1e-2", "+4", "7"])
COLUMNS = st.sampled_from(["a", "b", "'c-d'", '"a"'])
INNER = st.recursive(
    COLUMNS,
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(
        lambda t: "({}{}{})".format(*t)
    ),
)
LEAVES = st.one_of(
    COLUMNS,
    NUMBERS,
    st.tuples(st.sampled_from(["rank", "z"]), COLUMNS | INNER).map(lambda t: "{}( {})".format(*t)),
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.tuples(part, st.sampled_from(["+", " - ", "*", " / "]), part).map("".join),
        part.map("({})".format),
        part.map("-{}".format),
    ),
    max_leaves=6,
).filter(lambda text: any(name in text for name in ("a)", "a", "b", "c-d")) and "/ 0" not in text)


def column(batches, name):
    table = pa.Table.from_batches(batches)
    return table[name].to_numpy(zero_copy_only=False).astype(np.float64)


@FREE
@given(
    text=EXPRESSIONS,
    rows=st.lists(
        st.tuples(*[st.sampled_from([None, 0.0, 1.0, -2.5, 0.25, 1e6, 3.0])] * 3, st.booleans()),
        min_size=1,
        max_size=30,
    ),
    batch_rows=st.integers(1, 11),
)
def test_values_are_those_of_numpy(make_table, text, rows, batch_rows):
    if text in ("a", "b"):  # a column as it is; pipelines do not make it a composite
        return
    a, b, c, fails = (list(part) for part in zip(*rows, strict=True))
    errors = [i for i, failed in enumerate(fails) if failed]
    columns = {n: pa.array(v, pa.float32()) for n, v in (("a", a), ("b", b), ("c-d", c))}
    table = make_table([0.0] * len(rows), errors=errors, batch_rows=batch_rows, **columns)
    names = {
        n: np.array([np.nan if x is None else x for x in v])
        for n, v in zip("abc", (a, b, c), strict=True)
    }
    for values in names.values():
        values[errors] = np.nan
    source = text.replace("'c-d'", "c").replace('"a"', "a")
    with np.errstate(all="ignore"):
        try:
            expected = eval(source, {"rank": rank, "z": z, **names})  # the oracle
        except ZeroDivisionError:
            return
        if not isinstance(expected, np.ndarray):
            return
        expected = np.where([bool(f) for f in fails], np.nan, expected).astype(np.float32)
    composite = Composite(table, Expression(text))
    for _ in range(2):  # a second scan gives the same
        found = column(list(composite.scan(["shard", text])), text)
        finite = np.isfinite(expected)
        # z of nearly equal values divides by a small deviation; NumPy's mean is rounded.
        assert np.array_equal(np.isnan(found), np.isnan(expected))
        assert found[finite] == pytest.approx(expected[finite], rel=2e-5, abs=1e-5)


def test_ranks_are_average_ranks_and_nulls_have_none(make_table):
    table = make_table([3, None, 1, 3, 9], errors=[4])
    text = "rank(score)"
    found = column(list(Composite(table, Expression(text)).scan([text])), text)
    assert found == pytest.approx([2.5 / 3, np.nan, 1 / 3, 2.5 / 3, np.nan], nan_ok=True)


@pytest.mark.parametrize("levels", [None, 5, 1])
def test_ranks_made_on_disk_are_those_of_scipy(make_table, monkeypatch, levels):
    # Blocks of 512 rows: many buckets, single keys larger than a block, blocks of ranks.
    monkeypatch.setattr(average_ranks, "BLOCK_ROWS", 512)
    scores = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    if levels is not None:
        scores = np.floor(scores * levels) / levels if levels > 1 else scores * 0
    scores[17:4000:31] = np.nan
    table = make_table(scores, batch_rows=333)
    found = column(
        list(Composite(table, Expression("rank(score)")).scan(["rank(score)"])), "rank(score)"
    )
    assert found == pytest.approx(rank(scores.astype(float)), rel=1e-6, nan_ok=True)


def test_a_composite_is_read_once_more_than_a_score(make_table, ranked):
    values = np.random.default_rng(1).normal(size=(2, 80)).astype(np.float32)
    table = make_table(values[0], other=pa.array(values[1]))
    text = "0.7*rank(score) + 0.3*z(other)"
    composite = Composite(table, Expression(text))
    top = make_selector("top", by=text)
    chosen = ranked(top.select(composite, Budget("rows", 20), np.random.default_rng(0)))
    expected = 0.7 * rank(values[0].astype(float)) + 0.3 * z(values[1].astype(float))
    assert chosen.tolist() == np.argsort(-expected)[:20].tolist()
    assert len(table.scans) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("3 * 4", "names no column"),
        ("a +", r"cannot be read: .* at character 4"),
        ("a ** 2", r"knows \+ - \* / only at character 6"),
        ("0.5*rnk(a)", r"has no function 'rnk', only rank\(...\) and z\(...\) at character 5"),
        ("a.b(c)", "has no function 'a.b'"),
        ("rank(a, b)", "needs one column in rank"),
        ("rank()", "needs one column in rank"),
        ("rank(*a)", "needs one column in rank"),
        ("rank(3) + a", r"needs a column in rank\(...\) at character 1"),
        ("rank(z(a))", r"has z\(...\) inside rank\(...\) at character 6"),
        ("a if b else c", "takes columns, numbers"),
        ("a + [1]", "takes columns, numbers, .* at character 5"),
        ("a; b", "cannot be read"),
        ("__import__('os').system('x')", "has no function"),
        ("a + True", "has True, no finite number at character 5"),
        ("a * 1e999", "has inf, no finite number"),
        ("a + 1j", "has 1j, no finite number"),
        ("a * 1" + "0" * 400, "no finite number"),
        ("a / 0", "divides by zero at character 5"),
        ("a / -0.0", "divides by zero"),
        ("é + ü ^ a", "knows .* at character 9"),
        ("a\x00", "cannot be read"),
        ("(" * 90 + "a" + ")" * 90 + "+-" * 60 + "a", "nested more than|cannot be read"),
        ("a+" * 1500 + "a", "at most 2000 characters"),
    ],
)
def test_malformed_expressions_are_one_sentence_with_the_place(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Expression(text)
    assert "\n" not in str(caught.value)


@FREE
@given(st.text(alphabet="ab()+-*/.,'\"[]{}=<>:;@ \n\t019_rankz\\é", max_size=25))
def test_any_text_is_an_expression_or_one_sentence(text):
    try:
        Expression(text)
    except ValueError as problem:
        assert "\n" not in str(problem)


def test_unknown_and_unfit_columns_are_named(make_table):
    table = make_table([1, 2], name=pa.array(["a", "b"]))
    with pytest.raises(
        ValueError, match=r"names 'el2m', which the score table does not have .* 17$"
    ):
        Composite(table, Expression("score + 2*rank( el2m)"))
    with pytest.raises(ValueError, match="'name' holds string, not scores"):
        Composite(table, Expression("rank(name)"))


def test_the_sense_of_each_column():
    cases = {
        "a": {"a": "up"},
        "0.7*rank(a) - 0.3*z(b)": {"a": "up", "b": "down"},
        "-(a - b) / -2": {"a": "up", "b": "down"},
        "a * b": {"a": "unknown", "b": "unknown"},
        "a - a": {"a": "unknown"},
        "0*a + b": {"a": "flat", "b": "up"},
        "1 / a": {"a": "unknown"},
        "rank(a - b) + a": {"a": "up", "b": "down"},
    }
    for text, senses in cases.items():
        assert Expression(text).sense() == senses, text


@FREE
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40),
    data=st.data(),
)
def test_sums_are_exact_in_any_order(values, data):
    from fractions import Fraction

    mixed = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    total = ExactSum()
    for part in (mixed[:cut], mixed[cut:]):
        total.add(np.array(part, dtype=np.float64))
    assert total.exact() == sum(map(Fraction, values))


def test_deviations_do_not_cancel():
    # float32 values are integers of 24 bits and a power of two, so their squares are exact.
    values = (np.random.default_rng(0).normal(size=1000) + 1e6).astype(np.float32)
    moments = Moments()
    for part in np.array_split(values.astype(np.float64), 7):
        moments.add(part)
    exact = values.astype(np.longdouble)
    assert moments.std == pytest.approx(float(exact.std()), rel=1e-12)
    assert moments.mean == float(exact.mean())
