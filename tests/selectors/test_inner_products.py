"""Inner products, sums and means of vectors that are read in blocks, against NumPy in float64."""

import numpy as np
import pytest

from curate.selectors import vectors as blocks
from curate.selectors.inner_products import inner_products, one_row, row_sum, target_mean
from curate.selectors.vectors import ArrayVectors

NAN = float("nan")


@pytest.fixture(autouse=True)
def in_small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 4)


def test_products_and_sums() -> None:
    x = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
    direction = np.linspace(-2, 3, 5)
    found = inner_products(ArrayVectors(x), direction)
    # float32 products of five terms: a few units in the last place of the largest.
    np.testing.assert_allclose(found, x.astype(np.float64) @ direction, rtol=0, atol=1e-5)
    np.testing.assert_allclose(row_sum(ArrayVectors(x)), x.sum(0, dtype=np.float64))
    assert np.array_equal(one_row(ArrayVectors(x), 7), x[7].astype(np.float64))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tiny_and_huge_gradients(scale) -> None:
    """A direction of 1e-60 is 0 in float32, one of 1e60 infinite."""
    x = np.full((5, 2), scale, dtype=np.float32)
    direction = np.array([scale, -3 * scale]) * scale
    expected = np.full(5, -2 * float(np.float32(scale)) * scale * scale)
    np.testing.assert_allclose(inner_products(ArrayVectors(x), direction), expected, rtol=1e-6)


def test_no_direction_and_no_rows() -> None:
    x = np.ones((5, 2), dtype=np.float32)
    assert inner_products(ArrayVectors(x), np.zeros(2)).tolist() == [0.0] * 5
    assert inner_products(ArrayVectors(x[:0]), np.ones(2)).shape == (0,)
    assert row_sum(ArrayVectors(x[:0])).tolist() == [0.0, 0.0]


def test_the_mean_of_a_target() -> None:
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    x[2, 0], x[5, 1] = NAN, np.inf
    finite = [0, 1, 3, 4, 6]
    expected = x[finite].astype(np.float64).mean(0)
    np.testing.assert_allclose(target_mean(ArrayVectors(x), 2), expected)
    with pytest.raises(ValueError, match="give --target-vectors"):
        target_mean(None, 2)
    with pytest.raises(ValueError, match="target's vectors have 2 dimensions, the corpus's 3"):
        target_mean(ArrayVectors(x), 3)
    with pytest.raises(ValueError, match="no row of the target has a vector"):
        target_mean(ArrayVectors(x[2:3]), 2)
