"""The score table: schema, bytes, receipts, streaming; and the golden table of version 1."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.pipeline.scoring.score_table import (
    ROW_GROUP,
    ScoreTable,
    digest_of_parts,
    parquet_bytes,
    read_receipt,
    score_schema,
    write_part,
)
from curate.pipeline.storing.storage import Folder
from curate.selectors.protocol import Table

GOLDEN = Path(__file__).parents[2] / "golden" / "scores-v1"


def part(rows: int, start: int = 0) -> pa.Table:
    schema = score_schema(["el2n"], keep=[pa.field("label", pa.int64())])
    columns = {
        "shard": np.zeros(rows, np.int32),
        "row": np.arange(start, start + rows),
        "label": np.arange(rows) % 3,
        "el2n": np.linspace(0, 1, rows, dtype=np.float32),
        "error": [None] * rows,
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def finished(folder: Folder, sizes: list[int]) -> ScoreTable:
    start = 0
    for unit, rows in enumerate(sizes):
        assert write_part(folder, unit, part(rows, start), {"rows": rows, "unit": unit})
        start += rows
    meta = {"format": "curate.scores", "version": 1, "scorers": {"el2n": {}}, "corpus": {}}
    folder.write_json("_meta.json", meta)
    units = pa.table({"unit": pa.array(range(len(sizes)), pa.int32())})
    folder.replace("units.parquet", parquet_bytes(units))
    folder.write_json("_SUCCESS.json", {"rows": start, "units": len(sizes)})
    return ScoreTable.open(folder.uri)


def test_the_schema_names_every_column_in_order() -> None:
    schema = score_schema(
        ["el2n", "aum"],
        id_type=pa.string(),
        keep=[pa.field("label", pa.int64())],
        with_std=["el2n"],
        with_checkpoints=["el2n"],
        with_tokens=True,
    )
    assert schema.names == [
        *("shard", "row", "id", "label", "el2n", "el2n_std", "el2n_by_checkpoint"),
        *("aum", "tokens", "error"),
    ]
    assert schema.field("row").type == pa.int64() and schema.field("shard").type == pa.int32()
    assert schema.field("el2n").type == pa.float32()
    assert schema.field("el2n_by_checkpoint").type == pa.list_(pa.float32())


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(ValueError, match="a scorer cannot be called 'row'"):
        score_schema(["row"])
    with pytest.raises(ValueError, match="a scorer cannot be called 'a_std'"):
        score_schema(["a", "a_std"], with_std=["a"])
    with pytest.raises(ValueError, match="column 'tokens' cannot be kept"):
        score_schema(["a"], keep=[pa.field("tokens", pa.int32())])


def test_a_part_is_committed_once_with_its_receipt(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert write_part(folder, 3, part(5), {"rows": 5, "who": "first"})
    assert not write_part(folder, 3, part(7), {"rows": 7, "who": "second"})
    assert read_receipt(folder, 3) == {"rows": 5, "who": "first"}
    assert pq.read_table(tmp_path / "part-00003.parquet").equals(part(5))


def test_equal_tables_are_equal_bytes_however_they_are_chunked() -> None:
    table = part(100)
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7, 50), table.slice(57)])
    assert parquet_bytes(table) == parquet_bytes(chunked.combine_chunks())


def test_the_table_streams_in_corpus_order(tmp_path: Path) -> None:
    table = finished(Folder(tmp_path), [ROW_GROUP + 10, 1, 30])
    streamed: Table = table  # what selectors ask for
    assert streamed.rows == ROW_GROUP + 41
    batches = list(table.scan(["row"]))
    assert all(b.num_rows <= ROW_GROUP and b.schema.names == ["row"] for b in batches)
    rows = np.concatenate([b["row"].to_numpy() for b in batches])
    assert (rows == np.arange(table.rows)).all()
    assert pq.ParquetFile(tmp_path / "part-00000.parquet").num_row_groups == 2
    order = next(table.scan(["el2n", "row"])).schema.names
    assert order == ["el2n", "row"]
    with pytest.raises(ValueError, match="no column 'grand'; it has: shard, row, label, el2n"):
        table.scan(["grand"])


def test_a_run_folder_leads_to_its_scores(tmp_path: Path) -> None:
    finished(Folder(tmp_path / "scores"), [4])
    assert ScoreTable.open(tmp_path).rows == 4


def test_scorers_stand_in_the_order_asked_for(tmp_path: Path) -> None:
    assert list(finished(Folder(tmp_path), [4]).scorers) == ["el2n"]
    assert list(ScoreTable.open(GOLDEN).scorers) == ["loss", "el2n", "grand"]


def test_the_digest_covers_names_and_bytes() -> None:
    sums = {"a": "1", "b": "2"}
    assert digest_of_parts(sums) == digest_of_parts(dict(reversed(sums.items())))
    assert len({digest_of_parts(s) for s in (sums, {"a": "1"}, {"a": "2", "b": "1"})}) == 3


def test_tables_of_version_1_can_be_read() -> None:
    table = ScoreTable.open(GOLDEN)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    whole = pa.Table.from_batches(list(table.scan()), table.schema)
    assert json.loads(json.dumps(whole.to_pydict())) == expected["rows"]
    assert table.errors().to_pylist() == expected["errors"]
    assert list(table.scorers) == ["loss", "el2n", "grand"]
    assert table.success["bad_rows"] == 1 and table.success["units"] == 2
    assert [read_receipt(table.folder, u)["rows"] for u in (0, 1)] == [5, 3]


def test_a_table_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Folder(tmp_path).write_json("_meta.json", {"format": "curate.scores", "version": 2})
    with pytest.raises(ValueError, match=r"holds curate\.scores version 2, expected"):
        ScoreTable.open(tmp_path)
