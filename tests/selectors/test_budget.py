import numpy as np
import pytest

from curate.selectors.budget import budget_rows, parse_budget, share_of_rows
from curate.selectors.protocol import Budget


@pytest.mark.parametrize(
    ("said", "kind", "value"),
    [
        (0.5, "fraction", 0.5),
        (1.0, "fraction", 1.0),
        ("0.5", "fraction", 0.5),
        (".25", "fraction", 0.25),
        ("1.0", "fraction", 1.0),
        ("50%", "fraction", 0.5),
        ("12.5 %", "fraction", 0.125),
        ("100%", "fraction", 1.0),
        ("0.7%", "fraction", 0.007),  # a digit more than 0.7 / 100 in floats
        (np.float32(0.25), "fraction", 0.25),
        (1, "rows", 1),
        ("1", "rows", 1),
        ("10000", "rows", 10000),
        ("10_000 rows", "rows", 10000),
        ("1e4", "rows", 10000),
        (np.int64(7), "rows", 7),
        ("2e9tok", "tokens", 2_000_000_000),
        ("1.5e3 tokens", "tokens", 1500),
        ("300tok", "tokens", 300),
    ],
)
def test_budgets_are_read_as_written(said, kind, value):
    assert parse_budget(said) == Budget(kind, value)


@pytest.mark.parametrize(
    "said",
    [
        *(0, 0.0, -1, -0.5, 1.5, float("nan"), float("inf"), True, None, [1]),
        *("1.5", "0", "0%", "150%", "-3", "half", "", "tok", "0tok", "1.5rows"),
        *("nan", "inf", "1e-3tok", "0.5.5", "5 apples", "1__0", "1_%"),
    ],
)
def test_impossible_budgets_are_refused(said):
    with pytest.raises(ValueError, match=r"(write|must be) a fraction such as|write a fraction"):
        parse_budget(said)


@pytest.mark.parametrize(
    ("fraction", "rows", "kept"),
    # 0.29 * 50 and 0.57 * 50 are 14.5 and 28.5, which floats take for a little less.
    [
        *((0.5, 5, 3), (0.5, 4, 2), (0.25, 10, 3), (1.0, 7, 7), (0.1, 5, 1)),
        *((0.29, 50, 15), (0.57, 50, 29)),
    ],
)
def test_fractions_round_half_up(fraction, rows, kept):
    assert budget_rows(Budget("fraction", fraction), rows) == kept


def test_budgets_that_keep_nothing_or_too_much():
    with pytest.raises(ValueError, match="keeps none of 10 rows"):
        budget_rows(Budget("fraction", 0.01), 10)
    with pytest.raises(ValueError, match="budget of 11 rows is more than the 10 rows there are"):
        budget_rows(Budget("rows", 11), 10)


def test_shares_and_counts_to_drop():
    assert [share_of_rows(v, 10, "drop_top") for v in (0, 3, 0.25, 0.0)] == [0, 3, 3, 0]
    assert share_of_rows(0.29, 50, "drop_top") == 15
    for wrong in (10, -1, 1.0, True):
        with pytest.raises(ValueError, match="drop_top"):
            share_of_rows(wrong, 10, "drop_top")
