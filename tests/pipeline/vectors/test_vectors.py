"""`--vectors`: every source gives the rows' own vectors in the table's order, or one sentence."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import cli
from curate.pipeline.manifests.select import select
from curate.pipeline.vectors.resolve import find_source
from curate.pipeline.vectors.source import Wanted
from curate.selectors.vectors import ArrayVectors, finite_rows, matrix, part_of, unit_rows


def read(text, scores, **more):
    return find_source(text, Wanted(scores, **more)).read()


class TestReading:
    def test_blocks_take_and_parts_are_the_array(self, monkeypatch):
        monkeypatch.setattr("curate.selectors.vectors.BLOCK_ROWS", 7)
        array = np.random.default_rng(0).normal(size=(30, 3))
        for kind in (np.float64, np.float32, np.float16, np.int32):
            vectors = ArrayVectors((10 * array).astype(kind))
            expected = (10 * array).astype(kind).astype(np.float32)
            assert [len(b) for b in vectors.blocks()] == [7, 7, 7, 7, 2]
            assert all(b.dtype == np.float32 for b in vectors.blocks())
            assert np.array_equal(matrix(vectors), expected)
            for places in ([3, 1, 29], [4, 5, 6], [], [2]):
                found = vectors.take(np.array(places, dtype=np.int64))
                assert np.array_equal(found, expected[places]) and found.dtype == np.float32
            places = np.array([0, 5, 6, 28])
            for small in (0, 1 << 20):
                monkeypatch.setattr("curate.selectors.vectors.SMALL_BYTES", small)
                part = part_of(vectors, places)
                assert np.array_equal(matrix(part), expected[places])
                assert np.array_equal(part.take(np.array([2, 0])), expected[[6, 0]])

    def test_rows_that_are_not_finite_are_known_and_zero_has_no_direction(self):
        array = np.array([[1, 2], [np.nan, 0], [0, np.inf], [0, 0]], dtype=np.float32)
        assert finite_rows(ArrayVectors(array)).tolist() == [True, False, False, True]
        assert np.allclose(unit_rows(array[[0, 3]]), [[1 / 5**0.5, 2 / 5**0.5], [0, 0]])

    def test_what_is_no_matrix_of_numbers_is_refused(self):
        for wrong in (np.zeros(3), np.zeros((3, 0)), np.zeros((2, 2), dtype=complex)):
            with pytest.raises(ValueError, match=r"\[rows, dimensions\]"):
                ArrayVectors(wrong)


class TestSources:
    def test_columns_come_in_the_order_of_the_table(self, scores, points):
        assert np.array_equal(matrix(read("column:fixed", scores)), points)
        found = matrix(read("column:lists", scores))
        gone = [0, 1, 41, 77]
        assert np.isnan(found[gone]).all()
        there = np.setdiff1d(np.arange(100), gone)
        assert np.array_equal(found[there], points[there])

    def test_a_wrong_column_is_one_sentence(self, scores):
        for name, said in (
            ("nothing", "no column 'nothing'"),
            ("label", "int64, not lists of numbers"),
        ):
            with pytest.raises(ValueError, match=said):
                read(f"column:{name}", scores)
        with pytest.raises(ValueError, match=r"3 numbers in row 60 .* and 2 in the rows before"):
            read("column:ragged", scores)

    def test_temporary_files_go_with_the_vectors(self, scores, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        vectors = read("column:fixed", scores)
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        del vectors
        assert not list((tmp_path / "tmp").iterdir())

    def test_a_file_is_mapped_and_must_have_a_vector_for_each_row(self, scores, points, tmp_path):
        path = tmp_path / "v.npy"
        np.save(path, points.astype(np.float16))
        vectors = read(str(path), scores)
        assert isinstance(vectors.array.base, np.memmap)
        assert np.array_equal(matrix(vectors), points.astype(np.float16).astype(np.float32))
        np.save(path, points[:99])
        with pytest.raises(ValueError, match=r"99 vectors, the score table .* has 100 rows"):
            read(str(path), scores)
        assert read(str(path), scores, is_target=True).rows == 99
        with pytest.raises(ValueError, match=r"99 vectors, the target .* has 100 rows"):
            read(str(path), scores, is_target=True, elsewhere=scores.corpus["uri"])
        with pytest.raises(ValueError, match="no such file or folder"):
            read(str(path), scores, is_target=True, elsewhere=str(tmp_path / "none"))
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(str(path), scores)
        path.write_text("hello")
        with pytest.raises(ValueError, match="not written by numpy"):
            read(str(path), scores)
        np.save(path, np.array(["a"] * 100))
        with pytest.raises(ValueError, match="no array of vectors"):
            read(str(path), scores)
        with pytest.raises(ValueError, match="there is no file"):
            read(str(tmp_path / "w.npy"), scores)

    def test_hashes_are_equal_where_values_are(self, scores, corpus):
        texts = pq.read_table(corpus)["text"].to_pylist()
        found = matrix(read("hash:text", scores))
        for i in range(0, 100, 7):
            same = [(found[i] == found[j]).all() for j in range(100)]
            assert same == [t is not None and t == texts[i] for t in texts]
        assert np.isnan(found[5]).all()

    def test_nothing_else_is_a_source(self, scores):
        for text in ("", "foo", "columns:x", "v.npz"):
            with pytest.raises(ValueError, match="names no vectors; give embedding"):
                read(text, scores)
        with pytest.raises(ValueError, match="has no store 'embedding'"):
            read("embedding", scores)


class TestEncoder:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "vectors"

    def test_vectors_are_the_mean_of_the_last_layer_whatever_the_batch(
        self, scores, corpus, encoder_folder, monkeypatch
    ):
        import torch
        from transformers import AutoModel, AutoTokenizer

        monkeypatch.setattr("curate.pipeline.vectors.sentences.BATCH_TEXTS", 5)
        found = matrix(read(f"encoder:{encoder_folder}", scores))
        model = AutoModel.from_pretrained(encoder_folder).eval().double()
        tokens = AutoTokenizer.from_pretrained(encoder_folder)
        texts = pq.read_table(corpus)["text"].to_pylist()
        assert np.isnan(found[5]).all()
        for i in (0, 1, 40, 41, 99):  # each alone, in float64, without padding
            with torch.no_grad():
                states = model(torch.tensor([tokens(texts[i])["input_ids"]]))[0][0]
            mean = states.mean(0)
            # float32 against float64 through two layers
            assert found[i] == pytest.approx((mean / mean.norm()).numpy(), abs=2e-6)

    @pytest.mark.slow
    def test_they_are_made_once_and_anew_for_another_encoder(
        self, scores, encoder_folder, cache, monkeypatch, tmp_path
    ):
        import shutil

        first = matrix(read(f"encoder:{encoder_folder}@text", scores))
        (kept,) = cache.iterdir()
        monkeypatch.setattr(
            "curate.pipeline.vectors.encoder.SentenceEncoder.load",
            lambda folder: pytest.fail("encoded again"),
        )
        assert np.array_equal(
            matrix(read(f"encoder:{encoder_folder}", scores)), first, equal_nan=True
        )
        monkeypatch.undo()
        monkeypatch.setenv("CURATE_CACHE", str(cache.parent))
        other = shutil.copytree(encoder_folder, tmp_path / "other")
        (other / "1_Pooling").mkdir()
        said = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (other / "1_Pooling" / "config.json").write_text(json.dumps(said))
        second = matrix(read(f"encoder:{other}", scores))
        assert len(list(cache.iterdir())) == 2
        assert not np.allclose(first, second, equal_nan=True)
        assert kept.exists()

    def test_a_run_that_fails_leaves_no_file(self, scores, encoder_folder, cache, monkeypatch):
        from curate.pipeline.vectors.sentences import SentenceEncoder

        calls = []

        def failing(self, texts):
            calls.append(len(texts))
            raise RuntimeError("out of memory")

        monkeypatch.setattr(SentenceEncoder, "encode", failing)
        with pytest.raises(RuntimeError):
            read(f"encoder:{encoder_folder}", scores)
        assert calls and not list(cache.iterdir())

    def test_what_cannot_be_run_is_one_sentence(self, scores, encoder_folder, tmp_path):
        import shutil

        with pytest.raises(ValueError, match="is no encoder"):
            read(f"encoder:{tmp_path}", scores)
        with pytest.raises(ValueError, match=r"the texts of .* are: text"):
            read(f"encoder:{encoder_folder}@label", scores)
        at = shutil.copytree(encoder_folder, tmp_path / "mail@home")
        assert find_source(f"encoder:{at}", Wanted(scores)).folder == str(at)
        other = shutil.copytree(encoder_folder, tmp_path / "dense")
        modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
        (other / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ValueError, match="module 'Dense'"):
            read(f"encoder:{other}", scores)


class TestSelect:
    def select(self, scores, tmp_path, **more):
        asked = {"method": "kcenter", "budget": 10, "vectors": "column:fixed", **more}
        return select(scores, out=tmp_path / asked.pop("name", "m"), **asked)

    def test_the_manifest_says_which_vectors(self, scores, tmp_path, corpus):
        manifest = self.select(scores, tmp_path, target_vectors="column:fixed", target=corpus)
        params = manifest.content["selection"]["params"]
        assert params["vectors"]["source"] == "column:fixed"
        assert params["vectors"]["digest"] == scores_digest(corpus)
        assert params["target_vectors"]["source"] == "column:fixed"
        assert len(manifest) == 10 and params["radius"] == 0  # all rows are there already

    def test_the_same_call_finds_its_manifest_and_other_vectors_are_refused(
        self, scores, tmp_path, points
    ):
        np.save(tmp_path / "v.npy", points)
        first = self.select(scores, tmp_path, vectors=str(tmp_path / "v.npy"))
        before = Path(first.path, "manifest.json").stat().st_mtime_ns
        self.select(scores, tmp_path, vectors=str(tmp_path / "v.npy"))
        assert Path(first.path, "manifest.json").stat().st_mtime_ns == before
        points[0] += 1
        np.save(tmp_path / "v.npy", points)
        with pytest.raises(ValueError, match="holds another selection"):
            self.select(scores, tmp_path, vectors=str(tmp_path / "v.npy"))

    def test_failed_rows_and_rows_without_a_vector_are_never_chosen(self, scores, tmp_path):
        manifest = self.select(scores, tmp_path, vectors="column:lists", budget=95)
        rows = pa.Table.from_batches(manifest.batches(["shard", "row"])).to_pylist()
        places = {(r["shard"], r["row"]) for r in rows}
        assert len(places) == 95
        assert not places & {(0, 0), (0, 1), (0, 3), (2, 0), (2, 36)}

    def test_a_score_is_used_only_where_it_is_named(self, scores, tmp_path):
        plain = self.select(scores, tmp_path, method="semdedup", name="a", budget=None)
        assert plain.content["selection"]["by"] is None
        scored = self.select(scores, tmp_path, method="semdedup", name="b", budget=None, by="el2n")
        assert scored.content["selection"]["by"] == "el2n"
        assert scored.content["selection"]["direction"] == "high"
        assert plain.summary["score"]["column"] == "el2n"

    def test_what_does_not_fit_together_is_one_sentence(self, scores, tmp_path):
        for more, said in (
            ({"vectors": None}, "compares the rows' vectors: say which, --vectors"),
            ({"method": "keep"}, "makes no use of --vectors"),
            ({"target": "x"}, "--target names a corpus"),
            ({"target_vectors": "column:fixed"}, "made without one; name it by --target"),
            ({"method": "semdedup", "target_vectors": "v.npy"}, "no use of --target-vectors"),
            ({"method": "greedy_alignment"}, "name its vectors by --target-vectors"),
        ):
            with pytest.raises(ValueError, match=re.escape(said)):
                self.select(scores, tmp_path, **more)

    def test_a_target_of_another_dimension_is_refused(self, scores, tmp_path):
        np.save(tmp_path / "t.npy", np.zeros((4, 5)))
        with pytest.raises(ValueError, match="5 dimensions"):
            self.select(scores, tmp_path, target_vectors=str(tmp_path / "t.npy"))

    @pytest.mark.parametrize("method", ["kcenter", "facility_location", "herding", "semdedup"])
    def test_the_same_command_writes_the_same_bytes(self, scores, tmp_path, method):
        found = [
            self.select(scores, tmp_path, method=method, name=name, by_group="label")
            for name in ("a", "b")
        ]
        assert found[0].content["files"] == found[1].content["files"]
        counts = [v["kept"] for v in found[0].content["groups"].values()]
        assert sorted(counts) == [3, 3, 4]

    def test_the_command_line_says_what_is_wrong_in_one_line(
        self, scores, tmp_path, monkeypatch, capsys
    ):
        command = ["curate", "select", str(scores.path), "--method", "kcenter", "--budget", "10"]
        command += ["-o", str(tmp_path / "m"), "--vectors"]
        for source, code in (("column:label", 2), ("column:fixed", 0)):
            monkeypatch.setattr("sys.argv", [*command, source])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert (ended.value.code or 0) == code
        assert "column 'label'" in capsys.readouterr().err


def scores_digest(corpus):
    from curate.pipeline.reading.corpus import open_corpus

    return open_corpus(corpus).digest
