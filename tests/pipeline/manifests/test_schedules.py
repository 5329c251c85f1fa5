"""Static schedules: what each epoch shows, against the methods' own promises."""

import json
from collections import Counter
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.manifests import permutation, rounds
from curate.pipeline.manifests.cooldown import temperature_counts, temperature_shares
from curate.pipeline.manifests.curriculum import hard_end
from curate.pipeline.manifests.epoch import EpochPlan
from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.permutation import Permutation
from curate.pipeline.manifests.places import Placed
from curate.pipeline.manifests.rescheduled import schedule
from curate.pipeline.manifests.rounds import FreshRounds, WalkedRounds
from curate.pipeline.manifests.schedules import SCHEDULES, make_schedule
from curate.selectors.apportion import apportion
from curate.selectors.keyed import stream_key


class Listed:
    """Positions with ranks and groups, in small row groups."""

    def __init__(self, ranks, groups=None, size: int = 17) -> None:
        n = len(ranks)
        self.starts = np.unique(np.append(np.arange(0, n, size), n)).astype(np.int64)
        self._columns = {"rank": np.asarray(ranks), "group": groups}

    def group(self, index: int) -> Placed:
        start, stop = self.starts[index : index + 2]
        n = stop - start
        rows = np.arange(start, stop)
        return Placed(np.zeros(n, np.int32), rows, np.ones(n, np.float32))

    def column(self, index: int, name: str):
        return self._columns[name][self.starts[index] : self.starts[index + 1]]


def shown(places, rule: str, epoch: int, loader_seed: int = 0, **params) -> np.ndarray:
    epochs, seed = params.pop("epochs", None), params.pop("seed", 3)
    made = make_schedule(rule, seed, epochs, params)
    plan = EpochPlan(places, "none", loader_seed, epoch, 4096, made)
    return plan.positions(0, plan.length)


