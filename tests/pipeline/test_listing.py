"""Dicts as text: everything there, aligned, nothing cut in the middle of a table."""

from curate.pipeline.listing import format_text, text


def test_scalars_tables_and_the_headline() -> None:
    found = {
        "kind": "score table",
        "path": "run/scores",
        "rows": 1300,
        "nothing": None,
        "shares": {"a": 0.25, "b": 0.75},
        "units_done": 3,
        "scores": {"el2n": {"mean": 0.123456, "null": 0}, "loss": {"mean": 12.0, "null": 1500}},
        "shards": [{"path": "a.parquet", "rows": 7}, {"path": "long-name.parquet", "rows": 1000}],
    }
    assert format_text(found).splitlines() == [
        "score table run/scores",
        "",
        "  rows        1,300",
        "  shares      a=0.25, b=0.75",
        "  units done  3",
        "",
        "scores",
        "          mean   null",
        "  el2n  0.1235      0",
        "  loss      12  1,500",
        "",
        "shards",
        "  path                rows",
        "  a.parquet              7",
        "  long-name.parquet  1,000",
    ]


def test_columns_that_are_empty_everywhere_are_left_out() -> None:
    lines = format_text({"x": [{"a": 1, "b": None}, {"a": 2, "b": ""}]}).splitlines()
    assert lines == ["x", "  a", "  1", "  2"]


def test_values_in_few_characters() -> None:
    assert text(True) == "yes" and text(None) == "-" and text(0.1234567) == "0.1235"
    assert text(list(range(1000))).endswith("…") and len(text(list(range(1000)))) == 100
