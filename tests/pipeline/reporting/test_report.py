"""The report shows what the run folder holds, with parts missing, with awkward rows."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.pipeline.manifests.manifest import write_manifest, write_parts
from curate.pipeline.reading.corpus import open_corpus
from curate.pipeline.reporting.page import table
from curate.pipeline.reporting.report import write_report
from curate.pipeline.scoring.score_table import (
    META,
    SUCCESS,
    digest_of_parts,
    parquet_bytes,
    part_name,
    score_schema,
    write_part,
)
from curate.pipeline.scoring.units import plan_units, write_units
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import make_task

ROWS, CLASSES = 60, 3
VOID = {"img", "br", "meta", "path", "use", "rect", "link", "image", "line", "circle", "polygon"}


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def images(folder: Path) -> str:
    """Write a corpus whose row i is an 8 x 8 image of gray level i, its label i mod 3."""
    cells = [{"bytes": png(i), "path": None} for i in range(ROWS)]
    columns = {
        "id": [f"<row {i}>" for i in range(ROWS)],
        "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": [i % CLASSES for i in range(ROWS)],
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns).slice(0, 40), folder / "a.parquet")
    pq.write_table(pa.table(columns).slice(40), folder / "b.parquet")
    return str(folder)


def add_scores(run: Path, corpus_path: str, task_name: str, bad: tuple[int, ...] = ()) -> None:
    """Write a finished score table: el2n of row i is i, margin is -i; `bad` rows have an error."""
    corpus = open_corpus(corpus_path)
    folder = Folder(run / "scores")
    options = {"tokenizer": "bytes"} if task_name.startswith("text") else {}
    task = make_task(task_name, corpus, **options)
    units = plan_units([s.rows for s in corpus.shards], 40)
    write_units(folder, units, threads=1)
    columns = ["el2n", "margin"]
    label = pa.field("label", corpus.schema.field("label").type)
    schema = score_schema(columns, id_type=corpus.schema.field("id").type, keep=[label])
    sums = {}
    for unit in units:
        (span,) = unit.spans
        rows = corpus.read(span.shard, span.start, span.rows, ["id", "label"])
        read = pa.Table.from_batches(list(rows))
        at = sum(s.rows for s in corpus.shards[: span.shard]) + span.start
        value = [None if at + i in bad else float(at + i) for i in range(span.rows)]
        cells = {
            "shard": [span.shard] * span.rows,
            "row": list(range(span.start, span.start + span.rows)),
            "id": read["id"],
            "label": read["label"],
            "el2n": value,
            "margin": [None if v is None else -v for v in value],
            "error": ["bytes are <broken>" if v is None else None for v in value],
        }
        part = pa.table([cells[n] for n in schema.names], schema=schema)
        receipt = {"run": "abc", "unit": unit.number, "rows": span.rows, "bad_rows": 0,
                   "shards": {}, "quarantined": None}  # fmt: skip
        write_part(folder, unit.number, part, receipt)
        sums[part_name(unit.number)] = "0"
    lost = [(0, i, 0, "bytes are <broken>") for i in bad]
    names = ("shard", "row", "unit", "error")
    types = (pa.int32(), pa.int64(), pa.int32(), pa.string())
    errors = pa.table(
        [pa.array([e[i] for e in lost], t) for i, t in enumerate(types)], names=list(names)
    )
    folder.create("errors.parquet", parquet_bytes(errors))
    scorers = {n: {"name": n, "params": {}} for n in columns}
    folder.write_json(META, {
        "format": "curate.scores", "version": 1, "run": "abc", "corpus": corpus.describe(),
        "task": task.describe(), "checkpoints": [], "scorers": scorers, "target": None,
    })  # fmt: skip
    folder.write_json(SUCCESS, {
        "rows": corpus.rows, "units": len(units), "quarantined": [],
        "digest": digest_of_parts(sums),
    })  # fmt: skip


def add_manifest(run: Path, corpus_path: str, kept: list[int]) -> None:
    corpus = open_corpus(corpus_path)
    first = corpus.shards[0].rows
    places = [(0, i) if i < first else (1, i - first) for i in kept]
    batch = pa.record_batch({
        "shard": pa.array([s for s, _ in places], pa.int32()),
        "row": pa.array([r for _, r in places], pa.int64()),
        "weight": pa.nulls(len(kept), pa.float32()),
        "rank": pa.nulls(len(kept), pa.int32()),
    })  # fmt: skip
    folder = Folder(run / "manifest")
    files, rows = write_parts(folder, [batch])
    write_manifest(folder, {
        "corpus": corpus.describe(), "weight_kind": "none", "schedule": None, "groups": {},
        "scores": [], "files": files,
        "selection": {"method": "keep", "by": "el2n", "direction": "high", "selected": rows,
                      "budget": {"kind": "fraction", "value": 0.5}, "seed": 0, "params": {}},
    })  # fmt: skip


class Checker(HTMLParser):
    """Fails on tags that do not nest, keeps the text, refuses what is loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.images: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "link", "object")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value is not None:
                assert value.startswith(("data:", "#")), value
                self.images += [value] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: str) -> Checker:
    return Checker(Path(path).read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    corpus = images(tmp_path / "data")
    add_scores(tmp_path / "run", corpus, "image_classification", bad=(7,))
    add_manifest(tmp_path / "run", corpus, list(range(30, 60)))
    return tmp_path / "run"


def test_the_page_is_whole_and_needs_nothing_from_outside(run: Path) -> None:
    path = write_report(str(run))
    assert path == str(run / "report.html")
    page = Path(path).read_text()
    shown = Checker(page)
    for title in ("What was run", "Scores", "Rank correlations", "Highest and lowest rows",
                  "Selections", "Errors", "Provenance"):  # fmt: skip
        assert title in shown.text
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_the_highest_row_is_the_one_in_the_corpus(run: Path) -> None:
    """Row 59 scores highest in el2n and its image is all 59; rows come as in the table."""
    shown = read(write_report(str(run)))
    first = shown.images[0].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert pixels.shape == (8, 8) and (pixels == 59).all()
    assert "2 59 <row 59>" in shown.text  # label, score, id


def test_errors_balance_and_selection_are_said(run: Path) -> None:
    text = read(write_report(str(run))).text
    assert "1 rows could not be scored" in text and "bytes are <broken>" in text
    assert "keep by el2n, 0.5 of the rows, seed 0" in text
    assert text.count("50%") >= CLASSES  # every class keeps 10 of its 20 rows


def test_scores_that_run_against_each_other_correlate_at_minus_one(run: Path) -> None:
    assert "-1.00" in read(write_report(str(run))).text


def test_parts_may_be_missing(run: Path, tmp_path: Path) -> None:
    (run / "scores" / SUCCESS).unlink()
    text = read(write_report(str(run))).text
    assert "is not finished" in text and "Selections" in text
    with pytest.raises(ValueError, match="holds no scores, manifest or evaluation"):
        write_report(str(tmp_path / "nothing"))


def test_rows_are_not_shown_from_a_corpus_that_changed(run: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "image": [None], "label": [0]}),
                   tmp_path / "data" / "b.parquet")  # fmt: skip
    text = read(write_report(str(run))).text
    assert "Cannot be shown" in text and "b.parquet" in text


def test_text_is_shown_escaped_and_cut(tmp_path: Path) -> None:
    rows = [f"<script>alert({i})</script> " + "long " * 200 for i in range(ROWS)]
    columns = {"id": [str(i) for i in range(ROWS)], "text": rows,
               "label": [("spam", "ham")[i % 2] for i in range(ROWS)]}  # fmt: skip
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "t.parquet")
    add_scores(tmp_path / "run", str(tmp_path / "data"), "text_classification")
    text = read(write_report(str(tmp_path / "run"), str(tmp_path / "text.html"))).text
    assert "<script>alert(59)</script>" in text and "characters)" in text
    assert "ham 59 59" in text


@pytest.mark.parametrize("value", [3, 0.25, "n/a", None, True])
def test_table_cells(value: Any) -> None:
    assert "<td" in table(["a"], [[value]])


def test_numbers_are_flush_right() -> None:
    made: Callable[..., str] = table
    assert '<td class="n">3</td>' in made(["a", "b"], [[3, "x"], [None, "y"]])