class TestPermutation:
    @settings(deadline=None, max_examples=60)
    @given(n=st.integers(2, 5000), key=st.integers(0, 2**63), exact=st.booleans())
    def test_is_a_bijection_both_ways(self, n, key, exact):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(permutation, "EXACT", 1 << 18 if exact else 0)
            found = Permutation(n, key)
            rows = found.row_at(np.arange(n))
            assert np.array_equal(np.sort(rows), np.arange(n))
            assert np.array_equal(found.place_of(rows), np.arange(n))

    @pytest.mark.parametrize("exact", [1 << 18, 0])
    def test_every_row_is_equally_often_at_every_place(self, monkeypatch, exact):
        monkeypatch.setattr(permutation, "EXACT", exact)
        n, trials = 7, 4000
        counts = np.zeros((n, n))
        for key in range(trials):
            rows = Permutation(n, stream_key(key)).row_at(np.arange(n))
            counts[np.arange(n), rows] += 1
        # Chi-square with 36 degrees of freedom: 99.99 % lie below 77.
        expected = trials / n
        assert ((counts - expected) ** 2 / expected).sum() < 77

    def test_a_part_of_a_large_one_is_uniform(self):
        n = 10_000_000
        rows = Permutation(n, 4).row_at(np.arange(100_000))
        assert len(np.unique(rows)) == 100_000
        counts = np.bincount(rows * 100 // n, minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 170  # 99 degrees, 99.99 % below 166


class TestRounds:
    @settings(deadline=None, max_examples=150)
    @given(n=st.integers(1, 40), data=st.data(), key=st.integers(0, 1000))
    def test_a_walk_shows_all_rows_equally_often_up_to_one(self, n, data, key):
        m = data.draw(st.integers(1, 2 * n + 1))
        walk, rows = WalkedRounds(n, m, key), np.arange(n)
        total = np.zeros(n, dtype=int)
        for epoch in range(12):
            times = walk.times(epoch, rows)
            assert times.sum() == m
            assert times.max() <= -(-m // n)  # no row twice, where that can be
            total += times
            assert {(epoch + 1) * m // n, -(-(epoch + 1) * m // n)} >= set(total.tolist())

    def test_any_round_of_any_rows_can_be_asked_alone(self):
        walk = WalkedRounds(1000, 300, 5)
        whole = [walk.times(e, np.arange(1000)) for e in range(20)]
        for epoch in (19, 3, 7):
            fresh = WalkedRounds(1000, 300, 5)
            some = np.array([999, 0, 500, 500])
            assert fresh.times(epoch, some).tolist() == whole[epoch][some].tolist()

    def test_the_search_for_a_cut_off_goes_on_past_its_first_chunk(self, monkeypatch):
        whole = [WalkedRounds(100, 30, 1).times(e, np.arange(100)).tolist() for e in range(9)]
        monkeypatch.setattr(rounds, "CHUNK", 3)
        again = [WalkedRounds(100, 30, 1).times(e, np.arange(100)).tolist() for e in range(9)]
        assert again == whole

    def test_fresh_rounds_are_independent_and_uniform(self):
        n, m, epochs = 20, 5, 4000
        found = FreshRounds(n, m, 9)
        times = np.array([found.times(e, np.arange(n)) for e in range(epochs)])
        assert (times.sum(1) == m).all() and times.max() == 1
        # 1000 expected for each row, standard deviation sqrt(4000 * 1/4 * 3/4) = 27.
        assert np.abs(times.sum(0) - epochs * m / n).max() < 5 * 27.4
        together = (times[1:] * times[:-1]).sum(0) / (epochs - 1)
        assert np.abs(together - (m / n) ** 2).max() < 0.02  # 5 standard deviations


class TestRs2:
    def test_the_published_wrap_is_not_ours(self):
        # Their code's rounds of 4 out of 10 have 4, 4, 3, 4, 4, 3 rows.
        places = Listed(np.arange(10), size=4)
        sizes = [len(set(shown(places, "rs2", e, fraction=0.4).tolist())) for e in range(6)]
        assert sizes == [4] * 6

    def test_a_fraction_of_one_is_ordinary_epochs(self):
        places = Listed(np.arange(50))
        for replacement in (False, True):
            rows = shown(places, "rs2", 2, fraction=1.0, replacement=replacement)
            assert sorted(rows.tolist()) == list(range(50))

    @pytest.mark.parametrize("replacement", [False, True])
    def test_all_loader_seeds_see_the_same_rows_in_orders_of_their_own(self, replacement):
        places = Listed(np.arange(200))
        options = dict(fraction=0.2, replacement=replacement)
        one = shown(places, "rs2", 4, loader_seed=0, **options)
        two = shown(places, "rs2", 4, loader_seed=1, **options)
        assert set(one.tolist()) == set(two.tolist())
        assert one.tolist() != two.tolist()
        other = shown(places, "rs2", 4, **{**options, "seed": 4})
        assert set(one.tolist()) != set(other.tolist())

    def test_no_matter_how_the_manifest_is_cut(self):
        a = [shown(Listed(np.arange(300), size=s), "rs2", 5, fraction=0.3) for s in (7, 300)]
        assert set(a[0].tolist()) == set(a[1].tolist())


class TestRs2ByClass:
    @settings(deadline=None, max_examples=50)
    @given(
        sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
        fraction=st.floats(0.02, 1.0),
        replacement=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_classes_and_rows_never_miss_their_share_by_a_whole_row(
        self, sizes, fraction, replacement, seed
    ):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
        total = len(labels)
        m = max(1, int(fraction * total + 0.5))
        names = tuple("abcdef"[: len(sizes)])
        options = dict(
            fraction=fraction, replacement=replacement, seed=seed, groups=names, rows=tuple(sizes)
        )
        places, rows_seen = Listed(np.arange(total), labels), np.zeros(total, dtype=int)
        for epoch in range(9):
            rows = shown(places, "rs2", epoch, **options)
            assert len(rows) == len(set(rows.tolist())) == m
            counts = np.bincount(labels[rows], minlength=len(sizes))
            if epoch == 0:
                assert counts.tolist() == apportion(m, sizes, sizes)  # largest remainder
            rows_seen[rows] += 1
            for c, n in enumerate(sizes):
                assert abs(Fraction(m * n, total) - int(counts[c])) < 1
                due = Fraction((epoch + 1) * m * n, total)
                assert abs(due - int(rows_seen[labels == c].sum())) < 1
            if not replacement:  # the card's promise for all rows, and so for those of a class
                due = Fraction((epoch + 1) * m, total)
                assert {floor(due), ceil(due)} >= set(rows_seen.tolist())

    def test_many_small_classes_take_turns(self):
        # 40 classes of one row at a fraction of 0.1: largest remainder alone shows the same four.
        labels, options = np.arange(40), dict(fraction=0.1, groups=("x",) * 40, rows=(1,) * 40)
        seen = [shown(Listed(labels, labels), "rs2", e, **options) for e in range(10)]
        assert sorted(np.concatenate(seen).tolist()) == list(range(40))

    def test_with_replacement_epochs_are_drawn_anew(self):
        labels = np.repeat([0, 1], [300, 100])
        options = dict(fraction=0.25, replacement=True, groups=("a", "b"), rows=(300, 100))
        times = np.zeros(400)
        for epoch in range(400):
            rows = shown(Listed(labels, labels, size=97), "rs2", epoch, **options)
            assert np.bincount(labels[rows]).tolist() == [75, 25]
            times[rows] += 1
        # Binomial(400, 1/4): mean 100, standard deviation 8.7. Walks would give 100 each.
        assert 60 < times.min() < 95 and 105 < times.max() < 140

    def test_classes_of_the_corpus_or_of_the_score_table(self, make_selection, tmp_path):
        plain = make_selection("loss")
        params = {"fraction": 0.1, "by_group": "lang"}
        made = schedule(plain, "rs2", tmp_path / "s", params=params)
        content = json.loads((tmp_path / "s" / "manifest.json").read_text())
        assert content["version"] == 2 and content["schedule"]["rule"] == "rs2"
        langs = Counter(r["lang"] for r in made.rows(["lang"]))
        counted = content["schedule"]["params"]
        assert dict(zip(counted["groups"], counted["rows"], strict=True)) == langs
        seen: Counter[int] = Counter()
        for epoch in range(10):
            rows = list(load_manifest(tmp_path / "s").as_torch(epoch=epoch, seed=2))
            seen.update(int(r["x"]) for r in rows)
            each = Counter(r["lang"] for r in rows)
            assert all(abs(each[g] - n / 10) < 1 for g, n in langs.items())
        assert set(seen.values()) == {1} and len(seen) == 300
        assert schedule(plain, "rs2", tmp_path / "s", params=params).content == made.content


class TestCurriculum:
    @pytest.mark.parametrize("hard", ["first", "last"])
    @pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
    def test_one_epoch_in_stages_is_sorted(self, hard, order):
        ranks = np.random.default_rng(0).permutation(120)
        options = dict(epochs=1, start=1.0, stages=120, hard=hard, order=order)
        rows = shown(Listed(ranks), "curriculum", 0, **options)
        difficulty = -ranks if hard == "first" else ranks
        expected = np.sort(difficulty)[:: 1 if order == "easy_to_hard" else -1]
        assert np.array_equal(difficulty[rows], expected)

    @settings(deadline=None, max_examples=40)
    @given(n=st.integers(2, 90), epochs=st.integers(2, 9), stages=st.integers(1, 5), data=st.data())
    def test_the_pool_grows_and_epochs_stay_as_long(self, n, epochs, stages, data):
        ranks = np.random.default_rng(n).permutation(n)
        start, full = (data.draw(st.floats(0.05, 1.0)) for _ in range(2))
        before = 0
        for epoch in range(epochs):
            rows = shown(
                Listed(ranks), "curriculum", epoch, epochs=epochs, start=start, full=full,
                stages=stages, hard="last",
            )  # fmt: skip
            counts = np.bincount(ranks[rows], minlength=n)
            pool = int((counts > 0).sum())
            assert len(rows) == n
            assert (counts[:pool] > 0).all() and not counts[pool:].any()  # the easiest ranks
            assert counts[:pool].max() - counts[:pool].min() <= 2  # stages may differ by one more
            assert pool >= before
            before = pool
            if epoch >= full * epochs or epoch == epochs - 1:  # no row is never shown
                assert pool == n

    def test_ranks_with_gaps_count_as_their_order(self):
        ranks = np.random.default_rng(0).permutation(60)
        options = dict(epochs=3, hard="last")
        plain = shown(Listed(ranks), "curriculum", 1, **options)
        assert shown(Listed(ranks * 7 + 2), "curriculum", 1, **options).tolist() == plain.tolist()

    def test_which_end_is_hard(self):
        assert hard_end({"direction": "high"}, "hard, then noisy") == "first"
        assert hard_end({"direction": "low"}, "hard, then noisy") == "last"
        assert hard_end({"direction": "low"}, "easy and clean") == "first"
        assert hard_end({"direction": "high"}, "unrelated") is None
        assert hard_end({"direction": None}, "hard") is None


class TestCooldown:
    GROUPS = ("a", "b", "c")

    def places(self, n: int = 300):
        groups = np.random.default_rng(2).choice(3, n, p=[0.7, 0.25, 0.05]).astype(np.int32)
        return Listed(np.arange(n), groups), groups

    def test_groups_get_their_temperature_shares_first_and_their_own_at_last(self):
        places, groups = self.places()
        rows = tuple(np.bincount(groups).tolist())
        options = dict(epochs=6, groups=self.GROUPS, rows=rows, temperature=5.0, hot=0.5)
        power = np.array(rows) ** (1 / 5)
        wanted = 300 * power / power.sum()
        seen = np.zeros(300, dtype=int)
        for epoch in range(6):
            visits = shown(places, "cooldown", epoch, **options)
            assert len(visits) == 300
            counts = np.bincount(groups[visits], minlength=3)
            if epoch < 3:
                assert np.abs(counts - wanted).max() < 1
                seen += np.bincount(visits, minlength=300)
            else:
                assert sorted(visits.tolist()) == list(range(300))
        for group in range(3):  # over all hot epochs, rows of a group differ by one at most
            assert np.ptp(seen[groups == group]) <= 1

    def test_temperature_one_is_an_ordinary_epoch_and_a_high_one_is_uniform(self):
        assert temperature_counts([70, 25, 5], 1.0) == [70, 25, 5]
        assert temperature_counts([70, 20, 9], 1e9) == [33, 33, 33]

    def test_upweighting_gives_the_loss_that_upsampling_gives(self):
        # Li et al., theorem 1, in full-batch form, and their second-moment factor.
        rng = np.random.default_rng(0)
        sizes, tau = [64, 27, 8], 3.0
        losses = [rng.random(n) for n in sizes]
        hot, plain = temperature_shares(sizes, tau), temperature_shares(sizes, 1.0)
        upsampled = sum(p * loss.mean() for p, loss in zip(hot, losses, strict=True))
        weight = [p / q for p, q in zip(hot, plain, strict=True)]
        upweighted = sum(w * loss.sum() for w, loss in zip(weight, losses, strict=True)) / 99
        assert upweighted == pytest.approx(upsampled, rel=1e-12)
        assert sum(p * p / q for p, q in zip(hot, plain, strict=True)) >= 1
        assert sum(p * p / q for p, q in zip(plain, plain, strict=True)) == pytest.approx(1)


class TestInManifests:
    def test_it_travels_in_the_manifest_and_the_loader_follows_it(self, make_selection, tmp_path):
        manifest = schedule(
            make_selection("loss"), "rs2", tmp_path / "s", seed=7, params={"fraction": 0.1}
        )
        written = json.loads((tmp_path / "s" / "manifest.json").read_text())
        assert written["version"] == 1
        assert written["schedule"] == {
            "rule": "rs2",
            "seed": 7,
            "epochs": None,
            "params": {"fraction": 0.1, "replacement": False},
        }
        seen: Counter[int] = Counter()
        rows = load_manifest(tmp_path / "s").as_torch(batch_size=8)
        for _ in range(10):
            assert len(rows) == 4
            seen.update(int(x) for batch in rows.loader() for x in batch["x"])
        assert set(seen.values()) == {1} and len(seen) == len(manifest) == 300

    @pytest.mark.parametrize("split", [(1, 0), (2, 2), (3, 1)])
    def test_ranks_and_workers_share_an_epoch(self, make_selection, tmp_path, split):
        world, workers = split
        manifest = schedule(make_selection(), "rs2", tmp_path / "s", params={"fraction": 0.2})
        found = []
        for rank in range(world):
            rows = manifest.as_torch(rank, world, batch_size=4, seed=1, epoch=2)
            found += [int(x) for b in rows.loader(num_workers=workers) for x in b["x"]]
        alone = [int(r["x"]) for r in manifest.as_torch(seed=1, epoch=2)]
        assert sorted(found) == sorted(alone) and len(alone) == 60

    def test_a_curriculum_asks_the_scorer_which_end_is_hard(self, make_selection, tmp_path):
        ranks = np.random.default_rng(0).permutation(50)
        table = {"run": "r", "digest": "d", "scorers": {"e": {"name": "el2n", "params": {}}}}
        said = {"by": "e", "direction": "high"}
        plain = make_selection(kept=50, ranks=ranks, selection=said, scores=[table])
        manifest = schedule(plain, "curriculum", tmp_path / "s", epochs=1)
        assert manifest.content["schedule"]["params"]["hard"] == "first"
        rows = manifest.as_map(["x"])
        position = {int(rows[i]["x"]): i for i in range(50)}
        rows = [position[int(r["x"])] for r in manifest.as_torch()]
        assert ranks[rows].tolist() == list(range(49, -1, -1))  # high el2n is hard: it comes last
        blind = make_selection(kept=50, ranks=ranks, name="blind")
        with pytest.raises(ValueError, match=r"it is not known whether .* say so: hard=first"):
            schedule(blind, "curriculum", tmp_path / "t", epochs=4)
        schedule(blind, "curriculum", tmp_path / "t", epochs=4, params={"hard": "last"})

    def test_cooldown_over_a_column_of_the_corpus(self, make_selection, tmp_path):
        options = dict(epochs=2, params={"by_group": "lang"})
        manifest = schedule(make_selection("loss"), "cooldown", tmp_path / "s", **options)
        assert manifest.content["version"] == 2
        langs = Counter(r["lang"] for r in manifest.rows(["lang"]))
        params = manifest.content["schedule"]["params"]
        assert dict(zip(params["groups"], params["rows"], strict=True)) == langs
        hot = Counter(r["lang"] for r in load_manifest(tmp_path / "s").as_torch(epoch=0))
        wanted = dict(zip(params["groups"], temperature_counts(params["rows"], 5.0), strict=True))
        assert hot == wanted
        assert Counter(r["lang"] for r in manifest.as_torch(epoch=1)) == langs
        assert schedule(make_selection("loss"), "cooldown", tmp_path / "s", **options).content == (
            manifest.content
        )

    def test_bad_requests_are_one_sentence(self, make_selection, tmp_path):
        plain, out = make_selection(), tmp_path / "s"
        for rule, options, said in (
            ("rs3", {}, "unknown schedule 'rs3'; choose one of: rs2"),
            ("rs2", {"params": {"fraction": 0}}, "must be in"),
            ("rs2", {"params": {"share": 0.5}}, "no parameter 'share'; it takes: fraction"),
            ("rs2", {"params": {"groups": ["a"]}}, "are counted: name their column, by_group"),
            ("rs2", {"params": {"by_group": 3}}, "by_group must name a column, not 3"),
            ("rs2", {"params": {"by_group": "words"}}, "'words' holds lists, which are no groups"),
            ("rs2", {"seed": -1}, "whole number from 0"),
            ("rs2", {"epochs": 0}, "a number from 1"),
            ("curriculum", {"epochs": 3}, "needs ranks and .* has none"),
            ("cooldown", {"epochs": 3}, "cooldown needs groups: by_group=COLUMN"),
            ("cooldown", {"params": {"by_group": "lang"}}, "say the number of epochs"),
            ("cooldown", {"epochs": 3, "params": {"by_group": "lnag"}}, "no column 'lnag'"),
        ):
            with pytest.raises(ValueError, match=said):
                schedule(plain, rule, out, **options)
            assert not list(Path(tmp_path).glob("s/*.json"))
        for kind in ("sampling", "repeat"):
            with pytest.raises(ValueError, match="both say how often a row is shown"):
                schedule(make_selection(kind), "rs2", out)
        schedule(plain, "rs2", out)
        with pytest.raises(ValueError, match="holds another selection"):
            schedule(plain, "rs2", out, seed=5)
        with pytest.raises(ValueError, match="one of the manifests to read"):
            schedule(plain, "rs2", plain.path)

    def test_ray_data_refuses_it(self, make_selection, tmp_path):
        manifest = schedule(make_selection(), "rs2", tmp_path / "s")
        with pytest.raises(ValueError, match=r"has a schedule \(rs2\), which Ray Data cannot"):
            manifest.as_ray()

    def test_a_wrong_schedule_in_a_file_is_named(self, make_selection, tmp_path):
        manifest = make_selection()
        content = {**manifest.content, "schedule": {"rule": "rs9", "seed": 0, "epochs": None}}
        with pytest.raises(ValueError, match="unknown schedule 'rs9'"):
            Manifest(manifest.folder, content).as_torch()


def test_every_rule_has_a_test() -> None:
    assert set(SCHEDULES) == {"rs2", "curriculum", "cooldown"}
