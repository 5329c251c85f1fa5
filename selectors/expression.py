"""Scores made of columns: "0.7*rank(el2n) + 0.3*rank(grad_similarity)".

Columns, numbers, + - * / and parentheses, `rank(...)` and `z(...)`. A column whose name is no
Python identifier goes in quotes: rank("el2n-late"). The text is parsed by Python's `ast` and only
these forms are accepted; nothing is ever executed.
"""

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

FUNCTIONS = ("rank", "z")
MAX_LENGTH, MAX_DEPTH = 2000, 40

Column = Float64[ndarray, " n"]
Sense = Literal["up", "down", "flat", "unknown"]

_OPERATORS: dict[type[ast.operator], Callable[[Column, Column], Column]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}


@dataclass(frozen=True)
class Call:
    """A part of an expression that looks at all rows: `rank` or `z` of an inner expression."""

    name: Literal["rank", "z"]
    node: ast.expr

    @property
    def text(self) -> str:
        return ast.unparse(self.node)


class Expression:
    """A parsed expression over columns.

    Raises:
        ValueError: it is not one; the message says at which character and why.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: dict[str, int] = {}
        """The columns it names, in order, and at which character (from 1) each stands first."""
        self.calls: list[Call] = []
        """What is asked of all rows, each once, in order of appearance."""
        # Newlines become spaces, so that every place is a column of one line.
        self._line = " ".join(text.splitlines())
        self._root = self._parse()
        self._check(self._root, depth=0, inside=None)
        if not self.columns:
            raise self._problem("names no column of the table", None)

    def values(
        self, columns: Mapping[str, Column], calls: Mapping[str, Column]
    ) -> Float64[ndarray, " n"]:
        """Return its value for every row; NaN where a column is NaN or 0 is divided by 0.

        `calls` holds the values of each of `self.calls` by its text.
        """
        return self._value(self._root, columns, calls)

    def inner(self, call: Call, columns: Mapping[str, Column]) -> Float64[ndarray, " n"]:
        """Return what `rank` or `z` is taken of, for every row."""
        assert isinstance(call.node, ast.Call)
        return self._value(call.node.args[0], columns, {})

    def sense(self) -> dict[str, Sense]:
        """Return whether the expression surely rises or falls with each of its columns."""
        return _sense(self._root)

    def unknown_column(self, name: str, known: list[str]) -> ValueError:
        """Return the error of a column that the table lacks."""
        says = f"names {name!r}, which the score table does not have (it has: {', '.join(known)})"
        return self._problem(says, self.columns[name])

    def _parse(self) -> ast.expr:
        if len(self._line) > MAX_LENGTH:
            raise ValueError(f"a score expression has at most {MAX_LENGTH} characters")
        stripped = self._line.strip()
        if not stripped:
            raise ValueError("the score expression is empty; write a column or rank(column)")
        self._indent = len(self._line) - len(self._line.lstrip())
        try:
            return ast.parse(stripped, mode="eval").body
        except SyntaxError as error:
            # Python says 0 where the text ends too early.
            at = min(error.offset or len(stripped) + 1, len(stripped) + 1) + self._indent
            reason = str(error.msg).partition(". ")[0]
            raise self._problem(f"cannot be read: {reason}", at) from None
        except (ValueError, RecursionError, MemoryError):
            raise self._problem("cannot be read", None) from None

    def _check(self, node: ast.expr, depth: int, inside: str | None) -> None:
        if depth > MAX_DEPTH:
            raise self._problem(f"is nested more than {MAX_DEPTH} deep", self._place(node))
        match node:
            case ast.BinOp(left=left, op=op, right=right):
                if type(op) not in _OPERATORS:
                    raise self._problem("knows + - * / only", self._place(right))
                if isinstance(op, ast.Div) and _constant(right) == 0:
                    raise self._problem("divides by zero", self._place(right))
                self._check(left, depth + 1, inside)
                self._check(right, depth + 1, inside)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                self._check(operand, depth + 1, inside)
            case ast.Call():
                self._check_call(node, depth, inside)
            case ast.Name(id=name):
                self.columns.setdefault(name, self._place(node))
            case ast.Constant(value=str(name)):
                self.columns.setdefault(name, self._place(node))
            case ast.Constant(value=value):
                if _constant(node) is None:
                    raise self._problem(f"has {value!r}, no finite number", self._place(node))
            case _:
                raise self._problem(
                    "takes columns, numbers, + - * /, rank(...) and z(...) only", self._place(node)
                )

    def _check_call(self, node: ast.Call, depth: int, inside: str | None) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS:
            raise self._problem(
                f"has no function {name!r}, only rank(...) and z(...)", self._place(node)
            )
        if inside is not None:
            raise self._problem(f"has {name}(...) inside {inside}(...)", self._place(node))
        if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
            raise self._problem(f"needs one column in {name}(...)", self._place(node))
        before = len(self.columns)
        self._check(node.args[0], depth + 1, inside=name)
        if len(self.columns) == before and not _columns(node):
            raise self._problem(f"needs a column in {name}(...)", self._place(node))
        call = Call("rank" if name == "rank" else "z", node)
        if call.text not in [known.text for known in self.calls]:
            self.calls.append(call)

    def _value(
        self, node: ast.expr, columns: Mapping[str, Column], calls: Mapping[str, Column]
    ) -> Column:
        with np.errstate(all="ignore"):
            match node:
                case ast.BinOp(left=left, op=op, right=right):
                    operands = (self._value(side, columns, calls) for side in (left, right))
                    return np.asarray(_OPERATORS[type(op)](*operands))
                case ast.UnaryOp(op=op, operand=operand):
                    value = self._value(operand, columns, calls)
                    return np.asarray(-value if isinstance(op, ast.USub) else value)
                case ast.Name(id=name) | ast.Constant(value=str(name)):
                    return columns[name]
                case ast.Call():
                    return calls[ast.unparse(node)]
                case ast.Constant():
                    number = _constant(node)
                    assert number is not None, "constants are checked"
                    rows = len(next(iter(columns.values())))
                    return np.full(rows, number)
        raise AssertionError(f"unchecked part {ast.dump(node)}")

    def _place(self, node: ast.expr) -> int:
        """Return the character, from 1, at which a part stands (ast counts bytes)."""
        line = self._line[self._indent :].encode()
        return len(line[: node.col_offset].decode()) + self._indent + 1

    def _problem(self, says: str, at: int | None) -> ValueError:
        place = "" if at is None else f" at character {at}"
        return ValueError(f"the score expression {self.text!r} {says}{place}")


def _constant(node: ast.expr) -> float | None:
    """Return the number that a part is, None where it is none (or one that is not finite)."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        inner = _constant(node.operand)
        return None if inner is None else (-inner if isinstance(node.op, ast.USub) else inner)
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
        return None
    if not isinstance(node.value, int | float):
        return None
    try:
        number = float(node.value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _columns(node: ast.expr) -> set[str]:
    """Return the columns that a part names."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in FUNCTIONS:
            found.add(part.id)
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return found


def _sense(node: ast.expr) -> dict[str, Sense]:
    match node:
        case ast.Name(id=name) | ast.Constant(value=str(name)):
            return {name: "up"}
        case ast.Call(args=[inner]):
            return _sense(inner)
        case ast.UnaryOp(op=op, operand=operand):
            return _times(_sense(operand), -1 if isinstance(op, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right):
            if isinstance(op, ast.Add | ast.Sub):
                sign = -1 if isinstance(op, ast.Sub) else 1
                return _both(_sense(left), _times(_sense(right), sign))
            if (factor := _constant(right)) is not None:
                return _times(_sense(left), factor)
            if isinstance(op, ast.Mult) and (factor := _constant(left)) is not None:
                return _times(_sense(right), factor)
            return dict.fromkeys(_columns(node), "unknown")
    return {}


def _times(senses: dict[str, Sense], factor: float) -> dict[str, Sense]:
    turned: dict[Sense, Sense] = {"up": "down", "down": "up"}
    if factor == 0:
        return dict.fromkeys(senses, "flat")
    return {n: turned.get(s, s) if factor < 0 else s for n, s in senses.items()}


def _both(one: dict[str, Sense], two: dict[str, Sense]) -> dict[str, Sense]:
    found = {**one}
    for name, sense in two.items():
        other = found.get(name, "flat")
        if other in ("flat", sense):
            found[name] = sense
        elif sense != "flat":
            found[name] = "unknown"
    return found
