"""SemDeDup and exact duplicates against loops over pairs, in every order of keeping."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.selectors import similar_before as module
from curate.selectors.exact import Exact, is_repeated
from curate.selectors.protocol import Budget
from curate.selectors.quantise import quantise
from curate.selectors.semdedup import SemDeDup
from curate.selectors.similar_before import similar_before
from curate.selectors.vectors import ArrayVectors, UnitVectors


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def plain(points, clusters):
    """The largest cosine with an earlier row of the cluster, pair by pair; removed ones count."""
    found = np.full(len(points), -1.0)
    for rows in clusters:
        for at, j in enumerate(rows):
            found[j] = max((cosine(points[i], points[j]) for i in rows[:at]), default=-1.0)
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4), st.integers(1, 7))
def test_similarity_to_earlier_rows_is_that_of_all_pairs(seed, n, d, block):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(n, d)).astype(np.float32)
    points = points[draw.integers(0, n, n)]  # some twice or more often
    clusters = np.array_split(draw.permutation(n), min(n, int(draw.integers(1, 4))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ROWS", block)
        found = similar_before(ArrayVectors(points), clusters)
    # float32 holds a cosine to 6e-8.
    assert found == pytest.approx(plain(points, clusters), abs=1e-7)


def table_of(make_table, points, **columns):
    scores = columns.pop("scores", np.zeros(len(points)))
    made = make_table(scores, **columns)
    made.vectors, made.target = ArrayVectors(points), None
    return made


def test_exact_duplicates_collapse_to_one(make_table, kept):
    draw = np.random.default_rng(1)
    points = np.repeat(draw.normal(size=(12, 6)).astype(np.float32), 5, axis=0)
    order = draw.permutation(60)
    table = table_of(make_table, points[order])
    for selector in (SemDeDup(epsilon=1e-6), SemDeDup(epsilon=1e-12, clusters=3)):
        chosen = kept(selector.select(table, Budget("fraction", 1.0), np.random.default_rng(0)))
        assert sorted(order[chosen] // 5) == list(range(12))
    none = SemDeDup(epsilon=0).select(table, Budget("fraction", 1.0), np.random.default_rng(0))
    assert len(kept(none)) == 60


def test_it_is_not_transitive(make_table, kept):
    """b is near a, c near b but not a: b goes because of a, and c because of b all the same."""
    angles = np.deg2rad([0.0, 10.0, 20.0])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    table = table_of(make_table, points, scores=[3.0, 2.0, 1.0])
    selector = SemDeDup(by="score", epsilon=1 - np.cos(np.deg2rad(12)), clusters=1)
    selection = selector.select(table, Budget("fraction", 1.0), np.random.default_rng(0))
    assert kept(selection).tolist() == [0]


@pytest.mark.parametrize("keep", ["hard", "easy", "score"])
def test_the_order_says_which_row_of_a_pair_stays(make_table, kept, keep):
    draw = np.random.default_rng(2)
    points = draw.normal(size=(80, 3)).astype(np.float32)
    scores = draw.random(80).astype(np.float32)
    table = table_of(make_table, points, scores=scores)
    by = {"by": "score", "direction": "low"} if keep == "score" else {}
    selector = SemDeDup(keep=keep, epsilon=0.02, clusters=4, **by)
    selection = selector.select(table, Budget("fraction", 1.0), np.random.default_rng(3))
    seed = int(np.random.default_rng(3).integers(1 << 31))
    found = quantise(UnitVectors(table.vectors), 4, seed)
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    away = np.linalg.norm(units - found.centroids[found.cluster], axis=1)
    key = {"hard": -away, "easy": away, "score": scores}[keep]
    clusters = [sorted(np.flatnonzero(found.cluster == c), key=lambda i: key[i]) for c in range(4)]
    expected = np.flatnonzero(plain(points, clusters) <= 1 - 0.02)
    assert kept(selection).tolist() == expected.tolist()
    assert 0 < len(expected) < 80


def test_one_cluster_is_in_the_order_of_distance_from_the_mean_of_all_its_rows(make_table, kept):
    base = np.random.default_rng(12).normal(size=(150, 6)) + 0.3
    near = base[:140] + 0.1 * np.random.default_rng(13).normal(size=(140, 6))
    points = np.vstack([base, near]).astype(np.float32)  # more than 128 rows, which it once saw
    units = points / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    away = np.linalg.norm(units - units.mean(axis=0), axis=1)
    for keep, key in (("hard", -away), ("easy", away)):
        selector = SemDeDup(keep=keep, epsilon=0.05)
        table = table_of(make_table, points)
        selection = selector.select(table, Budget("fraction", 1.0), np.random.default_rng(0))
        expected = np.flatnonzero(plain(points, [np.argsort(key, kind="stable")]) <= 0.95)
        assert kept(selection).tolist() == expected.tolist()


def test_a_budget_keeps_what_the_epsilon_of_that_size_would(make_table, kept, ranked):
    points = np.random.default_rng(4).normal(size=(70, 3)).astype(np.float32)
    table = table_of(make_table, points)

    def select(budget, **settings_):
        return SemDeDup(**settings_).select(table, budget, np.random.default_rng(0))

    by_budget = select(Budget("rows", 30))
    similarity = by_budget.params["similarity"]
    by_epsilon = select(Budget("fraction", 1.0), epsilon=1 - similarity)
    chosen = kept(by_budget).tolist()
    assert len(chosen) == 30
    assert kept(by_epsilon).tolist() == chosen
    both = kept(select(Budget("rows", 30), epsilon=1e-6)).tolist()
    assert both == chosen
    assert len(kept(select(Budget("rows", 70), epsilon=1 - similarity))) == 30
    prefix = ranked(select(Budget("rows", 11)))
    assert ranked(select(Budget("rows", 30)))[:11].tolist() == prefix.tolist()


def test_without_budget_and_epsilon_it_is_five_hundredths(make_table, kept):
    points = np.random.default_rng(5).normal(size=(70, 3)).astype(np.float32)
    table = table_of(make_table, points, errors=[4])
    for_all = Budget("fraction", 1.0)
    default = SemDeDup().select(table, for_all, np.random.default_rng(0))
    said = SemDeDup(epsilon=0.05).select(table, for_all, np.random.default_rng(0))
    assert kept(default).tolist() == kept(said).tolist()
    assert default.params["similarity"] <= 0.95
    assert default.params["used_epsilon"] == 0.05 and default.params["used_keep"] == "hard"


def test_groups_are_searched_apart(make_table, kept):
    points = np.tile(np.random.default_rng(6).normal(size=(10, 4)), (2, 1)).astype(np.float32)
    table = table_of(make_table, points, label=pa.array(np.repeat(["a", "b"], 10)))
    together, apart = (
        kept(SemDeDup(epsilon=1e-6, **by).select(table, Budget("fraction", 1.0), rng))
        for by, rng in (
            ({"clusters": 1}, np.random.default_rng(0)),
            ({"by_group": "label"}, np.random.default_rng(0)),
        )
    )
    assert len(together) == 10 and len(apart) == 20


def test_wrong_settings_of_semdedup_are_refused():
    for wrong in (
        {"keep": "last"},
        {"keep": "score"},
        {"keep": "hard", "by": "score"},
        {"direction": "up"},
        {"epsilon": -1},
        {"clusters": 0},
    ):
        with pytest.raises(ValueError):
            SemDeDup(**wrong)


class TestExact:
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, -0.0, 1.5])), min_size=1))
    def test_a_repeated_row_is_one_that_was_there_before(self, rows):
        points = np.array(rows, dtype=np.float32)
        seen, expected = set(), []
        for row in points.tolist():
            expected.append(tuple(row) in seen)  # 0.0 == -0.0, and they hash alike
            seen.add(tuple(row))
        found = is_repeated(ArrayVectors(points), np.arange(len(points)))
        assert found.tolist() == expected

    def test_the_first_or_the_best_stays_and_failed_rows_do_not_count(self, make_table, kept):
        points = np.array([[1, 2]] * 4 + [[3, 4]] * 3, dtype=np.float32)
        table = table_of(make_table, points, scores=[1, 5, 9, 9, 2, 1, 2], errors=[0])
        everything = Budget("fraction", 1.0)
        selection = Exact().select(table, everything, np.random.default_rng(0))
        assert selection.params["duplicates"] == 4
        assert kept(selection).tolist() == [1, 4]
        best = Exact(by="score").select(table, everything, np.random.default_rng(0))
        assert kept(best).tolist() == [2, 4]
        worst = Exact(by="score", direction="low").select(
            table, everything, np.random.default_rng(0)
        )
        assert kept(worst).tolist() == [1, 5]

    def test_a_budget_is_a_bound(self, make_table, kept):
        points = np.repeat(np.arange(20, dtype=np.float32), 2)[:, None]
        table = table_of(make_table, points, scores=np.arange(40))
        few = kept(Exact().select(table, Budget("rows", 6), np.random.default_rng(0)))
        assert len(set((few // 2).tolist())) == 6
        best = kept(Exact(by="score").select(table, Budget("rows", 3), np.random.default_rng(0)))
        assert best.tolist() == [35, 37, 39]
        assert len(kept(Exact().select(table, Budget("rows", 30), np.random.default_rng(0)))) == 20

    def test_hash_collisions_are_told_apart(self, monkeypatch):
        monkeypatch.setattr(
            "curate.selectors.exact._hash", lambda block, key: np.zeros(len(block), np.uint64)
        )
        points = np.array([[1.0], [2.0], [1.0]], dtype=np.float32)
        found = is_repeated(ArrayVectors(points), np.arange(3))
        assert found.tolist() == [False, False, True]
