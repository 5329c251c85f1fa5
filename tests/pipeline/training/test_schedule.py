"""Lengths, rates and save points of a training."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.pipeline.training.schedule import Length, Rate, save_points, training_length


@given(st.integers(1, 500), st.integers(1, 64))
def test_steps_cover_the_stream_once_in_order(presentations, batch):
    length = Length(presentations, batch)
    bounds = [length.bounds(s) for s in range(1, length.steps + 1)]
    assert [b for a, b in bounds] == [a for a, b in bounds[1:]] + [presentations]
    assert bounds[0][0] == 0
    assert all(b - a == batch for a, b in bounds[:-1])


@given(st.integers(2, 500), st.integers(2, 64))
def test_no_step_has_a_single_row(presentations, batch):
    length = Length(presentations, batch)
    sizes = [b - a for a, b in map(length.bounds, range(1, length.steps + 1))]
    assert min(sizes) > 1
    assert max(sizes) <= batch + 1


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 6))
def test_equal_steps_present_equally_many_rows(selected, extra, batch, epochs):
    rows = selected + extra
    whole = training_length(rows, rows, batch=batch, epochs=epochs)
    part = training_length(selected, rows, batch=batch, epochs=epochs)
    assert part == whole
    assert whole.presentations == epochs * rows
    by_epochs = training_length(selected, rows, batch=batch, epochs=epochs, match="epochs")
    assert by_epochs.presentations == epochs * selected


def test_given_steps_override_epochs():
    length = training_length(10, 100, batch=8, epochs=3, steps=7)
    assert (length.steps, length.presentations) == (7, 56)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_rates_warm_up_then_follow_the_cosine(steps):
    rate = Rate(2.0, "cosine", steps, 0.1)
    warm = min(round(0.1 * steps), steps - 1)
    rates = np.array([rate(s) for s in range(1, steps + 1)])
    assert (rates > 0).all() and rates.max() == 2.0
    assert (np.diff(rates[: warm + 1]) > 0).all()
    assert (np.diff(rates[warm:]) < 0).all()
    for s in range(warm + 1, steps + 1):
        share = (s - 1 - warm) / (steps - warm)
        assert rates[s - 1] == pytest.approx(2.0 * math.cos(math.pi * share / 2) ** 2)


def test_constant_rates_stay():
    rate = Rate(0.5, "constant", 10, 0.0)
    assert {rate(s) for s in range(1, 11)} == {0.5}


def names(points):
    return [p.folder(3) for p in points]


def test_epochs_are_saved_where_they_end():
    length = Length(5 * 100, 32)
    points = save_points(length, 100, epochs=[0, 1, 5])
    assert names(points) == ["seed3-epoch000", "seed3-epoch001", "seed3-epoch005"]
    assert [p.step for p in points] == [0, 4, 16]
    assert [length.rows_seen(p.step) for p in points] == [0, 128, 500]


def test_the_end_is_always_saved():
    assert names(save_points(Length(500, 32), 100, epochs=[1]))[-1] == "seed3-epoch005"
    assert names(save_points(Length(500, 32), 100, steps=[2]))[-1] == "seed3-step000016"
    assert names(save_points(Length(70, 7), 100)) == [
        "seed3-step000002",
        "seed3-step000005",
        "seed3-step000010",
    ]


def test_points_by_default():
    assert [p.epoch for p in save_points(Length(1000, 10), 100)] == [2, 5, 10]
    assert [p.epoch for p in save_points(Length(100, 10), 100)] == [1]


@pytest.mark.parametrize("given_", [{"epochs": [6]}, {"epochs": [-1]}, {"steps": [17]}])
def test_points_outside_are_refused(given_):
    with pytest.raises(ValueError, match="cannot save a checkpoint at"):
        save_points(Length(500, 32), 100, **given_)
