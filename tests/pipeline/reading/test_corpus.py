"""The corpus finds its shards in one order, refuses what does not fit, and notices changed data."""

import copy
import gzip
import os
import pickle
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc

from curate.pipeline.reading import corpus as corpus_module
from curate.pipeline.reading import fingerprint, hub
from curate.pipeline.reading.corpus import Corpus, open_corpus


def table(first: int, rows: int = 100) -> pa.Table:
    ids = range(first, first + rows)
    return pa.table({"id": list(ids), "label": [i % 3 for i in ids], "text": [str(i) for i in ids]})


def ids(corpus: Corpus) -> list[int]:
    shards = range(len(corpus.shards))
    return [i for s in shards for b in corpus.read(s, columns=["id"]) for i in b["id"].to_pylist()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three Parquet shards, one of them deeper, among files that are none."""
    place = tmp_path / "data"
    (place / "b").mkdir(parents=True)
    for i, name in enumerate(["a.parquet", "b/x.parquet", "c.parquet"]):
        pq.write_table(table(100 * i), place / name, row_group_size=30)
    for name in (
        "README.md",
        ".hidden.parquet",
        "_metadata.parquet",
        "b/.crc",
        "dataset_info.json",
    ):
        (place / name).write_text("{}")
    return place


def only_error(*args: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        open_corpus(*args, **options)  # type: ignore[arg-type]
    said = str(caught.value)
    assert "\n" not in said
    return said


# --- finding shards ---------------------------------------------------------------------------


def test_a_folder_is_its_visible_files_in_path_order(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert [s.path for s in corpus.shards] == ["a.parquet", "b/x.parquet", "c.parquet"]
    assert corpus.uri == corpus.root == str(folder)
    assert corpus.format == "parquet"
    assert corpus.rows == 300
    assert ids(corpus) == list(range(300))


def test_every_way_to_name_the_files_gives_the_same_corpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    expected = open_corpus(folder)
    listed = [folder / "c.parquet", folder / "a.parquet", folder / "b"]
    for uri in (
        "data",
        "data/",
        f"file://{folder}",
        str(folder / "**/*.parquet"),
        "data/**/[abx].parquet;data/c*".split(";"),
        listed,
        open_corpus(listed).uri,
    ):
        corpus = open_corpus(uri)
        assert corpus.digest == expected.digest
        assert corpus.root == expected.root
    one = open_corpus("data/b/x.parquet")
    assert (one.root, one.shards[0].path) == (str(folder / "b"), "x.parquet")
    assert open_corpus("data/*.parquet").rows == 200


def test_linked_shards_and_folders_are_read_once(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.parquet").symlink_to(folder / "a.parquet")
    (links / "deep").symlink_to(folder / "b")
    (links / "loop").symlink_to(links)
    assert [s.path for s in open_corpus(links).shards] == ["a.parquet", "deep/x.parquet"]


def test_bad_places_are_answered_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert only_error(tmp_path / "none") == f"no such file or folder: {tmp_path / 'none'}"
    assert "holds no file to read" in only_error(tmp_path / "empty")
    assert "holds no file to read" in only_error(tmp_path / "*.parquet")
    assert "does not exist or is empty" in only_error(f"memory://{uuid.uuid4().hex}")
    assert "cannot tell the format of" in only_error(tmp_path / "notes.txt")
    assert only_error([]).startswith("no corpus given")
    assert "listed twice" in only_error([folder, folder / "a.parquet"])
    assert "cannot open nosuch://x" in only_error("nosuch://x")
    assert "has no splits" in only_error(folder, split="train")
    (folder / "d.jsonl").write_text('{"id": 1}\n')
    said = only_error(folder)
    assert "a.parquet (parquet)" in said and "d.jsonl (json)" in said


def test_a_corpus_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(table(0, 0), tmp_path / "a.parquet")
    assert only_error(tmp_path) == f"{tmp_path} has no rows"
    pq.write_table(table(0, 5), tmp_path / "b.parquet")
    assert [s.rows for s in open_corpus(tmp_path).shards] == [0, 5]
    assert ids(open_corpus(tmp_path)) == list(range(5))


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("form", ["parquet", "arrow", "stream.arrow"])
def test_a_truncated_shard_is_named(tmp_path: Path, form: str, part: float) -> None:
    path = tmp_path / f"bad.{form}"
    if form == "parquet":
        pq.write_table(table(0), path)
    else:
        opened = ipc.new_stream if form == "stream.arrow" else ipc.new_file
        with opened(path, table(0).schema) as writer:
            writer.write_table(table(0), max_chunksize=10)
    os.truncate(path, int(path.stat().st_size * part))
    said = only_error(tmp_path)
    assert f"bad.{form}" in said
    assert "truncated or damaged" in said


def test_a_shard_with_its_middle_cut_out_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    noise = [np.random.default_rng(i).bytes(100) for i in range(1000)]
    pq.write_table(pa.table({"x": noise}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + whole[90_000:])
    assert "cut.parquet" in only_error(tmp_path)


def test_a_damaged_page_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bent.parquet"
    pq.write_table(table(0, 5000), path, write_page_checksum=True, compression="none")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    corpus = open_corpus(tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot read shard .*bent\.parquet: .*truncated or damag"
    ):
        list(corpus.read(0))
    with pytest.raises(ValueError, match=r"cannot read shard .*bent\.parquet"):
        corpus.take(0, np.arange(5000))


def test_different_schemas_name_both_shards_and_the_column(folder: Path) -> None:
    odd = table(0).set_column(1, "label", pa.array(["x"] * 100))
    pq.write_table(odd, folder / "c.parquet")
    said = only_error(folder)
    assert "'label' is int64" in said and "but string in" in said
    assert "a.parquet" in said and "c.parquet" in said
    pq.write_table(table(0).drop(["text"]), folder / "c.parquet")
    said = only_error(folder)
    assert "a.parquet has a column 'text' that" in said and "c.parquet lacks" in said


def test_harmless_differences_are_cast_away(folder: Path) -> None:
    other = table(200).cast(
        pa.schema(
            [
                pa.field("id", pa.int32(), nullable=False),
                ("label", pa.int8()),
                ("text", pa.large_string()),
            ],
            metadata={"written": "later"},
        )
    )
    pq.write_table(other.select(["text", "label", "id"]), folder / "c.parquet")
    corpus = open_corpus(folder)
    assert [f.type for f in corpus.schema] == [pa.int64(), pa.int64(), pa.large_string()]
    for shard in range(3):
        read = pa.Table.from_batches(corpus.read(shard))
        assert read.schema == corpus.schema
        assert read.to_pylist() == table(100 * shard).to_pylist()


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twins = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    with ipc.new_file(tmp_path / "t.arrow", twins.schema) as writer:
        writer.write_table(twins)
    assert "two columns called 'x'" in only_error(tmp_path)


def test_an_unknown_column_is_answered_with_those_there_are(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'lable' in .*; it has: id, label, text"):
        open_corpus(folder).read(0, columns=["lable"])


# --- data sets --------------------------------------------------------------------------------


def labelled(names: list[str]) -> datasets.Dataset:
    made = datasets.Dataset.from_dict({"id": list(range(30)), "label": [0, 1, 1] * 10})
    return made.cast_column("label", datasets.ClassLabel(names=names))


def test_a_saved_data_set_keeps_order_and_class_names(tmp_path: Path) -> None:
    labelled(["no", "yes"]).select(range(29, -1, -1)).save_to_disk(tmp_path / "d", num_shards=3)
    corpus = open_corpus(tmp_path / "d")
    assert len(corpus.shards) == 3
    assert ids(corpus) == list(range(29, -1, -1))
    features = datasets.Features.from_arrow_schema(next(corpus.read(0)).schema)
    assert features["label"].names == ["no", "yes"]
    part = next(corpus.read(0, columns=["label"])).schema
    assert datasets.Features.from_arrow_schema(part)["label"].names == ["no", "yes"]


def test_class_names_come_from_the_folder_where_the_shards_lack_them(tmp_path: Path) -> None:
    labelled(["no", "yes"]).save_to_disk(tmp_path)
    shard = next(tmp_path.glob("*.arrow"))
    bare = ipc.open_stream(shard.read_bytes()).read_all().replace_schema_metadata(None)
    with ipc.new_stream(shard, bare.schema) as writer:
        writer.write_table(bare)
    features = datasets.Features.from_arrow_schema(open_corpus(tmp_path).schema)
    assert features["label"].names == ["no", "yes"]


def test_of_several_splits_one_must_be_named(tmp_path: Path) -> None:
    one = labelled(["no", "yes"])
    datasets.DatasetDict(train=one, test=one.select(range(7))).save_to_disk(tmp_path)
    assert "several splits; choose one of: test, train" in only_error(tmp_path)
    assert "no split 'dev'; choose one of: test, train" in only_error(tmp_path, split="dev")
    corpus = open_corpus(tmp_path, split="test")
    assert corpus.rows == 7
    assert open_corpus(corpus.uri).digest == corpus.digest
    assert open_corpus(f"{tmp_path}#test").digest == corpus.digest


def test_a_lost_part_of_a_saved_data_set_is_named(tmp_path: Path) -> None:
    labelled(["no", "yes"]).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow is missing" in only_error(tmp_path)


def test_shards_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    labelled(["no", "yes"]).to_parquet(tmp_path / "a.parquet")
    labelled(["yes", "no"]).to_parquet(tmp_path / "b.parquet")
    assert "the classes of column 'label'" in only_error(tmp_path)


def test_hub_names_are_loaded_as_their_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the network is replaced: the loader builds the cache from local files."""
    labelled(["no", "yes"]).to_parquet(tmp_path / "t.parquet")
    real = datasets.load_dataset

    def load(path: str, config: str | None, split: str | None) -> object:
        assert (path, config) == ("someone/things", "small")
        files = {"train": str(tmp_path / "t.parquet"), "test": str(tmp_path / "t.parquet")}
        return real("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "c"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert "choose one of: train, test" in only_error("someone/things:small")
    corpus = open_corpus("someone/things:small", split="train")
    assert corpus.uri == "someone/things:small#train"
    assert ids(open_corpus(corpus.uri)) == list(range(30))


def test_a_hub_name_without_network_is_one_quick_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda endpoint: False)
    monkeypatch.chdir(tmp_path)
    said = only_error("nobody/nothing-of-this-name")
    assert said.startswith("nobody/nothing-of-this-name is no file or folder")
    assert said.endswith("no network reaches the hub")


# --- changes ----------------------------------------------------------------------------------


def rewrite(path: Path, change: pa.Table) -> None:
    """Write other rows, keeping the file's times: the worst case."""
    before = path.stat()
    pq.write_table(change, path, row_group_size=30)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def one_label_changed(first: int) -> pa.Table:
    """Same size, same statistics: only a byte within a page differs."""
    labels = table(first)["label"].to_pylist()
    labels[50], labels[51] = labels[51], labels[50]
    return table(first).set_column(1, "label", pa.array(labels))


def test_copies_are_the_same_corpus(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    original, copied = open_corpus(folder), open_corpus(tmp_path / "copy")
    assert copied.digest == original.digest
    copied.same_corpus(original.describe())
    (folder / "a.parquet").touch()
    assert open_corpus(folder).digest == original.digest
    original.check()


def test_one_changed_label_is_noticed(folder: Path) -> None:
    corpus = open_corpus(folder)
    before = corpus.describe()
    path = folder / "b" / "x.parquet"
    size = path.stat().st_size
    rewrite(path, one_label_changed(100))
    assert path.stat().st_size == size, "the test wants a change that no size tells"
    for use in (
        lambda: corpus.read(1),
        lambda: corpus.take(1, np.array([3])),
        corpus.check,
    ):
        with pytest.raises(ValueError, match=r"b/x\.parquet changed since the corpus was opened"):
            use()
    assert len(list(corpus.read(0))) > 0
    again = open_corpus(folder)
    assert again.digest != corpus.digest
    with pytest.raises(ValueError, match=r"shard b/x\.parquet changed since it was recorded"):
        again.same_corpus(before)
    assert again.sha256(1) != corpus.sha256(0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_one_changed_byte_in_json_lines_is_noticed(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"id": %d, "label": 3}\n' % i for i in range(20_000))
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(lines))
    corpus = open_corpus(tmp_path)
    at = len(lines) // 2
    changed = lines[:at] + lines[at:].replace(b'"label": 3', b'"label": 5', 1)
    (tmp_path / name).write_bytes(pack(changed))
    with pytest.raises(ValueError, match="changed since"):
        corpus.read(0)
    with pytest.raises(ValueError, match="changed since it was recorded"):
        open_corpus(tmp_path).same_corpus(corpus.describe())


def test_a_lost_shard_is_named(folder: Path) -> None:
    corpus = open_corpus(folder)
    (folder / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"a\.parquet is gone"):
        corpus.read(0)


def test_what_differs_from_the_record_is_said(folder: Path) -> None:
    corpus = open_corpus(folder)
    for change, said in (
        (lambda d: d["shards"][1].update(path="z"), "shard 1 is b/x.parquet, recorded was z"),
        (lambda d: d["shards"][2].update(rows=7), "c.parquet changed .* 100 rows, recorded were 7"),
        (lambda d: d["shards"].pop(), "has 3 shards, recorded were 2: c.parquet is new"),
        (lambda d: d["shards"].append({"path": "d"}), "recorded were 4: d is gone"),
    ):
        record = copy.deepcopy(corpus.describe())
        change(record)
        with pytest.raises(ValueError, match=said):
            corpus.same_corpus(record)


def test_large_corpora_are_sampled_and_compared_with_whole_hashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_corpus(folder)
    monkeypatch.setattr(corpus_module, "WHOLE_BYTES", 0)
    sampled = open_corpus(folder)
    assert all(s.fingerprint.startswith("sha256:") for s in whole.shards)
    assert all(s.fingerprint.startswith("blocks:") for s in sampled.shards)
    sampled.same_corpus(whole.describe())
    whole.same_corpus(sampled.describe())
    rewrite(folder / "c.parquet", one_label_changed(200))
    with pytest.raises(ValueError, match=r"c\.parquet changed"):
        open_corpus(folder).same_corpus(whole.describe())


def test_sampled_hashes_cover_ends_footer_and_moved_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = np.random.default_rng(0).bytes(8 << 20)

    def print_of(content: bytes) -> str:
        path.write_bytes(content)
        return fingerprint.fingerprint(str(path), fingerprint.file_state(str(path)), "blocks")

    base = print_of(data)
    flip = bytes([data[0] ^ 1]), bytes([data[-1] ^ 1])
    assert print_of(flip[0] + data[1:]) != base
    assert print_of(data[:-1] + flip[1]) != base
    assert print_of(data[:1000] + b"\0" + data[1000:-1]) != base  # same size, moved by one
    footer = (1 << 20).to_bytes(4, "little") + b"PAR1"
    marked = data[:-8] + footer
    edited = bytearray(marked)
    edited[-(1 << 20) + 300] ^= 1  # in the footer, outside every sample
    assert print_of(bytes(edited)) != print_of(marked)


def test_an_unchanged_shard_is_not_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(folder)

    def forbidden(*_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(corpus_module, "fingerprint", forbidden)
    corpus.check()
    assert open_corpus(folder).digest == corpus.digest
    assert ids(pickle.loads(pickle.dumps(corpus))) == list(range(300))


# --- processes, threads, stores ---------------------------------------------------------------


def test_a_corpus_pickles_small(tmp_path: Path) -> None:
    for i in range(50):
        pq.write_table(table(i), tmp_path / f"{i:03}.parquet")
    corpus = open_corpus(tmp_path)
    packed = pickle.dumps(corpus)
    assert len(packed) < 50 * 250 + 1000
    assert pickle.loads(packed) == corpus


def test_threads_take_from_the_same_shards(folder: Path) -> None:
    corpus = open_corpus(folder)

    def take(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        shard, rows = int(rng.integers(3)), np.sort(rng.integers(0, 100, 9))
        return bool(corpus.take(shard, rows)["id"].to_pylist() == (rows + 100 * shard).tolist())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(take, range(200)))


def test_two_readers_of_one_shard_do_not_disturb_each_other(folder: Path) -> None:
    store = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(folder / "a.parquet"), f"{store[9:]}/a.parquet")
    for corpus in (open_corpus(folder), open_corpus(store)):
        first, second = corpus.read(0, batch_rows=7), corpus.read(0, 50, batch_rows=11)
        pairs = [(a["id"].to_pylist(), b["id"].to_pylist()) for a, b in zip(first, second)]  # noqa: B905
        assert [i for a, _ in pairs for i in a] == list(range(sum(len(a) for a, _ in pairs)))
        assert [i for _, b in pairs for i in b] == list(range(50, 100))


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream", "jsonl.gz"])
def test_remote_shards_are_read_as_local_ones(tmp_path: Path, form: str) -> None:
    name = uuid.uuid4().hex
    memory = fsspec.filesystem("memory")
    for i in range(2):
        local = tmp_path / f"{i}.{form.replace('stream', 'arrow')}"
        if form == "parquet":
            pq.write_table(table(100 * i), local, row_group_size=30)
        elif form == "jsonl.gz":
            table(100 * i).to_pandas().to_json(local, orient="records", lines=True)
        else:
            opened = ipc.new_stream if form == "stream" else ipc.new_file
            with opened(local, table(0).schema) as writer:
                writer.write_table(table(100 * i), max_chunksize=30)
        memory.pipe(f"/{name}/in/{local.name}", local.read_bytes())
    memory.pipe(f"/{name}/in/_SUCCESS", b"")
    corpus = open_corpus(f"memory://{name}/in")
    assert ids(corpus) == list(range(200))
    assert corpus.take(1, np.array([5, 70]), ["id"])["id"].to_pylist() == [105, 170]
    assert open_corpus(f"memory://{name}/*/{0}.*").rows == 100
    assert ids(open_corpus([corpus.url(1), corpus.url(0)])) == list(range(200))
    assert corpus.digest == open_corpus(tmp_path).digest
    memory.pipe(f"/{name}/in/{local.name}", local.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="changed since the corpus was opened"):
        corpus.check()


@pytest.mark.slow
@pytest.mark.parametrize("through_pyarrow", [False, True])
def test_object_stores_are_read_and_watched_by_etag(
    folder: Path, object_store: str, store_endpoint: str, through_pyarrow: bool
) -> None:
    fsspec.filesystem("s3").put(f"{folder}/", f"{object_store}/data", recursive=True)
    query = f"?endpoint_override={store_endpoint.removeprefix('http://')}&scheme=http"
    options = query if through_pyarrow else ""
    corpus = open_corpus(f"{object_store}/data{options}")
    assert [s.path for s in corpus.shards] == ["a.parquet", "b/x.parquet", "c.parquet"]
    assert ids(pickle.loads(pickle.dumps(corpus))) == list(range(300))
    assert all(s.fingerprint.startswith("etag:") for s in corpus.shards)
    assert open_corpus(f"{object_store}/data/*.parquet{options}").rows == 200
    assert open_corpus(f"{object_store}/data/b/x.parquet{options}").rows == 100
    path = folder / "b" / "x.parquet"
    rewrite(path, one_label_changed(100))
    fsspec.filesystem("s3").put(str(path), f"{object_store}/data/b/x.parquet")
    with pytest.raises(ValueError, match=r"b/x\.parquet.* changed since the corpus was opened"):
        corpus.check()
    assert "does not exist or is empty" in only_error(f"{object_store}/nothing{options}")
