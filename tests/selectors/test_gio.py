"""`gio` over a table: clusters, budgets, base sets, and what the manifest is told."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.gio import Gio
from curate.selectors.gio_rows import Start
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import ArrayVectors

pytest.importorskip("faiss")
ROWS = 600
WHOLE = Budget("fraction", 1.0)


@pytest.fixture
def table(make_table):
    """600 rows in 6 clouds, the target in cloud 0; row 3 failed, row 6 has no vector."""
    draw = np.random.default_rng(0)
    cloud = np.arange(ROWS) % 6
    centers = draw.normal(size=(6, 8)) * 4
    vectors = (centers[cloud] + draw.normal(size=(ROWS, 8))).astype(np.float32)
    vectors[6] = np.nan
    target = centers[0] + draw.normal(size=(80, 8))
    target[7] = np.nan
    made = make_table(
        np.zeros(ROWS),
        errors=[3],
        cloud=pa.array(cloud),
        tokens=pa.array(1 + np.arange(ROWS) % 7, pa.int32()),
        owned=pa.array((np.arange(ROWS) % 10) == 0),
    )
    made.vectors, made.target = ArrayVectors(vectors), ArrayVectors(target)
    return made


@pytest.fixture
def select(table, kept) -> Callable[..., tuple[np.ndarray, Selection]]:
    def run(budget: Budget = WHOLE, **settings: object) -> tuple[np.ndarray, Selection]:
        # Vectors of about length 11: a start around the pool, not around the origin.
        wide = {"normalize": False, "uniform_low": -9.0, "uniform_high": 9.0, "clusters": 60}
        wide["grad_desc_iter"] = 20
        selector = Gio(**{**wide, "target_clusters": 30, **settings})
        selection = selector.select(table, budget, np.random.default_rng(1))
        selection = replace(selection, batches=list(selection.batches))
        return kept(selection), selection

    return run


def ranks_of(selection: Selection) -> np.ndarray:
    return np.concatenate([b.column("rank").to_numpy() for b in selection.batches])


def test_a_target_without_a_vector_is_said(table) -> None:
    table.target = ArrayVectors(np.full((4, 8), np.nan))
    with pytest.raises(ValueError, match="no row of the target has a vector"):
        Gio().select(table, WHOLE, np.random.default_rng(0))


def test_a_descent_to_infinity_is_said(select) -> None:
    with pytest.raises(ValueError, match="runs to infinity; give a smaller scale_factor"):
        select(Budget("rows", 50), scale_factor=1e200)


@pytest.mark.parametrize("variant", ["official", "l-nn"])
class TestBoth:
    def test_the_targets_cloud_comes_first(self, select, variant: str) -> None:
        rows, selection = select(Budget("rows", 90), variant=variant)
        assert len(rows) == 90 and not {3, 6} & set(rows.tolist())
        assert (rows % 6 == 0).mean() > 0.95  # 99 of the 598 rows are
        assert sorted(ranks_of(selection)) == list(range(90))
        assert selection.params["stopped"] == "budget"

    def test_a_smaller_budget_is_a_prefix(self, select, variant: str) -> None:
        rows, selection = select(Budget("rows", 120), variant=variant)
        fewer, _ = select(Budget("rows", 37), variant=variant)
        assert set(fewer) == set(rows[ranks_of(selection) < 37])

    def test_without_a_budget_the_criterion_decides(self, select, variant: str) -> None:
        rows, selection = select(variant=variant)
        assert 0 < len(rows) < ROWS
        assert (rows % 6 == 0).sum() > 60
        assert selection.params["stopped"] != "budget"
        trace = selection.params["kl_trace"]
        assert len(trace) == selection.params["accepted_clusters"] + 1
        assert trace[-1] < trace[0]
        is_ours = "(ours)" in selection.params["estimate"]
        assert is_ours == (variant == "l-nn")

    def test_is_a_function_of_the_seed(self, select, table, kept, variant: str) -> None:
        first, _ = select(Budget("rows", 100), variant=variant)
        assert np.array_equal(first, select(Budget("rows", 100), variant=variant)[0])


def test_clusters_are_whole_but_for_the_last_one(select, table) -> None:
    rows, selection = select(Budget("rows", 100))
    more, larger = select(Budget("rows", 101))
    by_rank = rows[np.argsort(ranks_of(selection))]
    assert set(by_rank.tolist()) < set(more.tolist())
    assert larger.params["kl_trace"][: len(selection.params["kl_trace"])] == pytest.approx(
        selection.params["kl_trace"]
    )


def test_rows_alone_are_taken_in_the_order_of_acceptance(select, table) -> None:
    rows, selection = select(Budget("rows", 20), clusters=0)
    assert selection.params["pool_clusters"] == ROWS - 2
    assert selection.params["accepted_clusters"] == len(rows) == 20


def test_tokens_end_before_the_row_that_would_exceed(select) -> None:
    rows, _ = select(Budget("tokens", 300))
    tokens = 1 + rows % 7
    assert 300 - 7 < tokens.sum() <= 300


def test_a_base_set_is_the_start_and_is_never_chosen(select) -> None:
    rows, selection = select(Budget("rows", 80), base="owned")
    assert not (rows % 10 == 0).any()
    assert selection.params["start"] == {"kind": "base", "rows": 60}


def test_a_share_of_the_pool_is_a_start_that_may_be_chosen(select) -> None:
    _, selection = select(Budget("rows", 80), random_init_pct=0.5)
    assert selection.params["start"]["kind"] == "random"
    assert selection.params["start"]["rows"] == selection.params["pool_clusters"] // 2


def test_a_uniform_start_has_length_one_by_default() -> None:
    pool, rng = np.zeros((3, 50)), np.random.default_rng(0)
    points = Start().rows(pool, 10, rng)
    assert points.shape == (20, 50)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    drawn = Start(normalize=False, uniform_low=2.0, uniform_high=3.0).rows(pool, 10, rng)
    assert drawn.min() >= 2 and drawn.max() <= 3


def test_clusters_that_come_again_weigh_twice(select) -> None:
    settings = {"clusters": 12, "resets_allowed": True, "max_resets": 2}
    _, selection = select(stop="min_difference", min_difference=0.05, max_iter=30, **settings)
    weights = np.concatenate([b.column("weight").to_numpy() for b in selection.batches])
    assert selection.params["resets"] == 2
    assert selection.params["weight_kind"] == "repeat"
    assert set(weights) <= {1, 2, 3} and weights.max() > 1


def test_nothing_is_chosen_of_a_pool_that_is_far_away(select, table) -> None:
    table.vectors = ArrayVectors(table.vectors.array + 500)
    with pytest.raises(ValueError, match="gio accepts no row: the first one would take"):
        select()


def test_a_search_that_ends_early_says_so(select, caplog: pytest.LogCaptureFixture) -> None:
    rows, _ = select(Budget("rows", 500), stop="increase")
    assert len(rows) < 500
    assert f"gio ends (increase) with {len(rows)} rows, less than the budget" in caplog.text


def test_bad_input_is_one_sentence(select, table) -> None:
    for settings, words in (
        ({"variant": "ours"}, "unknown variant"),
        ({"clusters": -1}, "are counts"),
        ({"random_init_pct": 1.5}, "is a share"),
        ({"base": "owned", "random_init_pct": 0.1}, "not both"),
        ({"uniform_low": 2.0, "uniform_high": 1.0}, "uniform_low < uniform_high"),
        ({"base": "nowhere"}, "no column 'nowhere'"),
        ({"base": "score"}, "a column of true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            select(Budget("rows", 9), **settings)
    table.target = ArrayVectors(np.zeros((9, 5)))
    with pytest.raises(ValueError, match="5 dimensions, the rows' 8"):
        select(Budget("rows", 9))
    table.target = None
    with pytest.raises(ValueError, match="--target-vectors"):
        select(Budget("rows", 9))
