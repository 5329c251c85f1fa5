"""How much to keep, as people write it and as selectors count it.

A fraction is a fraction of all rows of the corpus, rows with errors included, and is rounded half
up: floor(f * n + 0.5) of the decimal number f that was written. A token budget is filled greedily
in the method's order and stops before the row that would exceed it.
"""

import math
import re
from fractions import Fraction
from numbers import Integral, Real

import pyarrow as pa

from curate.selectors.protocol import Budget, Table
from curate.selectors.settings import did_you_mean

_WRITTEN = "a fraction such as 0.5 or 50%, a number of rows such as 10000, or 2e9tok tokens"
_NUMBER = re.compile(r"([0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")


def parse_budget(value: float | int | str) -> Budget:
    """Return what `value` says: 0.5 and "50%" are fractions, 10000 rows, "2e9tok" tokens.

    Numbers with a decimal point are fractions ("1.0" is everything, "1" is one row).

    Raises:
        ValueError: it is none of these, zero, negative, or a fraction above 1.
    """
    if isinstance(value, str):
        return _parse_text(value.strip())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"the budget must be {_WRITTEN}; not {value!r}")
    if isinstance(value, Integral):
        return _whole("rows", float(value), value)
    return _fraction(float(value), value)


def budget_rows(budget: Budget, corpus_rows: int) -> int:
    """Return how many rows a budget in rows or as a fraction allows.

    Raises:
        ValueError: more rows than the corpus has, or none.
    """
    assert budget.kind != "tokens", "tokens are not counted in rows"
    if budget.kind == "fraction":
        rows = _half_up(budget.value, corpus_rows)
        if rows == 0:
            raise ValueError(
                f"a budget of {budget.value:g} keeps none of {corpus_rows} rows; give a larger one"
            )
        return rows
    if budget.value > corpus_rows:
        raise ValueError(
            f"a budget of {budget.value:.0f} rows is more than the {corpus_rows} rows there are"
        )
    return int(budget.value)


def share_of_rows(value: float | int, corpus_rows: int, name: str) -> int:
    """Return a count, or a share in [0, 1) of the corpus rows, as a count (rounded half up).

    Raises:
        ValueError: negative, not finite, or everything.
    """
    is_count = isinstance(value, Integral) and not isinstance(value, bool)
    rows = int(value) if is_count else None
    if rows is None and isinstance(value, Real) and 0 <= value < 1:
        rows = _half_up(value, corpus_rows)
    if rows is None or not 0 <= rows < corpus_rows:
        raise ValueError(
            f"{name} must be a share in [0, 1) or fewer than the {corpus_rows} rows there are; "
            f"not {value!r}"
        )
    return rows


def need_tokens(budget: Budget, table: Table) -> None:
    """Raise ValueError when the budget is in tokens and the table does not count them."""
    if budget.kind != "tokens" or "tokens" in table.schema.names:
        return
    raise ValueError(
        "a budget in tokens needs token counts and the score table has no column 'tokens'; "
        "give a fraction or a number of rows"
    )


def check_tokens(amount: int, supply: int) -> None:
    """Raise ValueError when a budget of `amount` tokens is more than the candidates hold."""
    if amount > supply:
        raise ValueError(
            f"a budget of {amount} tokens is more than the {supply} tokens that can be chosen"
        )


def need_columns(table: Table, columns: "frozenset[str]") -> None:
    """Raise ValueError naming a column that the table lacks."""
    for name in sorted(columns - set(table.schema.names)):
        have = table.schema.names
        raise ValueError(
            f"the score table has no column {name!r}; it has: {', '.join(have)}"
            + did_you_mean(name, have)
        )


def need_score(table: Table, column: str) -> None:
    """Raise ValueError unless the table has this column and it holds numbers."""
    need_columns(table, frozenset({column}))
    kind = table.schema.field(column).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"column {column!r} holds {kind}, not scores; choose a numeric column")


def _half_up(share: float | Real, rows: int) -> int:
    """Return a share of rows: 0.29 of 50 is 14.5, so 15, though the float 0.29 is a bit less."""
    return math.floor(Fraction(str(float(share))) * rows + Fraction(1, 2))


def _parse_text(text: str) -> Budget:
    number, unit = re.fullmatch(r"(.*?)\s*(%|tok|tokens|rows)?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if not _NUMBER.fullmatch(number.lower()):
        raise ValueError(f"cannot read budget {text!r}; write {_WRITTEN}")
    value = float(number)
    if unit == "%":
        return _fraction(float(Fraction(number) / 100), text)
    if unit in ("tok", "tokens"):
        return _whole("tokens", value, text)
    if "." in number and unit is None and "e" not in number.lower():
        return _fraction(value, text)
    if value < 1 and value > 0:  # 5e-1
        return _fraction(value, text)
    return _whole("rows", value, text)


def _fraction(value: float, said: object) -> Budget:
    if not 0 < value <= 1:
        raise ValueError(f"budget {said!r} is not a fraction in (0, 1]; write {_WRITTEN}")
    return Budget("fraction", value)


def _whole(kind: str, value: float, said: object) -> Budget:
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise ValueError(f"budget {said!r} is not a positive number of {kind}; write {_WRITTEN}")
    return Budget("tokens" if kind == "tokens" else "rows", value)
