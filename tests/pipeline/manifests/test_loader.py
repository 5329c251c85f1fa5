"""Reading a selection: order, sharding over ranks and workers, exact resume, weights, hand-off."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from curate.pipeline.manifests import row_source
from curate.pipeline.manifests import visits as visits_module
from curate.pipeline.manifests.epoch import EpochPlan
from curate.pipeline.manifests.loader import RowSource, load_manifest, order
from curate.pipeline.manifests.manifest import write_manifest, write_parts
from curate.pipeline.manifests.places import CorpusPlaces, placed
from curate.pipeline.manifests.torch_rows import Reading, to_tensors
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.storing.storage import Folder
from curate.selectors.keyed import keyed64, stream_key

ROWS = [130, 1, 269]  # 400 rows; row r of shard s holds x = 1000 s + r


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for i, n in enumerate(ROWS):
        x = np.arange(n) + 1000 * i
        image = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(x, 4), pa.float32()), 4)
        words = pa.array([[int(v)] * (int(v) % 3 + 1) for v in x])
        text = [f"row {v}" for v in x]
        table = pa.table({"x": x, "image": image, "words": words, "text": text})
        pq.write_table(table, folder / f"s{i}.parquet", row_group_size=50)
    return str(folder)


@pytest.fixture
def make_manifest(tmp_path, corpus_path):
    def make(kept: int = 300, kind: str = "none", weights=None):
        corpus = open_corpus(corpus_path)
        chosen = np.sort(np.random.default_rng(1).permutation(corpus.rows)[:kept])
        starts = np.cumsum([0, *ROWS])
        shard = np.searchsorted(starts, chosen, side="right") - 1
        rows = pa.table(
            {
                "shard": pa.array(shard, pa.int32()),
                "row": pa.array(chosen - starts[shard]),
                "weight": pa.array(weights if weights is not None else [1.0] * kept, pa.float32()),
                "rank": pa.nulls(kept, pa.int32()),
            }
        )
        folder = Folder(tmp_path / f"manifest-{kept}-{kind}")
        files, _ = write_parts(folder, rows.to_batches(max_chunksize=37))
        selection = dict(method="top", by="x", direction="high", seed=0, params={}, selected=kept)
        selection["budget"] = {"kind": "rows", "value": kept}
        content = {
            "corpus": corpus.describe(),
            "selection": selection,
            "weight_kind": kind,
            "schedule": None,
            "groups": {},
            "scores": [],
            "files": files,
        }
        write_manifest(folder, content)
        return load_manifest(folder.uri), (1000 * shard + chosen - starts[shard]).tolist()

    return make


class TestOrder:
    @settings(deadline=None, max_examples=60)
    @given(k=st.integers(1, 3000), block=st.integers(1, 40), seed=st.integers(0, 9))
    def test_is_a_permutation_however_it_is_sliced(self, k, block, seed):
        whole = order(k, seed, 3, 0, k, block)
        assert np.array_equal(np.sort(whole), np.arange(k))
        cuts = np.linspace(0, k, 8).astype(int)
        pieces = [order(k, seed, 3, a, b, block) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(pieces), whole)

    def test_changes_with_seed_and_epoch(self):
        first = order(1000, 0, 0, 0, 1000)
        assert not np.array_equal(first, order(1000, 0, 1, 0, 1000))
        assert not np.array_equal(first, order(1000, 1, 0, 0, 1000))
        assert np.array_equal(first, order(1000, 0, 0, 0, 1000))

    def test_is_the_same_for_ever(self):
        # Stored states resume only while this order stands.
        key = stream_key(5, 2, 2)
        expected = sorted(range(10), key=lambda i: int(keyed64(key, np.array([i]))[0]))
        assert order(10, 5, 2, 0, 10).tolist() == expected
        assert expected == [6, 5, 8, 7, 4, 2, 3, 0, 1, 9]

    def test_small_selections_are_shuffled_uniformly(self):
        counts = np.zeros((5, 5))
        for seed in range(3000):
            counts[np.arange(5), order(5, seed, 0, 0, 5)] += 1
        # 600 expected in each cell, standard deviation 22.
        assert np.abs(counts - 600).max() < 110

    def test_touches_one_window_of_blocks_at_a_time(self):
        k, block = 100_000, 16
        window = 64 * block
        places = order(k, 0, 0, 0, 10 * window, block).reshape(10, window)
        for rows in places:
            assert len(np.unique(rows // block)) == 64
        assert len(np.unique(places // block)) == 640


class TestRowSource:
    @pytest.mark.parametrize("cache_bytes", [1 << 30, 5000])
    def test_takes_rows_in_the_order_of_positions(self, make_manifest, monkeypatch, cache_bytes):
        monkeypatch.setattr(row_source, "BLOCK", 32)
        manifest, kept = make_manifest()
        source = RowSource(
            manifest.corpus,
            RowSource.of_manifest(manifest).places,
            ["text", "x"],
            cache_bytes=cache_bytes,
        )
        positions = np.random.default_rng(0).integers(0, 300, 500)
        rows = source.take(positions)
        assert rows["x"].to_pylist() == [kept[p] for p in positions]
        assert rows["text"].to_pylist() == [f"row {kept[p]}" for p in positions]
        assert rows.column_names == ["text", "x", "__shard", "__row", "__weight"]
        identity = 1000 * rows["__shard"].to_numpy() + rows["__row"].to_numpy()
        assert identity.tolist() == rows["x"].to_pylist()
        assert source.take(np.empty(0, np.int64)).num_rows == 0

    def test_whole_corpus_and_streams(self, corpus_path):
        corpus = open_corpus(corpus_path)
        source = RowSource.of_corpus(corpus, ["x"])
        everything = [1000 * s + r for s, n in enumerate(ROWS) for r in range(n)]
        assert len(source) == 400
        for start, stop in [(0, 400), (129, 132), (7, 7), (131, 399)]:
            read = [x for t in source.stream(start, stop, 17) for x in t["x"].to_pylist()]
            assert read == everything[start:stop]

    def test_streams_only_selected_rows_over_wide_gaps(self, make_manifest, monkeypatch):
        monkeypatch.setattr(row_source, "MAX_GAP", 2)
        manifest, kept = make_manifest(60)
        assert [row["x"] for row in manifest.rows(["x"])] == kept

    def test_a_window_of_blocks_is_read_once(self, make_manifest, monkeypatch):
        monkeypatch.setattr(row_source, "BLOCK", 16)
        manifest, _ = make_manifest()
        source = RowSource(manifest.corpus, RowSource.of_manifest(manifest).places, ["x"])
        source.__dict__["_is_small"] = False
        read = []
        original = RowSource._read_block
        monkeypatch.setattr(
            RowSource, "_read_block", lambda self, b: read.append(b) or original(self, b)
        )
        plan = source.plan(0, 0)
        for start in range(0, 300, 25):
            source.take(plan.positions(start, start + 25))
        assert sorted(read) == list(range(-(-300 // 16)))

    def test_unknown_columns_are_named(self, make_manifest):
        manifest, _ = make_manifest()
        with pytest.raises(ValueError, match="no column 'y'; it has: x, image"):
            manifest.as_torch(columns=["y"])

    def test_places_of_a_large_corpus_are_arithmetic(self):
        places = CorpusPlaces([300_000, 0, 5, 1_000_000])
        (last,) = placed(places, 1_299_990, 1_300_005)
        assert last.shard.tolist() == [3] * 15 and last.row[-1] == 999_999
        pieces = list(placed(places, 299_998, 300_007))
        shard = np.concatenate([p.shard for p in pieces])
        row = np.concatenate([p.row for p in pieces])
        assert shard.tolist() == [0] * 2 + [2] * 5 + [3] * 2
        assert row.tolist() == [299_998, 299_999, 0, 1, 2, 3, 4, 0, 1]


class TestWeights:
    def test_repeat_visits_as_often_as_the_weight_says(self, make_manifest):
        counts = np.random.default_rng(2).integers(0, 4, 300)
        manifest, kept = make_manifest(300, "repeat", counts)
        seen = [x for b in manifest.as_torch(batch_size=64) for x in b["x"].tolist()]
        assert Counter(seen) == Counter({x: c for x, c in zip(kept, counts, strict=True) if c})
        assert seen != sorted(seen)

    def test_sampling_draws_with_replacement_at_the_given_rates(self, make_manifest):
        weights = np.random.default_rng(3).exponential(size=300) * (np.arange(300) % 5 > 0)
        manifest, _ = make_manifest(300, "sampling", weights)
        source = RowSource.of_manifest(manifest)
        counts, epochs = np.zeros(300), 400
        for epoch in range(epochs):
            drawn = source.plan(0, epoch).positions(0, 300)
            assert len(drawn) == 300
            counts += np.bincount(drawn, minlength=300)
        expected = epochs * 300 * weights / weights.sum()
        assert (counts[weights == 0] == 0).all()
        live = expected > 5
        # Pearson's statistic has mean n and variance 2n for independent draws.
        pearson = ((counts - expected)[live] ** 2 / expected[live]).sum()
        assert abs(pearson - live.sum()) < 6 * np.sqrt(2 * live.sum())
        # Two visits of one row in one epoch do occur: with replacement.
        assert max(Counter(source.plan(0, 0).positions(0, 300).tolist()).values()) > 1

    def test_sampling_over_several_groups_is_one_multinomial(self, monkeypatch):
        monkeypatch.setattr(visits_module, "CHUNK", 7)

        class Groups:
            starts = np.array([0, 10, 25, 30])

            def group(self, index):
                n = int(self.starts[index + 1] - self.starts[index])
                ones = np.full(n, index + 1.0, np.float32)
                return row_source.Placed(np.zeros(n, np.int32), np.arange(n), ones)

        total = np.zeros(30)
        for epoch in range(300):
            plan = EpochPlan(Groups(), "sampling", 0, epoch, block=4)
            visits = plan.positions(0, plan.length)
            assert len(visits) == 30
            total += np.bincount(visits, minlength=30)
        rate = np.repeat([1, 2, 3], [10, 15, 5]) / 55
        assert np.abs(total - 9000 * rate).max() < 5 * np.sqrt(9000 * rate.max())

    def test_loss_weights_come_with_the_batch(self, make_manifest):
        weights = np.linspace(0.5, 1.5, 300).astype(np.float32)
        manifest, kept = make_manifest(300, "loss", weights)
        of = dict(zip(kept, weights.tolist(), strict=True))
        batch = next(iter(manifest.as_torch(batch_size=50)))
        assert batch["weight"].tolist() == [of[x] for x in batch["x"].tolist()]
        plain, _ = make_manifest()
        assert "weight" not in next(iter(plain.as_torch(batch_size=50)))


def read(dataset, steps=None, workers=0):
    """Return the x of each item and the loader's state after `steps` items."""
    loader, items = dataset.loader(num_workers=workers), []
    for item in loader:
        items.append(np.atleast_1d(item["x"].numpy()).tolist())
        if steps is not None and len(items) == steps:
            break
    return items, loader.state_dict()


