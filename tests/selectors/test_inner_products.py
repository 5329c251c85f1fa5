"""Inner products: each row's own rounding wherever it is, and no copy of most rows of others."""

import numpy as np
import pytest

from curate.selectors.inner_products import inner_products
from curate.selectors.vectors import ArrayVectors, PartOfVectors


@pytest.mark.parametrize("d", [1, 5, 64, 257, 1000])
def test_equal_rows_have_equal_products_wherever_they_are(d):
    """A matrix product rounds the last rows of a block its own way, and so breaks ties by place."""
    draw = np.random.default_rng(d)
    row, direction = draw.normal(size=d).astype(np.float32), draw.normal(size=d)
    found = [
        inner_products(ArrayVectors(np.tile(row, (n, 1))), direction) for n in (1, 7, 4096, 4099)
    ]
    assert len(np.unique(np.concatenate(found))) == 1
    # Float32 products of d terms: d 2^-24 of the product of the lengths, at most.
    bound = d * 2.0**-24 * np.linalg.norm(row) * np.linalg.norm(direction)
    assert abs(found[0][0] - row.astype(np.float64) @ direction) <= bound + 1e-6


@pytest.mark.parametrize("share", [0.9, 0.1])
def test_rows_of_others_have_the_products_they_have_alone(share):
    draw = np.random.default_rng(1)
    array = draw.normal(size=(5000, 33)).astype(np.float32)
    places = np.flatnonzero(draw.random(5000) < share)
    others = np.setdiff1d(np.arange(5000), places)
    array[others[:3]] = np.array([np.nan, np.inf, 3e38])[:, None]
    direction = draw.normal(size=33)
    found = inner_products(PartOfVectors(ArrayVectors(array), places), direction)
    assert np.array_equal(found, inner_products(ArrayVectors(array[places]), direction))
