"""Export: exactly the selected rows with their weights, in every format, whatever happens."""

import errno
import gzip
import json
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.exporting import export as module
from curate.pipeline.exporting import plan
from curate.pipeline.exporting.export import export, verify_export
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.rescheduled import schedule
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting.inspect import inspect_export
from curate.pipeline.storing import commit
from curate.pipeline.storing.storage import Folder, NoSpaceError

FORMATS = ("parquet", "jsonl", "datasets", "mds", "webdataset", "megatron")
KINDS = ("none", "loss", "sampling", "repeat")
PLAIN = ["x", "f", "words", "text"]


def rows_of(table: pa.Table) -> list[tuple[int, float]]:
    return list(zip(table["x"].to_pylist(), table["weight"].to_pylist(), strict=True))


def read_parquet(folder: Path) -> list[tuple[int, float]]:
    return rows_of(pq.read_table(folder))  # skips _SUCCESS and hidden folders as any reader does


def read_jsonl(folder: Path) -> list[tuple[int, float]]:
    found = []
    for path in sorted(folder.glob("part-*.jsonl*")):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().decompress(data)
        for line in data.splitlines():
            row = json.loads(line)
            assert row["text"] == f"row {row['x']}" and row["f"] == np.float32(row["x"] / 7)
            found.append((row["x"], row["weight"]))
    return found


def read_datasets(folder: Path) -> list[tuple[int, float]]:
    table = datasets.load_from_disk(str(folder)).with_format("arrow")[:]
    return rows_of(table)


def read_webdataset(folder: Path) -> list[tuple[int, float]]:
    wds = pytest.importorskip("webdataset")
    urls = sorted(str(p) for p in folder.glob("part-*.tar"))
    stream = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    found = []
    for sample in stream:
        row = sample["json"]
        assert sample["picture.png"] == b"\x89PNG%d" % row["x"]
        found.append((row["x"], row["weight"]))
    return found


def read_mds(folder: Path) -> list[tuple[int, float]]:
    """By the layout that the library documents, written anew: index, offsets, sizes, values."""
    found = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        samples = struct.unpack_from("<I", data)[0]
        assert samples == shard["samples"]
        for start, stop in pairwise(struct.unpack_from(f"<{samples + 1}I", data, 4)):
            sample, values = data[start:stop], {}
            open_sizes = sum(size is None for size in shard["column_sizes"])
            sizes = list(struct.unpack_from(f"<{open_sizes}I", sample))
            at = 4 * open_sizes
            for name, size in zip(shard["column_names"], shard["column_sizes"], strict=True):
                length = sizes.pop(0) if size is None else size
                values[name] = sample[at : at + length]
                at += length
            assert at == len(sample)
            x = struct.unpack("<q", values["x"])[0]
            assert values["text"] == b"row %d" % x
            assert np.frombuffer(values["array"], np.float32).tolist() == [x] * 4
            found.append((x, struct.unpack("<f", values["weight"])[0]))
    return found


def read_megatron(folder: Path) -> list[tuple[int, float]]:
    index = json.loads((folder / "documents.json").read_text())
    ids = np.concatenate([np.load(folder / name) for name in index["documents"]])
    weights = np.concatenate([np.load(folder / name) for name in index["weights"]])
    starts = np.array(index["shard_starts"])
    shard = np.searchsorted(starts, ids, side="right") - 1
    x = 1000 * shard + ids - starts[shard]
    return list(zip(x.tolist(), weights.tolist(), strict=True))


READERS = {
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "datasets": read_datasets,
    "webdataset": read_webdataset,
    "mds": read_mds,
    "megatron": read_megatron,
}


