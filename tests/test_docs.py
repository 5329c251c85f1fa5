"""The documentation is held true: commands, flags, tables and examples against the code."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import typer

import curate
from curate import cli
from curate.scorers.registry import SCORERS, make_scorers
from curate.selectors.registry import SELECTORS

ROOT = Path(curate.__file__).parent
README = (ROOT / "README.md").read_text()
FORMATS = (ROOT / "docs" / "formats.md").read_text()
COMMANDS: dict[str, click.Command] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shown_commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [line[2:].partition("#")[0].strip() for line in lines if line.startswith("$ curate")]


def table_after(text: str, header: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose header row starts so."""
    lines = text[text.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert re.search(rf"curate {name}\b", README), name


@pytest.mark.parametrize("line", shown_commands())
def test_shown_commands_exist_with_their_flags(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    options = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)}
    for argument in arguments:
        if argument.startswith("-"):
            assert argument.split("=")[0] in options, f"{name} has no {argument}"


def test_shown_scorers_can_be_made() -> None:
    for line in shown_commands():
        for requests in re.findall(r"--scorer (\S+)", line):
            assert make_scorers(requests)


def test_readme_lists_every_scorer_with_its_direction() -> None:
    rows = table_after(README, "| name | what it is")
    listed = {row[0].strip("`"): row[-1] for row in rows}
    assert listed == {n: s.direction.keep for n, s in make_scorers(",".join(SCORERS)).items()}


def test_scorer_docs_cover_every_scorer() -> None:
    text = (ROOT / "docs" / "scorers.md").read_text()
    listed = {row[0].strip("`"): row[3] for row in table_after(text, "| scorer | definition")}
    assert listed == {n: s.direction.keep for n, s in make_scorers(",".join(SCORERS)).items()}
    headings = set(re.findall(r"^## (\w+)$", text, flags=re.MULTILINE))
    assert set(SCORERS) <= headings


def test_readme_lists_every_selector() -> None:
    rows = table_after(README, "| `--method`")
    assert {n for row in rows for n in re.findall(r"`(\w+)`", row[0])} == set(SELECTORS)


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_make_targets_that_docs_name_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"^ {4}make ([\w-]+)", (ROOT / page).read_text(), flags=re.MULTILINE)
        assert named and set(named) <= targets


def test_the_signals_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in blocks("python") if "curate.signals" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([32])" in capsys.readouterr().out


def test_the_scorer_in_contributing_is_a_scorer() -> None:
    import torch

    from curate.scorers.protocol import Scorer, Signal

    text = (ROOT / "CONTRIBUTING.md").read_text()
    (indented,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "confidence"}
    lines = (line.removeprefix("   ") for line in indented.splitlines())
    exec(compile("\n".join(lines), "CONTRIBUTING.md", "exec"), names)
    scorer = names["Confidence"]()
    assert isinstance(scorer, Scorer)
    loss = {Signal("loss"): torch.zeros(2, 3, dtype=torch.float64)}
    assert scorer.reduce(loss, torch.ones(2) / 2).tolist() == [1.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the README's `data/train` and `data/test`: small digits."""
    from curate.pipeline.demo import write_digits
    from curate.pipeline.storing.storage import Folder

    here, home = Path.cwd(), tmp_path_factory.mktemp("home")
    train, test = (pq.read_table(p) for p in write_digits(Folder(home / "raw")))
    for name, table in (("train", train.slice(0, 300)), ("test", test.slice(0, 100))):
        (home / "data" / name).mkdir(parents=True)
        pq.write_table(table, home / "data" / name / "0.parquet")
    os.chdir(home)
    yield home
    os.chdir(here)


@pytest.mark.slow
def test_the_python_example_runs(home: Path) -> None:
    (example,) = [block for block in blocks("python") if "curate.train" in block]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert len(names["manifest"]) == 150
    assert names["batch"]["label"].ndim == 1 and names["state"]


@pytest.mark.slow
def test_the_recipe_runs_and_its_files_have_the_documented_fields(home: Path) -> None:
    from curate.pipeline.recipe import run_recipe

    (recipe,) = blocks("yaml")
    short = recipe.replace("cnn", "mlp").replace("epochs: 10", "epochs: 2")
    short = short.replace("run: run", "run: by-recipe")
    (home / "recipe.yaml").write_text(short)
    run_recipe(str(home / "recipe.yaml"))
    run = home / "by-recipe"
    checkpoint = next((run / "checkpoints").glob("seed0-*"))
    for path in (
        checkpoint / "curate.json",
        run / "scores" / "_meta.json",
        run / "scores" / "_SUCCESS.json",
        run / "manifest" / "manifest.json",
        run / "evaluate" / "evaluation.json",
    ):
        undocumented = [k for k in json.loads(path.read_text()) if f"`{k}`" not in FORMATS]
        assert not undocumented, (path.name, undocumented)
    for path in (run / "checkpoints" / "records.parquet", run / "scores" / "part-00000.parquet"):
        for name in pq.read_schema(path).names:
            plain = name.removesuffix("_std")
            assert f"`{name}`" in FORMATS or plain in SCORERS or plain == "label", name
    assert (run / "report.html").exists()
