"""Integers that sort as scores do, against NumPy's own sort."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.selectors.score_keys import UNSCORED, key_score, score_column, sort_keys

EDGES = [-math.inf, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1 + 2**-23, 3.4e38, math.inf]
SCORES = st.lists(st.floats(width=32) | st.sampled_from(EDGES), max_size=20)


@given(SCORES)
def test_keys_are_in_the_order_of_scores(values: list[float]) -> None:
    scores = np.array(values, dtype=np.float32)
    low, high = sort_keys(scores, "low"), sort_keys(scores, "high")
    real = ~np.isnan(scores)
    assert (low[~real] == UNSCORED).all() and (high[~real] == UNSCORED).all()
    for i in np.flatnonzero(real):
        assert np.array_equal(low[real] < low[i], scores[real] < scores[i])
        assert np.array_equal(high[real] < high[i], scores[real] > scores[i])
        assert key_score(int(low[i])) == scores[i]
    assert (low[real] < UNSCORED).all() and (high[real] < UNSCORED).all()
    assert low.dtype == high.dtype == np.uint32


def test_no_score_has_no_score() -> None:
    assert math.isnan(key_score(UNSCORED))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.float64(), [1e300, 0.1, None], [math.inf, np.float32(0.1), math.nan]),
        (pa.float32(), [0.1, -math.inf, None], [np.float32(0.1), -math.inf, math.nan]),
        (pa.float16(), [0.5, None, -2.0], [0.5, math.nan, -2.0]),
        (pa.int64(), [3, None, -(2**24)], [3.0, math.nan, -(2.0**24)]),
    ],
)
def test_a_column_of_any_width(kind, values, expected) -> None:
    values = [
        None if v is None else np.float16(v) if pa.types.is_float16(kind) else v for v in values
    ]
    batch = pa.record_batch({"other": [1, 2, 3], "s": pa.array(values, kind)})
    found = score_column(batch, "s")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))