def listed(manifest: Manifest) -> list[tuple[int, float]]:
    """What the manifest itself lists: x and weight of each row."""
    return [
        (1000 * s + r, w)
        for batch in manifest.batches()
        for s, r, w in zip(
            *(batch.column(n).to_pylist() for n in ("shard", "row", "weight")), strict=True
        )
    ]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_arrives_once_with_its_weight(make_selection, tmp_path, to, kind):
    manifest = make_selection(kind)
    columns = PLAIN if to == "jsonl" else None
    if kind == "sampling" and to in ("mds", "webdataset"):
        with pytest.raises(ValueError, match="cannot draw by rates"):
            export(manifest, to, tmp_path / "out", columns=columns)
        assert not (tmp_path / "out").exists()
        return
    done = export(manifest, to, tmp_path / "out", columns=columns, unit_rows=70, engine="local")
    expected = listed(manifest)
    if kind == "repeat":
        expected = [(x, 1.0) for x, w in expected for _ in range(int(w))]
    assert READERS[to](tmp_path / "out") == expected
    assert done.rows == len(expected)
    assert done.weight_kind == ("none" if kind == "repeat" else kind)
    assert not verify_export(tmp_path / "out")
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert success["manifest"]["digest"] == manifest.digest


def test_values_of_every_kind_are_copied_as_they_are(make_selection, tmp_path):
    manifest = make_selection()
    corpus = manifest.corpus
    whole = pa.concat_tables(
        [pa.Table.from_batches(list(corpus.read(i))) for i in range(len(corpus.shards))]
    )
    kept = whole.filter(pa.compute.is_in(whole["x"], pa.array([x for x, _ in listed(manifest)])))
    export(manifest, "parquet", tmp_path / "p")
    export(manifest, "datasets", tmp_path / "d")
    for copy in (
        pq.read_table(tmp_path / "p"),
        datasets.load_from_disk(str(tmp_path / "d")).with_format("arrow")[:],
    ):
        for name in whole.column_names:
            assert copy[name].to_pylist() == kept[name].to_pylist()


def test_datasets_can_load_folders_of_parquet_and_json_lines(make_selection, tmp_path):
    manifest = make_selection("loss", kept=30)
    for to in ("parquet", "jsonl"):
        export(manifest, to, tmp_path / to, columns=PLAIN)
        loaded = datasets.load_dataset(str(tmp_path / to), cache_dir=str(tmp_path / "cache"))
        assert loaded["train"]["x"] == [x for x, _ in listed(manifest)]


@pytest.mark.parametrize("to", ["parquet", "mds"])
def test_repeats_may_stay_a_column(make_selection, tmp_path, to):
    manifest = make_selection("repeat")
    done = export(manifest, to, tmp_path / "out", repeats="column")
    assert READERS[to](tmp_path / "out") == listed(manifest)
    assert done.weight_kind == "repeat"


def test_mds_repeats_may_be_streams(make_selection, tmp_path):
    manifest = make_selection("repeat")
    export(manifest, "mds", tmp_path / "out", repeats="streams", unit_rows=100)
    shown: Counter[int] = Counter()
    for stream in json.loads((tmp_path / "out" / "streams.json").read_text())["streams"]:
        for x, weight in read_mds(tmp_path / "out" / stream["local"]):
            assert weight == 1
            shown[x] += stream["repeat"]
    assert shown == {x: int(w) for x, w in listed(manifest) if w}


@pytest.mark.parametrize("to", ["parquet", "megatron"])
@pytest.mark.parametrize("kind", ["none", "loss", "sampling", "repeat"])
def test_an_epoch_is_what_the_loader_shows(make_selection, tmp_path, to, kind):
    manifest = make_selection(kind)
    export(manifest, to, tmp_path / "out", epoch=3, seed=5, unit_rows=90)
    shown = [
        (int(item["x"]), float(item.get("weight", 1.0)))
        for item in manifest.as_torch(seed=5, epoch=3)
    ]
    assert READERS[to](tmp_path / "out") == shown


