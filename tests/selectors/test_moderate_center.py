"""The Moderate coreset against distances and order written out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.moderate_center import ModerateCenter
from curate.selectors.protocol import Budget
from curate.selectors.vectors import ArrayVectors


@pytest.fixture
def table(make_table):
    rng = np.random.default_rng(5)
    label = rng.integers(0, 3, 61)
    made = make_table(np.zeros(61), errors=[7], label=pa.array(label))
    made.vectors = ArrayVectors(rng.normal(size=(61, 5)).astype(np.float32) + 9 * label[:, None])
    made.target = None
    return made


def by_hand(table, center):
    label = table.data["label"].to_numpy()
    x = table.vectors.take(np.arange(61)).astype(np.float64)
    able = np.arange(61) != 7
    away = np.full(61, np.nan)
    for k in range(3):
        mine = (label == k) & able
        away[mine] = np.sqrt(((x[mine] - center(x[mine], axis=0)) ** 2).sum(1))
    return label, away


def chosen(selector, table, kept, rows=20):
    return kept(selector.select(table, Budget("rows", rows), np.random.default_rng(0)))


@pytest.mark.parametrize(("name", "center"), [("mean", np.mean), ("median", np.median)])
def test_the_middle_of_all_distances_is_kept(table, kept, name, center):
    _, away = by_hand(table, center)
    order = np.argsort(away, kind="stable")[:60]  # NaN, the failed row, is last
    got = chosen(ModerateCenter(label="label", center=name), table, kept)
    assert got.tolist() == sorted(order[20:40].tolist())
    nearest = np.argsort(np.abs(away - np.nanmedian(away)), kind="stable")[:20]
    got = chosen(ModerateCenter(label="label", center=name, closest="value"), table, kept)
    assert got.tolist() == sorted(nearest.tolist())


def test_groups_have_middles_of_their_own(table, kept):
    label, away = by_hand(table, np.mean)
    got = chosen(ModerateCenter(label="label", by_group="label"), table, kept, 30)
    for k in range(3):
        mine = np.flatnonzero((label == k) & ~np.isnan(away))
        order = mine[np.argsort(away[mine], kind="stable")]
        here = [i for i in got.tolist() if label[i] == k]
        start = (len(order) - len(here)) // 2
        assert sorted(order[start : start + len(here)].tolist()) == here
        assert abs(len(here) - len(mine) / 2) <= 1


def test_centres_move_with_the_vectors(table, kept):
    """Distances to a class's centre do not see where the class is."""
    before = chosen(ModerateCenter(label="label"), table, kept)
    label = table.data["label"].to_numpy()
    x = table.vectors.take(np.arange(61))
    table.vectors = ArrayVectors(x + 100 * label[:, None].astype(np.float32))
    # 1e-5 is float32 next to 300; no two distances here are as near.
    assert chosen(ModerateCenter(label="label"), table, kept).tolist() == before.tolist()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="center must be mean or median"):
        ModerateCenter(label="label", center="mode")
    with pytest.raises(ValueError, match="closest must be"):
        ModerateCenter(label="label", closest="far")
