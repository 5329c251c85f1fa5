"""Shard readers give the rows that were written, block by block, and name the place of a fault."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from curate.pipeline.reading import json_shard
from curate.pipeline.reading.corpus import Corpus, open_corpus
from curate.pipeline.reading.formats import format_of, open_shard, sniff_format
from curate.pipeline.reading.schemas import Conflict, cast_batch, unify_schemas, unify_types

ROWS = 503  # prime, so that no block size divides it
TABLE = pa.table(
    {
        "id": pa.array(range(ROWS), pa.int64()),
        "text": [None if i % 7 == 0 else f"row {i} äöü" for i in range(ROWS)],
        "score": [i / 4 if i % 5 else None for i in range(ROWS)],
        "pixels": [[i, i + 1, i + 2] for i in range(ROWS)],
        "image": [{"bytes": f"{i}", "path": None} for i in range(ROWS)],
    }
)
LINES = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()).encode()


def write_arrow(path: Path, packing: str | None, stream: bool, table: pa.Table = TABLE) -> None:
    opened = (ipc.new_stream if stream else ipc.new_file)(
        path, table.schema, options=ipc.IpcWriteOptions(compression=packing)
    )
    with opened as writer:
        writer.write_table(table, max_chunksize=37)


WRITERS: dict[str, Callable[[Path], object]] = {
    "groups.parquet": lambda p: pq.write_table(TABLE, p, row_group_size=61),
    "one.pq": lambda p: pq.write_table(TABLE, p),
    "file.arrow": lambda p: write_arrow(p, None, stream=False),
    "packed.feather": lambda p: write_arrow(p, "zstd", stream=False),
    "stream.arrow": lambda p: write_arrow(p, None, stream=True),
    "packed_stream.ipc": lambda p: write_arrow(p, "lz4", stream=True),
    "plain.jsonl": lambda p: p.write_bytes(LINES),
    "last_line_open.json": lambda p: p.write_bytes(LINES.rstrip(b"\n")),
    "blank.ndjson": lambda p: p.write_bytes(b"\n \n" + LINES.replace(b"\n", b"\r\n\n")),
    "marked.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "members.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(LINES[:9000]) + gzip.compress(LINES[9000:])
    ),
    "frames.jsonl.zst": lambda p: p.write_bytes(
        zstandard.compress(LINES[:9000]) + zstandard.compress(LINES[9000:])
    ),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Corpus]]:
    """The same table in every format, in several blocks each."""
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_shard, "BLOCK_BYTES", 4096)
        for name, write in WRITERS.items():
            write(folder / name)
        yield {name: open_corpus(folder / name) for name in WRITERS}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_table_back(corpora: dict[str, Corpus], name: str) -> None:
    corpus = corpora[name]
    assert corpus.rows == ROWS
    assert corpus.schema.names == TABLE.schema.names
    assert pa.Table.from_batches(corpus.read(0)).to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize("name", [n for n in WRITERS if n != "one.pq"])
def test_shards_are_read_in_several_blocks(corpora: dict[str, Corpus], name: str) -> None:
    corpus = corpora[name]
    reader = open_shard(corpus.format, corpus.url(0))
    assert len(reader.starts) > 5
    assert reader.starts[0] == 0 and reader.starts[-1] == ROWS
    assert (np.diff(reader.starts) >= 0).all()
    for block in reversed(range(len(reader.starts) - 1)):  # in any order
        rows = [r for b in reader.batches(block, ["id"], 10) for r in b.column("id").to_pylist()]
        assert rows == list(range(*reader.starts[block : block + 2].tolist()))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    start=st.integers(0, ROWS),
    rows=st.none() | st.integers(0, 2 * ROWS),
    columns=st.none() | st.permutations(TABLE.schema.names).map(lambda p: p[: 1 + len(p[0]) % 3]),
    batch_rows=st.sampled_from([1, 2, 61, 1024]),
)
def test_a_range_is_a_slice(
    corpora: dict[str, Corpus],
    name: str,
    start: int,
    rows: int | None,
    columns: list[str] | None,
    batch_rows: int,
) -> None:
    batches = list(corpora[name].read(0, start, rows, columns, batch_rows))
    expected = TABLE.slice(start, rows).select(columns or TABLE.schema.names)
    assert all(0 < b.num_rows <= batch_rows for b in batches)
    assert [row for b in batches for row in b.to_pylist()] == expected.to_pylist()
    assert all(b.schema.names == expected.schema.names for b in batches)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    rows=st.lists(st.integers(0, ROWS - 1), max_size=12).map(sorted),
    columns=st.sampled_from([None, ["id"], ["image", "text"]]),
)
def test_taken_rows_are_those_asked_for(
    corpora: dict[str, Corpus], name: str, rows: list[int], columns: list[str] | None
) -> None:
    taken = corpora[name].take(0, np.array(rows, dtype=np.int64), columns)
    expected = TABLE.take(pa.array(rows, pa.int64())).select(columns or TABLE.schema.names)
    assert taken.to_pylist() == expected.to_pylist()


def test_streams_with_dictionaries_are_read_in_any_order(tmp_path: Path) -> None:
    table = pa.table({"c": pa.array([f"{i // 50}" for i in range(200)]).dictionary_encode()})
    write_arrow(tmp_path / "d.arrow", None, stream=True, table=table)
    corpus = open_corpus(tmp_path / "d.arrow")
    for rows in ([199], [0, 60], [150]):
        taken = corpus.take(0, np.array(rows))
        assert taken["c"].to_pylist() == [str(r // 50) for r in rows]


def test_an_interrupted_stream_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_arrow(tmp_path / "s.arrow", None, stream=True)
    whole = (tmp_path / "s.arrow").read_bytes()
    (tmp_path / "s.arrow").write_bytes(whole[:-8])
    assert open_corpus(tmp_path / "s.arrow").rows == ROWS
    assert "has no end mark" in caplog.text


def test_formats_are_told_by_name_and_by_first_bytes(tmp_path: Path) -> None:
    assert format_of("a/b/X.PARQUET") == "parquet"
    assert format_of("x.jsonl.zst") == "json"
    assert format_of("dataset_info.json") is None
    assert format_of("notes.txt") is None
    for name, form in [("one.pq", "parquet"), ("stream.arrow", "arrow"), ("plain.jsonl", "json")]:
        WRITERS[name](tmp_path / "bare")
        assert sniff_format(str(tmp_path / "bare")) == form
        assert open_corpus(tmp_path / "bare").format == form


# --- memory -----------------------------------------------------------------------------------


def peak_while(batches: Iterator[pa.RecordBatch]) -> int:
    """Return the most memory that Arrow and Python held at any batch."""
    before, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in batches:
        peak = max(peak, pa.total_allocated_bytes() - before)
    peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("group_rows", [250, 100_000], ids=["many groups", "one giant group"])
def test_a_parquet_shard_is_read_in_a_small_part_of_its_size(
    tmp_path: Path, group_rows: int
) -> None:
    noise = np.random.default_rng(0).bytes(1000 * 16_000)
    rows = [noise[i : i + 1000] for i in range(0, len(noise), 1000)]
    path = tmp_path / "big.parquet"
    pq.write_table(
        pa.table({"x": rows}), path, row_group_size=group_rows, use_dictionary=False,
        data_page_size=1 << 17, compression="zstd",
    )  # fmt: skip
    corpus = open_corpus(path)
    assert peak_while(corpus.read(0, batch_rows=64)) < path.stat().st_size / 4


def test_a_json_shard_is_scanned_and_read_in_a_small_part_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_shard, "BLOCK_BYTES", 1 << 17)
    path = tmp_path / "big.jsonl.gz"
    lines = "".join(json.dumps({"i": i, "text": "word " * 40}) + "\n" for i in range(80_000))
    path.write_bytes(gzip.compress(lines.encode(), 1))
    tracemalloc.start()
    corpus = open_corpus(path)
    assert tracemalloc.get_traced_memory()[1] < len(lines) / 8
    tracemalloc.stop()
    assert corpus.rows == 80_000
    assert peak_while(corpus.read(0)) < len(lines) / 8


# --- JSON lines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a":1}\n\n{"a":x}\n', r"line 3 is not valid JSON"),
        (b'{"a":1}\n{"a":2', r"line 2 is not valid JSON"),
        (b'{"a":1}\n[3]\n', r"line 2 is not a JSON object"),
        (b'{"a":1}\n\n{"a":"x"}\n', r"line 3: Column\(/a\) changed from number to string"),
        (b'{"a":"x"}\n{"a":"\xff"}\n', r"line 2 is not valid JSON"),
        (b'[\n{"a":1}\n]', r"holds one JSON array, not one object per line"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=said) as caught:
        open_corpus(tmp_path)
    assert "bad.jsonl" in str(caught.value)


def test_a_bad_line_far_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_shard, "BLOCK_BYTES", 512)
    lines = [b'{"a":%d}' % i for i in range(1000)]
    lines.insert(700, b'{"a":')
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"bad\.jsonl line 701 is not valid JSON"):
        open_corpus(tmp_path)


def test_types_grow_over_blocks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_shard, "BLOCK_BYTES", 64)
    early = [{"n": None, "v": 1, "t": "2020-01-01", "s": {"a": 1}} for _ in range(20)]
    late = [{"n": ["x"], "v": 2.5, "t": "no date", "s": {"b": "y"}, "new": True}]
    for name, rows in (("a.jsonl", early), ("b.jsonl", early + late), ("c.jsonl", [{"v": 3}])):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    corpus = open_corpus(tmp_path)
    assert corpus.schema == pa.schema(
        {
            "n": pa.list_(pa.string()),
            "v": pa.float64(),
            "t": pa.string(),
            "s": pa.struct({"a": pa.int64(), "b": pa.string()}),
            "new": pa.bool_(),
        }
    )
    filled = {"n": None, "v": 1.0, "t": "2020-01-01", "s": {"a": 1, "b": None}, "new": None}
    assert pa.Table.from_batches(corpus.read(0)).to_pylist() == [filled] * 20
    assert corpus.take(1, np.array([20])).to_pylist() == [
        {"n": ["x"], "v": 2.5, "t": "no date", "s": {"a": None, "b": "y"}, "new": True}
    ]
    assert corpus.take(2, np.array([0]), ["new", "v"]).to_pylist() == [{"new": None, "v": 3.0}]


def test_types_that_do_not_fit_name_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"v": 1}')
    (tmp_path / "b.jsonl").write_text('{"v": "x"}')
    with pytest.raises(ValueError, match=r"'v' is int64 in .*a\.jsonl but string in .*b\.jsonl"):
        open_corpus(tmp_path)
    monkeypatch.setattr(json_shard, "BLOCK_BYTES", 8)
    (tmp_path / "c.jsonl").write_text('{"v": 1}\n{"v": 2}\n{"v": "x"}\n')
    with pytest.raises(ValueError, match=r"int64 in .*c.jsonl line 1 but string in .*line 3"):
        open_corpus(tmp_path / "c.jsonl")


# --- schemas ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.int8(), pa.int16()),
        (pa.uint32(), pa.uint64(), pa.uint64()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.null(), pa.list_(pa.int8()), pa.list_(pa.int8())),
        (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
        (pa.list_(pa.int8(), 3), pa.list_(pa.int16(), 3), pa.list_(pa.int16(), 3)),
        (pa.list_(pa.int8(), 3), pa.list_(pa.int8(), 4), pa.list_(pa.int8())),
    ],
)
def test_types_widen_and_values_survive_the_cast(
    a: pa.DataType, b: pa.DataType, expected: pa.DataType
) -> None:
    assert unify_types(a, b, loose=False) == expected
    assert unify_types(b, a, loose=False) == expected
    for kind in (a, b):
        values = pa.nulls(2, kind)
        batch = pa.record_batch({"x": values})
        assert cast_batch(batch, pa.schema({"x": expected})).column("x").type == expected


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (pa.int64(), pa.float64()),
        (pa.int64(), pa.uint64()),
        (pa.string(), pa.int64()),
        (pa.bool_(), pa.int8()),
        (pa.struct({"a": pa.int8()}), pa.struct({"b": pa.int8()})),
        (pa.list_(pa.int8()), pa.int8()),
    ],
)
def test_types_of_different_kinds_conflict(a: pa.DataType, b: pa.DataType) -> None:
    for first, second in ((a, b), (b, a)):
        with pytest.raises(Conflict):
            unify_types(first, second, loose=False)


def test_nullability_and_column_order_do_not_matter() -> None:
    one = pa.schema([pa.field("a", pa.int8(), nullable=False), pa.field("b", pa.string())])
    two = pa.schema([pa.field("b", pa.string()), pa.field("a", pa.int8())], {b"k": b"v"})
    merged = unify_schemas([("one", one), ("two", two)])
    assert merged == pa.schema({"a": pa.int8(), "b": pa.string()})
    assert merged.metadata == {b"k": b"v"}


@pytest.mark.parametrize("nested", [pa.list_, lambda f: pa.struct([f])], ids=["list", "struct"])
def test_nested_nullability_is_widened(nested: Callable[[pa.Field], pa.DataType]) -> None:
    strict = nested(pa.field("item", pa.int8(), nullable=False))
    free = nested(pa.field("item", pa.int8()))
    for pair in ((strict, free), (free, strict)):
        merged = unify_types(*pair, loose=False)
        value = {"item": None} if pa.types.is_struct(free) else [None]
        batch = pa.record_batch({"x": pa.array([value], free)})
        assert cast_batch(batch, pa.schema({"x": merged})).to_pylist() == [{"x": value}]