def test_a_schedule_is_exported_epoch_by_epoch(make_selection, tmp_path):
    manifest = schedule(make_selection(), "rs2", tmp_path / "s", params={"fraction": 0.25})
    with pytest.raises(ValueError, match=r"schedule \(rs2\).*--epoch"):
        export(manifest, "parquet", tmp_path / "out")
    seen: Counter[int] = Counter()
    for epoch in range(4):
        export(manifest, "parquet", tmp_path / f"out{epoch}", epoch=epoch)
        rows = [x for x, _ in read_parquet(tmp_path / f"out{epoch}")]
        assert len(rows) == len(set(rows)) == 75
        seen.update(rows)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_json_lines_are_packed_as_the_corpus_is(tmp_path, make_selection, packing):
    manifest = make_selection(kept=30)
    export(manifest, "jsonl", tmp_path / "first", columns=PLAIN, packing=packing[1:] or "none")
    name = f"part-00000.jsonl{packing}"
    assert (tmp_path / "first" / name).exists()
    corpus = open_corpus(str(tmp_path / "first"))
    again = Manifest(Folder(tmp_path / "again"), {**manifest.content})
    rows = pa.table({"shard": pa.array([0, 0], pa.int32()), "row": [3, 7]})
    rows = rows.append_column("weight", pa.nulls(2, pa.float32()))
    rows = rows.append_column("rank", pa.nulls(2, pa.int32()))
    from curate.pipeline.manifests.manifest import write_manifest, write_parts

    files, _ = write_parts(again.folder, rows.to_batches())
    selection = {**manifest.content["selection"], "selected": 2}
    content = {**manifest.content, "corpus": corpus.describe(), "files": files}
    write_manifest(again.folder, {**content, "selection": selection})
    export(tmp_path / "again", "jsonl", tmp_path / "second", columns=PLAIN)
    assert (tmp_path / "second" / name).exists()
    x = [x for x, _ in listed(manifest)]
    assert read_jsonl(tmp_path / "second") == [(x[3], 1.0), (x[7], 1.0)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".tmp" not in p.parts
    }


@pytest.mark.parametrize("to", FORMATS)
def test_a_stopped_export_goes_on_and_gives_the_same_bytes(
    make_selection, tmp_path, monkeypatch, to
):
    manifest = make_selection("loss")
    columns = PLAIN if to == "jsonl" else None
    export(manifest, to, tmp_path / "whole", columns=columns, unit_rows=60)
    original = module.export_unit

    def failing(job, unit, units, folder):
        if unit.number == 2:
            raise RuntimeError("killed here")
        return original(job, unit, units, folder)

    monkeypatch.setattr(module, "export_unit", failing)
    with pytest.raises(RuntimeError, match="killed here"):
        export(manifest, to, tmp_path / "out", columns=columns, unit_rows=60)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    # Killed between a file and its receipt: the file stays, the receipt is made anew.
    (tmp_path / "out" / ".curate" / "unit-00001.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.is_file()}
    monkeypatch.setattr(module, "export_unit", original)
    export(manifest, to, tmp_path / "out", columns=columns, unit_rows=60)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in before}.items()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_export_is_found_again_and_another_one_is_refused(make_selection, tmp_path):
    manifest, other = make_selection(), make_selection(kept=20, name="other")
    done = export(manifest, "parquet", tmp_path / "out")
    assert export(manifest, "parquet", tmp_path / "out") == done
    with pytest.raises(ValueError, match="an export of other settings"):
        export(manifest, "jsonl", tmp_path / "out", columns=PLAIN)
    with pytest.raises(ValueError, match="an export of another manifest"):
        export(other, "parquet", tmp_path / "out")
    export(other, "parquet", tmp_path / "out", overwrite=True)
    assert read_parquet(tmp_path / "out") == listed(other)


