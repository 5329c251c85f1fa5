"""Set algebra and mixtures, against Python's sets and dicts."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curate.pipeline.manifests import merge
from curate.pipeline.manifests.algebra import intersect, sample, subtract, union
from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.mixture import mix
from curate.pipeline.manifests.rescheduled import schedule
from curate.pipeline.reporting.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden" / "manifest-v2"
ROWS = st.sets(st.integers(0, 399), min_size=1, max_size=60)
quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def weighted(manifest: Manifest) -> dict[tuple[int, int], float]:
    found = {}
    for batch in manifest.batches():
        columns = (batch.column(n).to_pylist() for n in ("shard", "row", "weight"))
        for shard, row, weight in zip(*columns, strict=True):
            assert (shard, row) not in found
            found[shard, row] = weight
    assert list(found) == sorted(found)
    assert len(found) == len(manifest) == manifest.content["selection"]["budget"]["value"]
    return found


class TestSets:
    @quick
    @given(sets=st.lists(ROWS, min_size=2, max_size=4), kind=st.sampled_from(["none", "loss"]))
    def test_rows_are_those_of_python_sets(self, make_selection, tmp_path, sets, kind):
        for old in tmp_path.glob("m*"):
            shutil.rmtree(old)
        made = [make_selection(kind, rows=sorted(s), name=f"m{i}") for i, s in enumerate(sets)]
        maps = [weighted(m) for m in made]
        keys = [set(m) for m in maps]
        operations = {
            union: set.union(*keys),
            intersect: set.intersection(*keys),
            subtract: keys[0].difference(*keys[1:]),
        }
        for operation, expected in operations.items():
            out = tmp_path / f"m-{operation.__name__}"
            if not expected:
                with pytest.raises(ValueError, match="nothing is left"):
                    operation(made, out)
                assert not (out / "manifest.json").exists()
                continue
            result = operation(made, out)
            found = weighted(load_manifest(out))
            assert set(found) == expected
            assert result.weight_kind == kind
            # The first selection that has a row gives its weight; the mean is 1 again.
            first = {k: next(m[k] for m in maps if k in m) for k in expected}
            mean = np.mean(list(first.values()))
            for key, weight in found.items():
                assert weight == pytest.approx(first[key] / mean, rel=1e-5)

    def test_laws_of_sets_hold(self, make_selection, tmp_path):
        a = make_selection(rows=range(0, 300, 2), name="a")
        b = make_selection(rows=range(0, 300, 3), name="b")
        either, both = union([a, b], tmp_path / "u"), intersect([a, b], tmp_path / "i")
        left = subtract([either, both], tmp_path / "s")
        only_a, only_b = subtract([a, b], tmp_path / "ab"), subtract([b, a], tmp_path / "ba")
        right = union([only_a, only_b], tmp_path / "t")
        assert weighted(left) == weighted(right)

    def test_batches_of_any_size_meet(self, make_selection, tmp_path, monkeypatch):
        a = make_selection(rows=range(0, 400, 2), name="a")
        b = make_selection(rows=range(0, 400, 3), name="b")
        whole = weighted(union([a, b], tmp_path / "whole"))
        read = Manifest.batches

        def tiny(self, columns=None):
            for batch in read(self, columns):
                for start in range(0, batch.num_rows, 7):
                    yield batch.slice(start, 7)

        monkeypatch.setattr(Manifest, "batches", tiny)
        assert weighted(union([b, a], tmp_path / "tiny")) == whole

    def test_only_a_batch_of_each_is_in_hand(self, make_selection, monkeypatch):
        a = make_selection(rows=range(400), name="a")
        sizes = []
        keep = merge._window

        def measured(pieces):
            sizes.append(sum(p.rows.num_rows for p in pieces if p is not None))
            return keep(pieces)

        monkeypatch.setattr(merge, "_window", measured)

        def batches():
            for batch in a.batches(["shard", "row"]):
                for start in range(0, batch.num_rows, 10):
                    yield batch.slice(start, 10)

        assert sum(len(w.keys) for w in merge.windows([batches, batches], [[], []])) == 400
        assert max(sizes) <= 20

    @pytest.mark.parametrize(
        ("rule", "expected"), [("first", 2), ("last", 3), ("sum", 5), ("max", 3), ("min", 2)]
    )
    def test_rules_for_weights(self, make_selection, tmp_path, rule, expected):
        a = make_selection("repeat", rows=[1, 5], weights=[1, 2], name="a")
        b = make_selection("repeat", rows=[5, 9], weights=[3, 4], name="b")
        found = weighted(union([a, b], tmp_path / "u", weights=rule))
        assert list(found.values()) == [1, expected, 4]
        assert list(weighted(intersect([a, b], tmp_path / "i", weights=rule)).values()) == [
            expected
        ]

    def test_counts_add_up_in_a_union_and_meet_in_an_intersection(self, make_selection, tmp_path):
        a = make_selection("repeat", rows=[1, 5], weights=[1, 2], name="a")
        b = make_selection("repeat", rows=[5, 9], weights=[3, 4], name="b")
        assert list(weighted(union([a, b], tmp_path / "u")).values()) == [1, 5, 4]
        assert list(weighted(intersect([a, b], tmp_path / "i")).values()) == [2]

    def test_ids_ranks_and_provenance_stay_where_they_have_a_meaning(
        self, make_selection, tmp_path
    ):
        ranks = np.random.default_rng(0).permutation(100)
        a = make_selection(rows=range(100), ranks=ranks, name="a", has_id=True)
        b = make_selection(rows=range(50, 150), name="b", has_id=True)
        both = intersect([a, b], tmp_path / "i")
        table = pa.Table.from_batches(list(both.batches()))
        assert table["id"].to_pylist() == [f"id{i}" for i in range(50, 100)]
        assert table["rank"].to_pylist() == ranks[50:].tolist()
        assert both.content["selection"]["by"] == "x"
        made_of = both.content["selection"]["params"]["of"]
        assert [m["digest"] for m in made_of] == [a.digest, b.digest]
        table = pa.Table.from_batches(list(union([a, b], tmp_path / "u").batches()))
        assert table.column_names == ["shard", "row", "id", "weight"]
        c = make_selection(rows=range(50, 150), name="c")
        table = pa.Table.from_batches(list(subtract([a, c], tmp_path / "s").batches()))
        assert table["id"].to_pylist() == [f"id{i}" for i in range(50)]

    def test_a_sample_is_a_part_of_the_right_size(self, make_selection, tmp_path):
        a = make_selection("loss", kept=200, name="a", has_id=True)
        b = make_selection(kept=30, name="b", seed=9)
        like = weighted(sample(a, b, tmp_path / "like", seed=4))
        small = weighted(sample(a, out=tmp_path / "small", budget=10, seed=4))
        assert len(like) == 30 and len(small) == 10
        assert set(small) < set(like) < set(weighted(a))
        assert np.mean(list(like.values())) == pytest.approx(1, rel=1e-6)
        assert len(weighted(sample(a, out=tmp_path / "half", budget="50%"))) == 100
        other = weighted(sample(a, b, tmp_path / "other", seed=5))
        assert set(other) != set(like)

    def test_every_row_is_sampled_equally_often(self, make_selection, tmp_path):
        a, seen = make_selection(rows=range(100, 120), name="a"), Counter()
        for seed in range(120):
            seen.update(weighted(sample(a, out=tmp_path / f"s{seed}", budget=5, seed=seed)))
        # 30 expected for each row, standard deviation 4.7.
        assert len(seen) == 20 and max(abs(n - 30) for n in seen.values()) < 24

    def test_the_same_again_is_found_and_anything_else_is_refused(self, make_selection, tmp_path):
        a, b = make_selection(kept=50, name="a"), make_selection(kept=200, name="b", seed=5)
        first = union([a, b], tmp_path / "u")
        assert union([a, b], tmp_path / "u").content == first.content
        with pytest.raises(ValueError, match="holds another selection"):
            intersect([a, b], tmp_path / "u")
        gone = make_selection(rows=[399], name="gone"), make_selection(rows=[0], name="zero")
        with pytest.raises(ValueError, match="nothing is left"):
            intersect(gone, tmp_path / "u", overwrite=True)
        assert load_manifest(tmp_path / "u").content == first.content  # not deleted for nothing
        intersect([a, b], tmp_path / "u", overwrite=True)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
            union([a, b], tmp_path / "full")

    def test_bad_requests_are_one_sentence(self, make_selection, tmp_path):
        a = make_selection(kept=50, name="a")
        far = make_selection(kept=50, name="far", data="other", offset=5000)
        loss = make_selection("loss", kept=50, name="loss")
        out = tmp_path / "out"
        with pytest.raises(ValueError) as said:
            union([a, far], out)
        for place in (a.path, far.path, str(tmp_path / "data"), str(tmp_path / "other")):
            assert place in str(said.value)
        assert "not the same data" in str(said.value)
        with pytest.raises(ValueError, match=r"kind 'none' and .* of kind 'loss'.*do not combine"):
            union([a, loss], out)
        with pytest.raises(ValueError, match="at least 2 manifests; 1 given"):
            union([a], out)
        with pytest.raises(ValueError, match="unknown rule 'best'"):
            union([a, a], out, weights="best")
        with pytest.raises(ValueError, match="is one of the manifests to read"):
            union([a, make_selection(kept=9, name="z")], a.path)
        for options, text in (
            ({}, "say how many rows"),
            ({"budget": "1e3tok"}, "does not count tokens"),
            ({"budget": 51}, "more than the 50 rows"),
        ):
            with pytest.raises(ValueError, match=text):
                sample(a, out=out, **options)
        assert not out.exists() or not list(out.iterdir())
        part = Path(a.path) / "part-00000.parquet"
        part.write_bytes(part.read_bytes()[:-1] + b"?")
        with pytest.raises(ValueError, match="was changed"):
            union([a.path, loss.path], out)


class TestMixture:
    def pair(self, make_selection, kinds=("none", "none"), kept=(200, 60), **options):
        first = make_selection(kinds[0], kept[0], name="a", **options)
        return first, make_selection(
            kinds[1], kept[1], name="b", data="other", offset=50_000, shards=[40, 100], **options
        )

    def test_rates_give_the_proportions(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        mixed = load_manifest(mix([a, b], [3, 1], tmp_path / "m").path)
        assert mixed.content["version"] == 2 and mixed.weight_kind == "sampling"
        weight = weighted(mixed)
        of_a = [w for (shard, _), w in weight.items() if shard < 3]
        of_b = [w for (shard, _), w in weight.items() if shard >= 3]
        assert len(of_a) == 200 and len(of_b) == 60
        assert sum(of_a) / (sum(of_a) + sum(of_b)) == pytest.approx(0.75, rel=1e-6)
        assert np.mean(of_a + of_b) == pytest.approx(1, rel=1e-6)
        shown = [int(r["x"]) for e in range(40) for r in mixed.as_torch(epoch=e, columns=["x"])]
        # 10 400 draws: standard deviation of the share 0.0042.
        assert np.mean(np.array(shown) < 50_000) == pytest.approx(0.75, abs=0.02)

    def test_own_rates_multiply(self, make_selection, tmp_path):
        a, b = self.pair(make_selection, kinds=("sampling", "none"))
        weight = weighted(mix([a, b], [1, 1], tmp_path / "m"))
        own = weighted(a)
        ratio = {weight[key] / own[key] for key in own if own[key] > 0}
        assert max(ratio) == pytest.approx(min(ratio), rel=1e-5)

    def test_rows_of_every_corpus_arrive(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        mixed = mix([a, b], [1, 2], tmp_path / "m", by="loss")
        expected = {r["x"]: r["text"] for m in (a, b) for r in m.rows(["x", "text"])}
        rows = load_manifest(mixed.path).as_torch(batch_size=16, columns=["x", "text"])
        seen = [
            (int(x), t, float(w))
            for batch in rows
            for x, t, w in zip(batch["x"], batch["text"], batch["weight"], strict=True)
        ]
        assert {x: t for x, t, _ in seen} == expected and len(seen) == 260
        assert verify(mixed.path)["problems"] == []
        share = sum(w for x, _, w in seen if x < 50_000) / sum(w for _, _, w in seen)
        assert share == pytest.approx(1 / 3, rel=1e-5)

    @quick
    @given(shares=st.tuples(st.floats(0.05, 5), st.floats(0.05, 5)))
    def test_rows_in_proportion(self, make_selection, tmp_path, shares):
        for old in tmp_path.glob("*"):
            shutil.rmtree(old)
        a, b = self.pair(make_selection)
        mixed = mix([a, b], shares, tmp_path / "m", by="rows")
        counts = [
            sum(s < 3 for s, _ in weighted(mixed)),
            sum(s >= 3 for s, _ in weighted(mixed)),
        ]
        total = sum(counts)
        for count, share, most in zip(counts, shares, (200, 60), strict=True):
            assert abs(count - total * share / sum(shares)) < 1
            assert count <= most
        assert (
            counts[0] == 200
            or counts[1] == 60
            or total + 1 > min(200 * sum(shares) / shares[0], 60 * sum(shares) / shares[1])
        )
        assert set(weighted(a)) >= {k for k in weighted(mixed) if k[0] < 3}

    @pytest.mark.parametrize("shares", [(0.9, 0.1), (9, 1), (0.45, 0.05)])
    def test_rows_that_stand_in_the_proportions_are_all_kept(
        self, make_selection, tmp_path, shares
    ):
        # As floats 0.1 is a little more than a tenth, so that 100 rows would be one too many.
        a, b = self.pair(make_selection, kept=(90, 10))
        mixed = mix([a, b], shares, tmp_path / "m", by="rows", budget=100)
        assert len(weighted(mixed)) == 100
        assert len(weighted(mix([a, b], shares, tmp_path / "n", by="rows"))) == 100

    def test_cooldown_takes_the_corpora_for_groups(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        mixed = mix([a, b], [1, 1], tmp_path / "m", by="rows", budget=100)
        uneven = mix([a, b], [4, 1], tmp_path / "n", by="rows", budget=100)
        for manifest, hot in ((mixed, 50), (uneven, 57)):
            cooled = schedule(manifest, "cooldown", f"{manifest.path}-c", epochs=2)
            shown = [int(r["x"]) for r in load_manifest(cooled.path).as_torch(epoch=0)]
            assert sum(x < 50_000 for x in shown) == hot  # 80^(1/5) : 20^(1/5) is 57 : 43

    def test_columns_that_not_all_have_are_left_out_aloud(self, make_selection, tmp_path, caplog):
        a, _ = self.pair(make_selection)
        folder = tmp_path / "third"
        folder.mkdir()
        pq.write_table(pa.table({"x": pa.array([7], pa.int32()), "z": ["?"]}), folder / "a.parquet")
        c = make_selection(rows=[0], data="third", shards=[1], name="c")
        with caplog.at_level("WARNING", "curate"):
            mixed = mix([a, c], [1, 1], tmp_path / "m")
        assert "columns that not all corpora have: array" in caplog.text
        assert mixed.corpus.schema.names == ["x"]
        assert str(mixed.corpus.schema.field("x").type) == "int64"
        assert {r["x"] for r in mixed.rows()} >= {7}

    def test_a_corpus_that_changed_is_named(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        mixed = mix([a, b], [1, 1], tmp_path / "m")
        path = tmp_path / "other" / "s1.parquet"
        pq.write_table(pq.read_table(path).slice(1), path)
        with pytest.raises(ValueError, match=r"s1.parquet changed since it was recorded"):
            load_manifest(mixed.path)

    def test_moved_corpora_are_said_line_by_line(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        mixed = mix([a, b], [1, 1], tmp_path / "m")
        shutil.move(tmp_path / "other", tmp_path / "moved")
        found = load_manifest(mixed.path, f"{tmp_path / 'data'}\n{tmp_path / 'moved'}")
        assert sum(1 for _ in found.rows(["x"])) == 260

    def test_bad_requests_are_one_sentence(self, make_selection, tmp_path):
        a, b = self.pair(make_selection)
        loss = make_selection("loss", name="loss")
        out = tmp_path / "out"
        for paths, shares, options, said in (
            ([a], [1], {}, "at least two"),
            ([a, b], [1], {}, "1 proportions for 2 manifests"),
            ([a, b], [1, 0], {}, "positive numbers"),
            ([a, b], [1, float("nan")], {}, "positive numbers"),
            ([a, make_selection(kept=5, name="z")], [1, 1], {}, "of one corpus; unite them"),
            ([loss, b], [1, 1], {}, "of kind 'loss', which do not combine with a mixture by sam"),
            ([a, b], [1, 1], {"by": "magic"}, "by one of: sampling, loss, rows"),
            ([a, b], [1, 1], {"budget": 5}, "--budget is for --by rows"),
            ([a, b], [1, 1], {"by": "rows", "budget": 121}, "at most 120"),
            ([a, b], [1000, 1], {"by": "rows", "budget": 10}, "would give no row"),
        ):
            with pytest.raises(ValueError, match=said):
                mix(paths, shares, out, **options)
            assert not out.exists() or not list(out.iterdir())


def test_the_golden_manifest_of_version_2_reads_as_it_was_written():
    found = Manifest.read(GOLDEN)
    found.check_files()
    assert found.content["version"] == 2
    assert found.content["schedule"] == {
        "rule": "cooldown",
        "seed": 0,
        "epochs": 4,
        "params": {
            "groups": ["/data/a", "/data/b"],
            "rows": [2, 3],
            "temperature": 5.0,
            "hot": 0.5,
        },
    }
    corpus = found.content["corpus"]
    assert [(p["uri"], p["rows"], p["shards"]) for p in corpus["parts"]] == [
        ("/data/a", 16, 2),
        ("/data/b", 8, 1),
    ]
    rows = pa.Table.from_batches(list(found.batches()))
    assert [(f.name, str(f.type)) for f in rows.schema] == [
        ("shard", "int32"),
        ("row", "int64"),
        ("weight", "float"),
        ("group", "int32"),
    ]
    assert rows.to_pydict() == {
        "shard": [0, 1, 2, 2, 2],
        "row": [1, 7, 0, 2, 5],
        "weight": [1.0] * 5,
        "group": [0, 0, 1, 1, 1],
    }
    assert json.loads((GOLDEN / "manifest.json").read_text()) == found.content
