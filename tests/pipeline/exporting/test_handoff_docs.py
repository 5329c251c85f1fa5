"""The page on hand-off is held true: formats, refusals, rules and commands against the code."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import typer

import curate
from curate import cli
from curate.pipeline.exporting.formats import FORMATS, Source
from curate.pipeline.manifests.schedules import SCHEDULES

PAGE = (Path(curate.__file__).parent / "docs" / "handoff.md").read_text()


def rows_after(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(header) :].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def load(home: str) -> type:
    module, _, name = home.partition(":")
    found: type = getattr(import_module(module), name)
    return found


def test_every_format_is_listed_with_what_it_refuses() -> None:
    rows = {row[0].strip("`"): row for row in rows_after("| `--to`")}
    assert set(rows) == set(FORMATS)
    source = Source(pa.schema([("weight", pa.float32())]), (), "none", "none", (0,))
    for name, home in FORMATS.items():
        refused = load(home)(source).refuses
        assert (rows[name][2] == "all kinds") == (not refused)
        for kind in refused:
            assert f"`{kind}`" in rows[name][3] and f"`{kind}`" not in rows[name][2]


def test_every_schedule_is_listed_with_its_parameters() -> None:
    rows = {row[0].strip("`"): row for row in rows_after("| rule |")}
    assert set(rows) == set(SCHEDULES)
    for name, home in SCHEDULES.items():
        known = {f.name for f in fields(load(home))} | {"by_group"}
        assert set(re.findall(r"`(\w+)`", rows[name][2])) <= known


def test_every_command_on_manifests_is_named() -> None:
    commands = typer.main.get_command(cli.app).commands["manifest"].commands  # type: ignore[attr-defined]
    for name in commands:
        assert re.search(rf"`{name} |manifest {name} ", PAGE), name
