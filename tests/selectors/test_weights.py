"""Kinds of weights, conversions, clipping."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.selectors import weights as weights_module
from curate.selectors.protocol import SELECTION_SCHEMA
from curate.selectors.weights import Weighting

FREE = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def batches(weights, size=3):
    n = len(weights)
    table = pa.table(
        [np.zeros(n, np.int32), np.arange(n), weights, pa.nulls(n, pa.int32())],
        schema=SELECTION_SCHEMA,
    )
    return table.to_batches(max_chunksize=size)


def written(weighting):
    table = pa.Table.from_batches(list(weighting))
    assert table["row"].to_pylist() == list(range(len(table)))
    return table["weight"].to_numpy()


WEIGHTS = st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=40).filter(
    lambda w: max(w) > 1e-3
)


@FREE
@given(weights=WEIGHTS, made=st.sampled_from(["loss", "sampling", "repeat"]))
def test_loss_and_sampling_weights_have_mean_one(tmp_path, weights, made):
    for asked in ("loss", "sampling"):
        weighting = Weighting(batches(weights), made, tmp_path, asked)
        found = written(weighting)
        raw = np.array(weights)
        assert found == pytest.approx(raw / raw.mean(), rel=1e-6, abs=1e-30)
        assert weighting.kind == asked
        effective = raw.sum() ** 2 / (raw**2).sum()
        assert weighting.report["effective_rows"] == pytest.approx(effective, rel=1e-5)
        if made != "repeat":
            assert weighting.report["scale"] == pytest.approx(raw.mean(), rel=1e-6)


@FREE
@given(weights=WEIGHTS, clip=st.floats(1.05, 20))
def test_clipped_weights_have_mean_one_and_their_largest_at_the_clip(tmp_path, weights, clip):
    raw = np.array(weights, dtype=np.float32).astype(float)
    if (raw > 0).mean() * clip <= 1.001:
        return  # most rows weigh nothing; refused, see below
    weighting = Weighting(batches(weights), "loss", tmp_path, clip=clip)
    found, report = written(weighting), weighting.report
    assert found.mean() == pytest.approx(1, rel=1e-5)
    assert found.max() <= clip * (1 + 1e-5)
    if raw.max() <= clip * raw.mean():
        assert report["clip"] == {"largest": clip, "rows": 0, "removed": 0.0}
        return
    assert found.max() == pytest.approx(clip, rel=1e-5)
    below = found < clip * (1 - 1e-5)
    if below.any() and raw[below].max() > 0:
        # Below the cap the weights keep their ratios; what stands above it is what was removed.
        scale = found[below].sum() / raw[below].sum()
        assert found[below] == pytest.approx(raw[below] * scale, rel=1e-4, abs=1e-6)
        removed = np.maximum(raw - clip / scale, 0).sum() / raw.sum()
        assert report["clip"]["removed"] == pytest.approx(removed, abs=1e-4)


def test_a_cap_by_hand(tmp_path):
    # 1, 1, 1, 9 of mean 3, at most 2 times the mean: the cap c solves c = 2 (3 + c) / 4, c = 3.
    weighting = Weighting(batches([1.0, 1.0, 1.0, 9.0]), "loss", tmp_path, clip=2)
    assert written(weighting) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])
    assert weighting.report["clip"] == {"largest": 2, "rows": 1, "removed": pytest.approx(0.5)}


def test_repeats_stay_whole_and_multiples_become_repeats(tmp_path):
    assert written(Weighting(batches([1.0, 4.0, 2.0]), "repeat", tmp_path)).tolist() == [1, 4, 2]
    thirds = np.array([1, 4, 2, 0]) / 3
    weighting = Weighting(batches(thirds), "sampling", tmp_path, "repeat")
    assert written(weighting).tolist() == [1, 4, 2, 0]
    with pytest.raises(ValueError, match=r"no whole multiples .*--weight-kind sampling"):
        Weighting(batches([1.0, 1.5]), "loss", tmp_path, "repeat")


def test_rows_without_weights_weigh_one_in_any_kind(tmp_path):
    nothing = pa.nulls(4, pa.float32())
    for kind in ("loss", "sampling", "repeat", None):
        weighting = Weighting(batches(nothing), "none", tmp_path, kind)
        assert weighting.kind == (kind or "none") and weighting.report is None
        assert sum(batch.num_rows for batch in weighting) == 4


def test_blocks_change_nothing(tmp_path, monkeypatch):
    raw = np.random.default_rng(0).gamma(0.3, size=100)
    whole = written(Weighting(batches(raw, 100), "loss", tmp_path, clip=3))
    monkeypatch.setattr(weights_module, "BLOCK_ROWS", 7)
    assert np.array_equal(written(Weighting(batches(raw, 9), "loss", tmp_path, clip=3)), whole)


@pytest.mark.parametrize(
    ("weights", "made", "how", "message"),
    [
        ([1.0, -1.0], "loss", {}, "1 weights are negative or not finite"),
        ([np.inf, np.nan], "sampling", {}, "2 weights are negative or not finite"),
        ([0.0, 0.0], "loss", {}, "all weights are 0"),
        ([1.0, 2.0], "loss", {"asked": "none"}, "cannot be left out"),
        ([1.0, 2.0], "loss", {"asked": "heavy"}, "unknown kind of weights 'heavy'"),
        ([1.0, 2.0], "loss", {"clip": 1.0}, "above 1, such as 5; not 1.0"),
        ([1.0, 2.0], "loss", {"clip": float("nan")}, "above 1"),
        ([1.0, 2.0], "none", {"clip": 2.0}, "makes no weights"),
        ([1.0, 2.0], "repeat", {"clip": 2.0}, "whole and not clipped"),
        ([0.0] * 9 + [1.0], "loss", {"clip": 2.0}, "fewer than one row in 2"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, weights, made, how, message):
    with pytest.raises(ValueError, match=message):
        Weighting(batches(weights), made, tmp_path, **how)
