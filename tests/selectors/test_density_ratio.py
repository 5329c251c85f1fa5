"""Density ratios by a classifier, where the true ratio is known."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.density_ratio import DensityRatio, fitted_ratio
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


def two_normals(n=4000, t=1000, shift=0.8, d=2, seed=0):
    """The log ratio of N(m, 1) to N(0, 1) is m·x - |m|²/2: a logistic regression can be exact."""
    draw = np.random.default_rng(seed)
    m = np.r_[shift, np.zeros(d - 1)]
    source, target = draw.normal(size=(n, d)), draw.normal(size=(t, d)) + m
    return np.float32(source), np.float32(target), np.exp(source @ m - shift**2 / 2)


@pytest.mark.parametrize("calibrate", [True, False])
def test_the_ratio_of_two_normal_densities_comes_back(calibrate):
    source, target, true = two_normals()
    ratio, auc = fitted_ratio(source, target, 1.0, calibrate, seed=0)
    found = ratio(source)
    # Coefficients of a fit on 5000 rows are known to about 0.04, at points of up to 3.5.
    np.testing.assert_allclose(np.log(found), np.log(true), atol=0.3)
    assert found.mean() == pytest.approx(1, abs=0.05)
    assert auc == pytest.approx(0.714, abs=0.02)  # Phi(0.8 / sqrt 2)


def test_one_distribution_twice_has_weights_near_one():
    source, target, _ = two_normals(shift=0.0, n=2000, t=500)
    ratio, auc = fitted_ratio(source, target, 1.0, True, seed=0)
    np.testing.assert_allclose(ratio(source), 1.0, atol=0.3)
    assert auc == pytest.approx(0.5, abs=0.04)


def test_calibration_tames_a_classifier_that_remembers():
    """With as many coordinates as rows any two sets are told apart; the true ratio is 1."""
    draw = np.random.default_rng(1)
    source, target = (np.float32(draw.normal(size=(60, 60))) for _ in range(2))
    sure, tamed = (fitted_ratio(source, target, 100.0, c, 0)[0](source) for c in (False, True))
    assert np.abs(np.log(sure)).mean() > 2
    assert np.abs(np.log(tamed)).mean() < 0.5


def test_units_of_the_vectors_do_not_matter():
    source, target, _ = two_normals(n=500, t=200)
    scale = np.float32([100, 0.25])
    plain, _ = fitted_ratio(source, target, 1.0, True, 0)
    scaled, _ = fitted_ratio(source * scale, target * scale, 1.0, True, 0)
    np.testing.assert_allclose(plain(source), scaled(source * scale), rtol=1e-3)


@pytest.fixture
def table(make_table):
    source, target, _ = two_normals(n=90, t=60, shift=1.5)
    source[5] = np.nan
    made = make_table(np.zeros(90), errors=[7])
    made.vectors = ArrayVectors(source)
    made.target = ArrayVectors(np.vstack([target, np.full((1, 2), np.nan)]))
    return made


def run(table, budget, **settings):
    selection = DensityRatio(**settings).select(table, budget, np.random.default_rng(0))
    found = pa.Table.from_batches(list(selection.batches))
    place = found["shard"].to_numpy() * 10 + found["row"].to_numpy()
    return place, found["weight"].to_numpy(zero_copy_only=False), selection.params


def test_weights_move_the_corpus_to_the_target(table):
    place, weight, params = run(table, Budget("fraction", 1.0))
    assert place.tolist() == [i for i in range(90) if i not in (5, 7)]
    moved = np.average(table.vectors.array[place, 0], weights=weight)
    assert moved == pytest.approx(np.nanmean(table.target.array[:, 0]), abs=0.4)
    assert params["weight_kind"] == "loss" and params["auc"] > 0.75
    assert params["mean_ratio"] == pytest.approx(weight.mean(), rel=1e-6)


def test_a_smaller_budget_keeps_rows_with_the_same_weights(table):
    all_rows, all_weights, _ = run(table, Budget("fraction", 1.0))
    place, weight, _ = run(table, Budget("rows", 30))
    assert len(place) == 30
    assert weight.tolist() == [all_weights[all_rows.tolist().index(i)] for i in place]


def test_rows_beyond_the_sample_are_weighed_too(table):
    place, weight, _ = run(table, Budget("fraction", 1.0), sample=40)
    assert len(place) == 88 and (weight > 0).all()
    again = run(table, Budget("fraction", 1.0), sample=40)
    assert weight.tolist() == again[1].tolist()


def test_wrong_settings_and_tiny_sets_are_refused(table):
    with pytest.raises(ValueError, match="C must be"):
        DensityRatio(C=0)
    with pytest.raises(ValueError, match="sample must be"):
        DensityRatio(sample=3)
    table.target = ArrayVectors(np.ones((3, 2)))
    with pytest.raises(ValueError, match="needs 5 of each"):
        run(table, Budget("rows", 5))
