"""The fixture `sanitized` finds each of the faults that it is there for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from curate.kernels.launch import IS_INTERPRETED, jit, tl

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="watches interpreted kernels")


@jit
def _copy(p_x, p_out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + at, tl.load(p_x + at, mask=at < n, other=0.0), mask=at < n)


@jit
def _all_to_one(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(p_x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_out, tl.sum(x))


@jit
def _passed_on(p_x):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    tl.store(p_x + at + 1, tl.load(p_x + at))


@jit
def _once_too_often(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(p_out + at // 2, tl.load(p_x + at))


@jit
def _far(p_x, p_out, stride):  # type: ignore[no-untyped-def]
    tl.store(p_out, tl.load(p_x + (tl.program_id(0) + 2) * stride, mask=stride < 0, other=0.0))


@jit
def _larger(p_x, p_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(p_out + at, tl.maximum(tl.load(p_x + at), 0.0))


X = torch.arange(8.0)


def _beyond_a_view() -> None:
    _copy[(1,)](X[:7], torch.zeros(8), 8, BLOCK=8)


def _before_it() -> None:
    _copy[(1,)](X, torch.zeros(16)[9:], 8, BLOCK=8)


@pytest.mark.parametrize(
    ("fault", "call"),
    [
        ("reads beyond its tensors", _beyond_a_view),
        ("writes beyond its tensors", _before_it),
        ("reads what nobody wrote", lambda: _copy[(1,)](torch.empty(8), X.clone(), 8, BLOCK=8)),
        ("writes what another program", lambda: _all_to_one[(2,)](X, torch.zeros(1), BLOCK=4)),
        ("what another program", lambda: _passed_on[(3,)](X.clone())),
        ("writes an element twice", lambda: _once_too_often[(1,)](X, torch.zeros(8), BLOCK=8)),
        ("overflows 32 bits", lambda: _far[(1,)](X, torch.zeros(1), 1 << 30)),
        ("no such grid", lambda: _copy[(1, 1 << 16)](X, torch.zeros(8), 8, BLOCK=8)),
    ],
)
def test_a_fault_is_found(fault: str, call: Callable[[], None], sanitized: Any) -> None:
    with pytest.raises(Exception, match=fault):
        sanitized.run(call)


def test_what_is_right_passes(sanitized: Any) -> None:
    def call() -> torch.Tensor:
        out = torch.empty(7)
        _copy[(2,)](X[:7], out, 7, BLOCK=4)
        return out

    assert torch.equal(sanitized.run(call), X[:7])
    assert sanitized.launched == {"_copy"}


def test_a_maximum_drops_nan_as_on_a_gpu(sanitized: Any) -> None:
    out = torch.empty(8)
    _larger[(1,)](torch.full((8,), torch.nan), out, BLOCK=8)
    assert not out.any()
