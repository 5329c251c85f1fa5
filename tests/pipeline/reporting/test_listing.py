"""Dicts as text: everything there, aligned, nothing cut in the middle of a table."""

from curate.pipeline.reporting.listing import format_text, text


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
    assert text({"a": {"b": 1, "none": None}, "c": [1, 2]}) == "a=(b=1), c=(1, 2)"


def test_long_values_get_lines_of_their_own_and_long_lists_are_cut() -> None:
    found = {"kind": "verify", "few": ["a"], "many": [f"file-{i:03d}" for i in range(100)]}
    lines = format_text(found).splitlines()
    assert lines[:4] == ["verify", "", "  few  a", ""]
    assert lines[4:6] == ["many", "  file-000"]
    assert lines[-1] == "  … and 41 more (--json has them all)" and len(lines) == 5 + 60


def test_prose_in_tables_is_cut_and_digests_are_not() -> None:
    digest, prose = "f" * 64, "many words " * 10
    lines = format_text({"x": [{"digest": digest, "why": prose}]}).splitlines()
    assert digest in lines[-1] and lines[-1].endswith("…")
    assert len(lines[-1]) == 2 + 64 + 2 + 48
