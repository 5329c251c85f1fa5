"""What `--help` shows, and what a slip on the command line is answered with."""

import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from curate import cli

WIDTH = 80


def commands(group: Any, *words: str) -> Iterator[tuple[str, Any]]:
    """Yield every command with its words, those of groups too."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield " ".join([*words, name]), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["curate", *shlex.split(line)])
        patch.setenv("COLUMNS", str(WIDTH))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def examples(text: str) -> list[str]:
    return re.findall(r"^ +(curate .*)$", text.partition("Example")[2], flags=re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal_and_leaves_no_option_unsaid(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(f"{name} --help", capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= WIDTH
    command = COMMANDS[name]
    for param in command.params:
        assert param.help and param.help.endswith("."), param.name
        assert out.count(f" {param.opts[0]}") >= 1 or param.param_type_name == "argument"
        assert "list[" not in out.partition("Options:")[2], "options say what they take"
    assert command.help.partition("\n\n")[0].endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_have_flags_that_exist(name: str) -> None:
    for line in examples(COMMANDS[name].help):
        assert line.startswith(f"curate {name}")
        known = {flag for p in COMMANDS[name].params for flag in p.opts}
        flags = [word for word in shlex.split(line) if word.startswith("-")]
        assert set(flags) <= known, line


def test_the_list_of_commands_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--help", "manifest --help"):
        code, out, _ = answer(line, capsys)
        assert code == 0
        listed = out.partition("Commands:\n")[2].splitlines()
        assert listed and all(row.endswith(".") and "..." not in row for row in listed)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("scor train", "no such command 'scor'; did you mean 'score'?; `curate --help`"),
        ("manifest unoin a b", "did you mean 'union'?; `curate manifest --help` explains it"),
        ("select --budge 1", "--budge"),
        ("select --direction up", "'up' is not one of 'high', 'low'; `curate select --help`"),
        ("select --seed x", "'--seed'"),
        ("select --seed", "'--seed' requires an argument"),
        ("score", "CORPUS"),
        ("train data --row-loss som", "'som' is not one of 'mean', 'sum'"),
        ("train data", "--model is missing; `curate train --help` explains it"),
        ("manifest union a b", "--out is missing; `curate manifest union --help` explains it"),
        ("manifest mix a b -o c", "--proportions is missing; `curate manifest mix --help`"),
        ("export --packing bz2 --to jsonl", "'bz2' is not one of 'none', 'gz', 'zst'"),
    ],
)
def test_a_slip_is_answered_in_one_sentence(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = answer(line, capsys)
    assert code == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert said in err


def test_the_closest_name_is_offered() -> None:
    from curate.pipeline.exporting.formats import make_format
    from curate.pipeline.manifests.schedules import make_schedule
    from curate.scorers.registry import make_scorers
    from curate.selectors.registry import make_selector

    for call, closest in (
        (lambda: make_scorers("el2m"), "el2n"),
        (lambda: make_scorers("grand(param=head)"), "params"),
        (lambda: make_selector("kcentre"), "kcenter"),
        (lambda: make_selector("window", ofset=3), "offset"),
        (lambda: make_schedule("curiculum"), "curriculum"),
        (lambda: make_schedule("rs2", params={"fracton": 0.1}), "fraction"),
        (lambda: make_format("parqet", None, {}), "parquet"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=rf"; did you mean '{closest}'\?$"):
            call()
    with pytest.raises(ValueError) as nothing_like_it:
        make_selector("zzz")
    assert "did you mean" not in str(nothing_like_it.value)