def test_an_export_refused_before_its_first_file_leaves_the_folder_free(
    make_selection, tmp_path, monkeypatch
):
    def refusing(*_):
        raise ValueError("row 0 does not fit the format")

    original = module.export_unit
    monkeypatch.setattr(module, "export_unit", refusing)
    with pytest.raises(ValueError, match="does not fit"):
        export(make_selection(), "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "export_unit", original)
    assert export(make_selection(), "jsonl", tmp_path / "out", columns=PLAIN).to == "jsonl"


def test_an_export_that_lost_its_lock_leaves_the_new_holders_plan(
    make_selection, tmp_path, monkeypatch
):
    def lost(_):
        raise RuntimeError("another run took the folder over")

    monkeypatch.setattr(module.RunLock, "check", lost)
    with pytest.raises(RuntimeError, match="took the folder over"):
        export(make_selection(), "parquet", tmp_path / "out", engine="local")
    assert (tmp_path / "out" / module.PLAN).exists()


def test_damage_is_found(make_selection, tmp_path):
    export(make_selection(), "parquet", tmp_path / "out", unit_rows=60)
    part = tmp_path / "out" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    (tmp_path / "out" / "part-00002.parquet").unlink()
    problems = verify_export(tmp_path / "out")
    assert len(problems) == 2
    assert "part-00001.parquet was changed" in problems[0]
    assert "part-00002.parquet is missing" in problems[1]


def test_a_file_that_the_export_did_not_write_is_found(make_selection, tmp_path):
    out = tmp_path / "out"
    export(make_selection("repeat"), "mds", out, repeats="streams", unit_rows=60)
    (out / ".hidden").touch()  # readers skip it
    assert not verify_export(out)
    strangers = [out / "part-00009.parquet", out / "repeat-00002" / "shard.00099.mds"]
    for path in strangers:
        path.write_bytes(b"one part too many")
    problems = verify_export(out)
    assert [p.split(" is not of this export")[0] for p in problems] == [str(p) for p in strangers]


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}'])
def test_a_success_file_that_is_none_is_said_to_be_damaged(make_selection, tmp_path, text):
    export(make_selection(), "parquet", tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").write_text(text)
    with pytest.raises(ValueError, match="_SUCCESS is damaged"):
        verify_export(tmp_path / "out")
    with pytest.raises(ValueError, match="_SUCCESS is damaged"):
        inspect_export(tmp_path / "out")


class TestBadInput:
    """One sentence each, and nothing half-written."""

    def test_unknown_format(self, make_selection, tmp_path):
        with pytest.raises(ValueError, match="unknown format 'csv'; choose one of: parquet"):
            export(make_selection(), "csv", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_folder_with_other_files(self, make_selection, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
                export(make_selection(), "parquet", tmp_path / "out", overwrite=overwrite)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    def test_a_file_where_the_folder_should_be(self, make_selection, tmp_path):
        (tmp_path / "out").write_text("a file")
        with pytest.raises(ValueError, match="is a file; choose a folder"):
            export(make_selection(), "parquet", tmp_path / "out")

    def test_inside_the_corpus(self, make_selection, tmp_path):
        with pytest.raises(ValueError, match="lies inside the corpus"):
            export(make_selection(), "parquet", tmp_path / "data" / "out")

    def test_a_corpus_that_changed(self, make_selection, tmp_path):
        manifest = make_selection()
        table = pq.read_table(tmp_path / "data" / "s1.parquet")
        pq.write_table(pa.concat_tables([table, table]), tmp_path / "data" / "s1.parquet")
        with pytest.raises(ValueError, match=r"s1.parquet changed since it was recorded"):
            export(manifest.path, "parquet", tmp_path / "out")
        with pytest.raises(ValueError, match="changed since the corpus was opened"):
            export(manifest, "parquet", tmp_path / "out")
        assert not list((tmp_path / "out").glob("part-*"))

    def test_a_full_disk(self, make_selection, tmp_path, monkeypatch):
        manifest, write = make_selection(), commit._write
        left = [15_000]

        def full(path, data):
            left[0] -= len(data)
            if left[0] < 0:
                path.write_bytes(data[:100])  # a part of it gets through
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(commit, "_write", full)
            with pytest.raises(NoSpaceError, match=r"no space left on the device for .*/out/"):
                export(manifest, "mds", tmp_path / "out", unit_rows=60)
        whole = {p.name for p in (tmp_path / "out").glob("shard*")}
        assert 0 < len(whole) < 5
        export(manifest, "mds", tmp_path / "out", unit_rows=60)
        assert read_mds(tmp_path / "out") == listed(manifest)

    def test_a_stranger_under_a_units_name(self, make_selection, tmp_path):
        manifest = make_selection()
        export(manifest, "parquet", tmp_path / "out", unit_rows=60)
        (tmp_path / "out" / "_SUCCESS").unlink()
        (tmp_path / "out" / ".curate" / "unit-00001.json").unlink()
        pq.write_table(pa.table({"y": [1]}), tmp_path / "out" / "part-00001.parquet")
        with pytest.raises(ValueError, match=r"holds 1 rows, .* were written; it is not of this"):
            export(manifest, "parquet", tmp_path / "out", unit_rows=60)

    def test_values_that_a_format_cannot_hold(self, make_selection, tmp_path):
        with pytest.raises(ValueError, match="column 'picture' holds bytes, which jsonl cannot"):
            export(make_selection(), "jsonl", tmp_path / "out")
        with pytest.raises(ValueError, match="has no column 'wrods'"):
            export(make_selection(), "parquet", tmp_path / "out", columns=["wrods"])
        folder = tmp_path / "odd"
        folder.mkdir()
        table = pa.table({"x": [1, 2], "f": [1.0, float("nan")], "t": ["a", None]})
        pq.write_table(table, folder / "a.parquet")
        manifest = make_selection(rows=[0, 1], data="odd", shards=[2], name="odd-m")
        with pytest.raises(ValueError, match="row 1 of shard 0, column 'f': a number is not finit"):
            export(manifest, "jsonl", tmp_path / "out2")
        with pytest.raises(ValueError, match="row 1 of shard 0, column 't': MDS has no null"):
            export(manifest, "mds", tmp_path / "out3")

    def test_options_that_do_not_belong(self, make_selection, tmp_path):
        for wrong, said in (
            ({"packing": "gz"}, "packing is for jsonl"),
            ({"repeats": "streams"}, "repeats as streams are for mds"),
            ({"repeats": "column"}, "repeats column is for weights of kind 'repeat'"),
            ({"unit_rows": 0}, "unit_rows must be at least 1"),
            ({"epoch": -1}, "a number from 0"),
            ({"engine": "spark"}, "engine must be"),
            ({"workers": 0}, "workers must be at least 1"),
            ({"engine": "local", "workers": 2}, "workers and ray_address are for --engine ray"),
        ):
            with pytest.raises(ValueError, match=said):
                export(make_selection(), "parquet", tmp_path / "out", **wrong)

    def test_a_column_called_weight(self, make_selection, tmp_path):
        folder = tmp_path / "heavy"
        folder.mkdir()
        pq.write_table(pa.table({"x": [1, 2], "weight": [70.0, 80.0]}), folder / "a.parquet")
        manifest = make_selection(rows=[0, 1], data="heavy", shards=[2], name="heavy-m")
        with pytest.raises(ValueError, match="column 'weight' of its own"):
            export(manifest, "parquet", tmp_path / "out")
        export(manifest, "parquet", tmp_path / "out", columns=["x"])
        assert read_parquet(tmp_path / "out") == [(1, 1.0), (2, 1.0)]


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(1, 40), max_size=12), most=st.integers(1, 50))
def test_units_cover_the_selection_in_order_and_keep_to_their_size(sizes, most):
    spans = list(plan._spans(sizes, most))
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])][: len(spans)]
    assert sum(b - a for a, b in spans) == sum(sizes)
    assert all(0 < b - a <= most for a, b in spans)


def test_several_workers_ask_for_ray(make_selection, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("ray was asked")

    monkeypatch.setattr("curate.pipeline.exporting.ray_export.export_on_ray", refuse)
    export(make_selection(), "parquet", tmp_path / "one", workers=1)
    with pytest.raises(RuntimeError, match="ray was asked"):
        export(make_selection(), "parquet", tmp_path / "two", workers=2)


def test_ray_gives_the_same_bytes(make_selection, tmp_path, ray_session):
    manifest = make_selection("loss")
    export(manifest, "parquet", tmp_path / "local", unit_rows=60)
    export(manifest, "parquet", tmp_path / "ray", unit_rows=60, engine="ray", workers=2)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    with pytest.raises(ValueError, match="MDS has no null"):
        folder = tmp_path / "odd"
        folder.mkdir()
        pq.write_table(pa.table({"t": ["a", None]}), folder / "a.parquet")
        odd = make_selection(rows=[0, 1], data="odd", shards=[2], name="odd-m")
        export(odd, "mds", tmp_path / "bad", engine="ray")
