"""SeTa and InfoBatch against their definitions, their state, and the replay."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.manifests.infobatch import InfoBatch
from curate.pipeline.manifests.loss_driven import UNSEEN
from curate.pipeline.manifests.replay import LABEL, recorded_losses, replay
from curate.pipeline.manifests.seta import SeTa, loss_groups

SAMPLERS = [InfoBatch, SeTa]


class TestInfoBatch:
    def test_the_first_epoch_prunes_nothing(self):
        sampler = InfoBatch(50, epochs=10)
        sampler.start(0)
        assert sorted(sampler) == list(range(50))
        assert set(sampler.weights(np.arange(50)).tolist()) == {1.0}

    def test_half_of_the_well_learned_stay_with_twice_the_weight(self):
        losses = np.r_[np.full(20, 0.1), np.full(10, 5.0)].astype(np.float32)
        sampler = InfoBatch(30, epochs=10)
        sampler.update(np.arange(30), losses)
        sampler.start(1)
        kept = np.sort(sampler.positions())
        assert (kept < 20).sum() == 10 and (kept >= 20).sum() == 10
        assert sampler.weights(kept).tolist() == [2.0] * 10 + [1.0] * 10

    @settings(deadline=None, max_examples=50)
    @given(
        n=st.integers(2, 200),
        ratio=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7]),
        seed=st.integers(0, 99),
    )
    def test_weighted_sums_keep_their_expectation(self, n, ratio, seed):
        losses = np.random.default_rng(seed).exponential(size=n).astype(np.float32)
        sampler = InfoBatch(n, epochs=1000, seed=seed, ratio=ratio)
        sampler.update(np.arange(n), losses)
        well = int((losses < losses.mean(dtype=np.float64)).sum())
        sampler.start(1)
        chosen = sampler.positions()
        kept = (losses[chosen] < losses.mean(dtype=np.float64)).sum()
        assert kept == int((1 - ratio) * well + 1e-9)
        # The expectation over choices: each well-learned row stays with probability kept / well.
        if well and kept:
            weight = sampler.weights(np.sort(chosen)).max()
            assert weight == pytest.approx(1 / (1 - ratio))
            if abs((1 - ratio) * well - kept) < 1e-9:
                assert kept / well * weight == pytest.approx(1)

    def test_all_well_learned_rows_are_chosen_equally_often(self):
        losses = np.r_[np.full(20, 0.1), np.full(10, 5.0)]
        sampler, seen = InfoBatch(30, epochs=10_000), np.zeros(30)
        sampler.update(np.arange(30), losses)
        for epoch in range(1, 2001):
            sampler.start(epoch)
            seen[sampler.positions()] += 1
        assert (seen[20:] == 2000).all()
        assert np.abs(seen[:20] - 1000).max() < 5 * 22.4  # standard deviation sqrt(500)

    @pytest.mark.parametrize("epochs", [8, 10, 13])
    def test_the_last_epochs_are_whole_and_unweighted(self, epochs):
        # In the published code the weights survive where delta * epochs is not whole.
        sampler = InfoBatch(40, epochs=epochs)
        sampler.update(np.arange(40), np.linspace(0, 1, 40))
        for epoch in range(1, epochs):
            sampler.start(epoch)
            is_last = epoch >= 0.875 * epochs
            assert (len(sampler) == 40) == is_last
            if is_last:
                assert set(sampler.weights(np.arange(40)).tolist()) == {1.0}


class TestSeTa:
    def test_groups_are_runs_of_the_sorted_losses(self):
        losses = np.random.default_rng(0).exponential(size=400).astype(np.float32)
        number, group = loss_groups(losses, 7)
        assert number == 7
        by_loss = group[np.argsort(losses, kind="stable")]
        assert (np.diff(by_loss) >= 0).all() and set(group.tolist()) == set(range(7))
        assert loss_groups(np.full(9, 3.0, np.float32), 5)[0] == 1

    def test_well_apart_losses_are_their_own_groups(self):
        losses = np.repeat([0.0, 10.0, 20.0, 30.0], 25).astype(np.float32)
        number, group = loss_groups(losses, 4)
        assert number == 4
        assert group.tolist() == np.repeat([0, 1, 2, 3], 25).tolist()

    def test_the_window_slides_from_easy_to_hard_and_round_again(self):
        losses = np.repeat(np.arange(10.0) * 10, 30)
        sampler = SeTa(300, epochs=100, groups=10, window=0.5)
        starts = []
        for epoch in range(15):
            sampler.update(np.arange(300), losses)
            sampler.start(epoch)
            groups = np.unique(losses[np.sort(sampler.positions())] // 10)
            if epoch == 0:
                assert len(sampler) == 300  # all losses were equal when it was chosen ...
                continue
            assert np.array_equal(groups, groups[0] + np.arange(5))
            starts.append(int(groups[0]))
        assert starts == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]

    def test_over_a_cycle_the_kept_share_is_ratio_times_window(self):
        losses = np.repeat(np.arange(10.0) * 10, 100)
        sampler = SeTa(1000, epochs=10_000, ratio=0.2, groups=10, window=0.5)
        kept = []
        for epoch in range(1, 61):
            sampler.update(np.arange(1000), losses)
            sampler.start(epoch)
            kept.append(len(sampler))
        # Equal groups: every window has half of the random 80 %.
        assert np.mean(kept) == pytest.approx(1000 * 0.8 * 0.5, rel=0.02)

    def test_a_window_over_all_groups_is_plain_random(self):
        sampler = SeTa(100, epochs=50, ratio=0.3, window=1.0)
        sampler.update(np.arange(100), np.random.default_rng(0).random(100))
        for epoch in range(6):
            sampler.start(epoch)
            assert len(sampler) == 70

    def test_the_last_epochs_take_the_random_share_of_everything(self):
        sampler = SeTa(100, epochs=8, ratio=0.1)
        sampler.update(np.arange(100), np.arange(100.0))
        sampler.start(7)
        assert len(sampler) == 90
        assert set(sampler.weights(np.sort(sampler.positions())).tolist()) == {1.0}


@pytest.mark.parametrize("cls", SAMPLERS)
class TestBoth:
    def train(self, sampler, epochs, batch=7, losses_seed=0):
        """What is shown when rows lose a tenth of their loss each time they are shown."""
        rng = np.random.default_rng(losses_seed)
        now, shown = rng.exponential(size=sampler.rows), []
        for epoch in epochs:
            sampler.start(epoch)
            for positions in sampler.batches(batch):
                shown.append((positions.tolist(), sampler.weights(positions).tolist()))
                now[positions] *= 0.9
                sampler.update(torch.from_numpy(positions), torch.from_numpy(now[positions]))
        return shown, now

    def test_rows_that_are_not_shown_keep_their_last_loss(self, cls):
        sampler = cls(100, epochs=20)
        assert (sampler.losses == UNSEEN).all()
        _, now = self.train(sampler, range(6))
        np.testing.assert_allclose(sampler.losses, now, rtol=1e-6)

    def test_ranks_share_an_epoch(self, cls):
        sampler = cls(101, epochs=20)
        self.train(sampler, range(2))
        sampler.start(2)
        for world in (2, 3):
            parts = [list(sampler.batches(4, rank, world)) for rank in range(world)]
            assert len({tuple(len(b) for b in part) for part in parts}) == 1  # equal steps
            rows = np.concatenate([np.concatenate(part) for part in parts])
            assert len(set(rows.tolist())) == len(rows) > len(sampler) - world
            assert set(rows.tolist()) <= set(sampler.positions().tolist())

    def test_a_state_goes_on_where_it_stood(self, cls):
        whole, halves = cls(80, epochs=12, seed=3), cls(80, epochs=12, seed=3)
        expected, _ = self.train(whole, range(9))
        first, now = self.train(halves, range(5))
        again = cls(80, epochs=12, seed=3)
        again.load_state_dict(pickle.loads(pickle.dumps(halves.state_dict())))
        assert again.positions().tolist() == halves.positions().tolist()
        rest = []
        for epoch in range(5, 9):
            again.start(epoch)
            for positions in again.batches(7):
                rest.append((positions.tolist(), again.weights(positions).tolist()))
                now[positions] *= 0.9
                again.update(positions, now[positions])
        assert first + rest == expected

    def test_wrong_uses_are_one_sentence(self, cls):
        sampler = cls(10, epochs=3)
        with pytest.raises(ValueError, match="no epoch was started"):
            list(sampler)
        with pytest.raises(ValueError, match="epoch 3 is not one of 3"):
            sampler.start(3)
        with pytest.raises(ValueError, match="2 rows and 1 losses"):
            sampler.update(np.array([1, 2]), np.array([0.5]))
        with pytest.raises(ValueError, match="1 losses are not finite"):
            sampler.update(np.array([1, 2]), np.array([0.5, np.nan]))
        for row in (-1, 10):
            with pytest.raises(ValueError, match="a row is outside the 10 rows"):
                sampler.update(np.array([1, row]), np.array([0.5, 0.5]))
        assert (sampler.losses == 3).all()
        with pytest.raises(ValueError, match="another schedule: rows 9, here 10"):
            sampler.load_state_dict(cls(9, epochs=3).state_dict())
        for wrong in ({"ratio": 1.0}, {"delta": 2.0}, {"rows": 0}, {"epochs": 0}):
            with pytest.raises(ValueError):
                cls(**{"rows": 10, "epochs": 3, **wrong})

    def test_a_replay_follows_the_recorded_losses_and_says_so(self, cls):
        rng = np.random.default_rng(1)
        recorded = rng.exponential(size=(4, 60))
        sampler = cls(60, epochs=8, seed=2)
        found = list(replay(sampler, recorded))
        assert sampler.is_replay and {e.label for e in found} == {LABEL}
        live = cls(60, epochs=8, seed=2)
        for epoch, replayed in enumerate(found):
            live.start(epoch)
            assert live.positions().tolist() == replayed.positions.tolist()
            assert live.weights(replayed.positions).tolist() == replayed.weights.tolist()
            live.update(live.positions(), recorded[epoch // 2][live.positions()])
        with pytest.raises(ValueError, match=r"are \[epochs, 60\], not \(4, 59\)"):
            next(replay(sampler, recorded[:, 1:]))


def test_recorded_losses_come_from_the_score_table(make_points, points_checkpoints, tmp_path):
    import curate

    corpus = make_points([40, 20])
    scores = curate.score(
        corpus,
        checkpoints=points_checkpoints(steps=(1, 2, 3)),
        scorers="loss",
        keep_checkpoints=True,
        out=tmp_path / "scores",
        engine="local",
        progress=False,
    )
    manifest = curate.select(scores, method="top", budget=25, out=tmp_path / "m")
    found = recorded_losses(scores, manifest)
    assert found.shape == (3, 25)
    table = {
        (s, r): values
        for batch in scores.scan(["shard", "row", "loss_by_checkpoint"])
        for s, r, values in zip(*(c.to_pylist() for c in batch.columns), strict=True)
    }
    rows = [(r["__shard"], r["__row"]) for r in manifest.rows(["x"])]
    np.testing.assert_array_equal(found.T, np.array([table[row] for row in rows], np.float32))
    assert len(list(replay(InfoBatch(25, epochs=6), found))) == 6
    with pytest.raises(ValueError, match="no column 'el2n_by_checkpoint'; score again"):
        recorded_losses(scores, manifest, "el2n")