def interleaved(ranks):
    """Return the global sequence: step by step, rank by rank."""
    return [x for step in zip(*ranks, strict=True) for batch in step for x in batch]


class TestTorch:
    def test_every_row_once_and_the_sequence_does_not_depend_on_the_ranks(self, make_manifest):
        manifest, kept = make_manifest()
        whole = [x for b in manifest.as_torch(batch_size=12, seed=4) for x in b["x"].tolist()]
        assert sorted(whole) == kept
        for world in (2, 4):
            ranks = [
                read(manifest.as_torch(r, world, batch_size=12 // world, seed=4))[0]
                for r in range(world)
            ]
            assert interleaved(ranks) == whole

    @pytest.mark.parametrize("workers", [1, 3])
    def test_workers_change_nothing(self, make_manifest, workers):
        manifest, _ = make_manifest()
        plain, state = read(manifest.as_torch(batch_size=16))
        threaded, other = read(manifest.as_torch(batch_size=16), workers=workers)
        assert plain == threaded and state == other
        bare = DataLoader(manifest.as_torch(batch_size=16), batch_size=None, num_workers=workers)
        assert [b["x"].tolist() for b in bare] == plain

    def test_resumes_with_other_ranks_workers_and_batch_size(self, make_manifest):
        manifest, kept = make_manifest()
        whole = [x for b in manifest.as_torch(batch_size=300, seed=7) for x in b["x"].tolist()]
        # 4 ranks of 5 with 2 workers each stop after 6 steps: 120 samples are gone.
        first = [read(manifest.as_torch(r, 4, 5, seed=7), 6, workers=2) for r in range(4)]
        states = [state for _, state in first]
        assert states == [{"seed": 7, "epoch": 0, "delivered": 120, "rows": 300}] * 4
        done = interleaved([items for items, _ in first])
        # 3 ranks of 10 with 3 workers, from a state that went through a file.
        rest = []
        for rank in range(3):
            dataset = manifest.as_torch(rank, 3, 10)
            loader = dataset.loader(num_workers=3)
            loader.load_state_dict(pickle.loads(pickle.dumps(states[rank])))
            rest.append([batch["x"].tolist() for batch in loader])
            assert loader.state_dict()["epoch"] == 1
        assert done + interleaved(rest) == whole
        assert sorted(done + interleaved(rest)) == kept

    def test_the_state_counts_what_was_received_not_what_was_prepared(self, make_manifest):
        manifest, _ = make_manifest()
        dataset = manifest.as_torch(batch_size=4)
        loader = dataset.loader(num_workers=2, prefetch_factor=8)
        batches = iter(loader)
        for received in range(1, 6):
            next(batches)
            assert loader.state_dict()["delivered"] == 4 * received

    def test_a_bare_loader_with_workers_does_not_give_a_wrong_state(self, make_manifest):
        manifest, _ = make_manifest()
        dataset = manifest.as_torch(batch_size=4)
        for _ in DataLoader(dataset, batch_size=None, num_workers=2):
            break
        with pytest.raises(RuntimeError, match=r"use dataset\.loader"):
            dataset.state_dict()

    def test_plain_iteration_resumes_and_goes_on_to_the_next_epoch(self, make_manifest):
        manifest, kept = make_manifest()
        dataset = manifest.as_torch(batch_size=32, seed=1)
        epochs = [[x for b in dataset for x in b["x"].tolist()] for _ in range(2)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == kept and epochs[0] != epochs[1]
        again = manifest.as_torch(batch_size=32, seed=1, epoch=1)
        assert next(iter(again))["x"].tolist() == epochs[1][:32]
        assert again.state_dict()["delivered"] == 32
        resumed = manifest.as_torch(batch_size=50)
        resumed.load_state_dict(again.state_dict())
        assert len(resumed) == 6
        assert [x for b in resumed for x in b["x"].tolist()] == epochs[1][32:]
        # Looking at a batch does not use it up: iter begins at the start or at the loaded state.
        assert next(iter(again))["x"].tolist() == epochs[1][:32]

    @settings(deadline=None, max_examples=80)
    @given(
        length=st.integers(1, 200),
        world=st.integers(1, 7),
        batch=st.integers(1, 20),
        start=st.integers(0, 199),
    )
    def test_uneven_ends_drop_less_than_a_rank_each_or_pad(self, length, world, batch, start):
        start = min(start, length)
        for uneven in ("drop", "pad"):
            readings = [Reading(r, world, batch, uneven=uneven) for r in range(world)]
            steps = readings[0].steps(length - start)
            places = []
            for step in range(steps):
                mine = [r.my_places(start, step, length) for r in readings]
                assert len({len(m) for m in mine}) == 1 and 0 < len(mine[0]) <= batch
                places += np.concatenate(mine).tolist()
            left = list(range(start, length))
            if uneven == "drop":
                assert places == left[: len(places)] and len(left) - len(places) < world
            else:
                assert places[: len(left)] == left and len(places) - len(left) < world
                assert all(p < length for p in places)
            assert readings[0].delivered(start, steps, length) == length

    def test_single_rows_for_loaders_that_batch_themselves(self, make_manifest):
        manifest, kept = make_manifest()
        dataset = manifest.as_torch(columns=["x", "image", "text"], seed=3)
        sequence = [int(row["x"]) for row in dataset]
        dataset.set_epoch(0)
        loader = DataLoader(dataset, batch_size=32)
        batches = list(loader)
        assert [x for b in batches for x in b["x"].tolist()] == sequence
        assert batches[0]["image"].shape == (32, 4)
        assert batches[0]["text"][0] == f"row {sequence[0]}"
        assert len(loader) == len(batches)
        dataset.set_epoch(0)
        spread = [x for b in DataLoader(dataset, 16, num_workers=2) for x in b["x"].tolist()]
        assert sorted(spread) == kept
        both = [
            [int(row["x"]) for row in manifest.as_torch(r, 2, columns=["x"], seed=3)]
            for r in range(2)
        ]
        assert [x for pair in zip(*both, strict=True) for x in pair] == sequence

    def test_columns_become_tensors_where_they_can(self, make_manifest):
        manifest, _ = make_manifest()
        batch = next(iter(manifest.as_torch(batch_size=5)))
        assert batch["image"].shape == (5, 4) and batch["image"].dtype == torch.float32
        assert batch["image"][:, 0].tolist() == batch["x"].tolist()
        assert [w[0].item() for w in batch["words"]] == batch["x"].tolist()
        assert [len(w) for w in batch["words"]] == [x % 3 + 1 for x in batch["x"].tolist()]
        assert batch["text"] == [f"row {x}" for x in batch["x"].tolist()]
        nulls = to_tensors(pa.table({"a": [1, None], "b": [True, False], "c": [None, [1]]}))
        assert nulls["a"] == [1, None] and nulls["b"].tolist() == [True, False]
        assert nulls["c"][0] is None and nulls["c"][1].tolist() == [1]

    def test_own_collate_gets_the_arrow_table(self, make_manifest):
        manifest, _ = make_manifest()
        dataset = manifest.as_torch(batch_size=7, collate=lambda rows: rows.num_rows)
        assert list(dataset)[:2] == [7, 7]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
            ({"batch_size": 0}, "at least 1"),
            ({"uneven": "ragged"}, "drop or pad"),
            ({"epoch": -1}, "not be negative"),
        ],
    )
    def test_wrong_settings_are_one_sentence(self, make_manifest, how, message):
        manifest, _ = make_manifest()
        with pytest.raises(ValueError, match=message):
            manifest.as_torch(**how)

    def test_a_state_of_another_selection_is_refused(self, make_manifest):
        large, small = make_manifest()[0], make_manifest(200)[0]
        state = small.as_torch(batch_size=5).state_dict()
        with pytest.raises(ValueError, match="selection of 200 rows, this one has 300"):
            large.as_torch(batch_size=5).load_state_dict(state)


class TestHandOff:
    def test_rows_are_dicts_in_corpus_order(self, make_manifest):
        manifest, kept = make_manifest()
        rows = list(manifest.rows())
        assert [row["x"] for row in rows] == kept
        assert rows[0].keys() == {"x", "image", "words", "text", "__shard", "__row", "weight"}

    def test_datasets_get_the_rows_memory_mapped_with_their_features(self, make_manifest, tmp_path):
        weights = np.linspace(0.5, 1.5, 300)
        manifest, kept = make_manifest(300, "loss", weights)
        for _ in range(2):  # written, then found
            dataset = manifest.as_datasets(cache=tmp_path / "cache")
            assert dataset["x"][:] == kept
            assert dataset.column_names == ["x", "image", "words", "text", "weight"]
            assert np.allclose(dataset["weight"][:], weights)
            assert dataset.cache_files
        assert len(list((tmp_path / "cache").iterdir())) == 1
        assert manifest.as_datasets(["x"], tmp_path / "cache").column_names == ["x", "weight"]

    def test_class_names_survive_in_datasets(self, tmp_path, make_manifest):
        import datasets

        features = datasets.Features({"y": datasets.ClassLabel(names=["no", "yes"])})
        made = datasets.Dataset.from_dict({"y": [0, 1, 1, 0]}, features=features)
        made.to_parquet(tmp_path / "y.parquet")
        corpus = open_corpus(str(tmp_path / "y.parquet"))
        manifest, _ = make_manifest()
        rows = pa.table(
            {
                "shard": pa.array([0, 0], pa.int32()),
                "row": pa.array([1, 3], pa.int64()),
                "weight": pa.nulls(2, pa.float32()),
                "rank": pa.nulls(2, pa.int32()),
            }
        )
        folder = Folder(tmp_path / "labelled")
        files, _ = write_parts(folder, rows.to_batches())
        content = {**manifest.content, "corpus": corpus.describe(), "files": files}
        write_manifest(folder, content)
        dataset = load_manifest(folder.uri).as_datasets(cache=tmp_path / "cache")
        assert dataset.features["y"].names == ["no", "yes"]
        assert dataset["y"][:] == [1, 0]

    def test_a_weight_column_of_the_corpus_is_not_overwritten(self, tmp_path, make_manifest):
        pq.write_table(pa.table({"weight": np.arange(9.0), "x": range(9)}), tmp_path / "w.parquet")
        manifest, _ = make_manifest()
        corpus = open_corpus(str(tmp_path / "w.parquet"))
        manifest._corpus = corpus
        with pytest.raises(ValueError, match="column 'weight' of its own"):
            manifest.as_datasets(cache=tmp_path / "cache")

    @pytest.mark.slow
    @pytest.mark.usefixtures("ray_session")
    def test_ray_streams_the_same_rows(self, make_manifest, monkeypatch, tmp_path):
        from curate.pipeline.manifests import hand_off

        monkeypatch.setattr(hand_off, "SPAN_ROWS", 70)
        manifest, kept = make_manifest()
        rows = manifest.as_ray(["x"], batch_rows=40).take_all()
        assert sorted(row["x"] for row in rows) == kept
        assert all(row["x"] == 1000 * row["__shard"] + row["__row"] for row in rows)
        assert {row["weight"] for row in rows} == {1.0}
