"""The repository root is the package, so its folders must not shadow other packages' names."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import curate

ROOT = Path(curate.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ["pipeline", "scorers", "kernels", "selectors"]

# What a room may not import (DESIGN: imports run downward only, a heavy library has one home).
FORBIDDEN = {
    "pipeline": {"curate.cli", "typer", "triton", "faiss"},
    "scorers": {"curate.cli", "curate.pipeline", "curate.selectors", "ray", "pyarrow", "triton"},
    "selectors": {"curate.cli", "curate.pipeline", "curate.scorers", "ray", "triton"},
    "kernels": {"curate.cli", "curate.pipeline", "curate.scorers", "curate.selectors", "ray"},
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("room", ROOMS)
def test_folder_has_no_init(room: str) -> None:
    """With one, `python -m pytest` here would import ./selectors for the standard library's."""
    assert not list((ROOT / room).rglob("__init__.py"))


def test_standard_library_wins_from_the_root() -> None:
    code = "import selectors, subprocess, asyncio; print(selectors.DefaultSelector.__name__)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_only_the_package_modules_are_at_the_root() -> None:
    """setuptools ships every root module as curate.<name>."""
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_every_folder_with_modules_is_packaged() -> None:
    """A folder missing from `packages` works in a checkout and is absent from the wheel."""
    folders = {p.parent.relative_to(ROOT) for room in ROOMS for p in modules(room)}
    packaged = set(PROJECT["tool"]["setuptools"]["packages"])
    assert packaged == {"curate"} | {".".join(("curate", *f.parts)) for f in folders}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room: str) -> None:
    for path in modules(room):
        for name in imports(path):
            upward = [f for f in FORBIDDEN[room] if name == f or name.startswith(f"{f}.")]
            assert not upward, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_is_imported_that_only_developers_install() -> None:
    """`make demo` installs without the development tools."""
    project = PROJECT["project"]
    extras = dict(project["optional-dependencies"])
    developers = extras.pop("dev")
    users = [*project["dependencies"], *(r for listed in extras.values() for r in listed)]
    runs, develops = (
        {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in listed}
        for listed in (users, developers)
    )
    files = [ROOT / "cli.py", *(path for room in ROOMS for path in modules(room))]
    imported = {name.split(".")[0] for path in files for name in imports(path)}
    assert not imported & (develops - runs)


def test_faiss_has_one_import_site() -> None:
    sites = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in modules(room)
        if "faiss" in {name.split(".")[0] for name in imports(path)}
    }
    assert sites <= {"selectors/neighbors.py"}


def test_importing_curate_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, curate; dir(curate); "
        "heavy = {'torch', 'ray', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_load() -> None:
    for name in curate.__all__:
        assert getattr(curate, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = curate.scores  # type: ignore[attr-defined]


def test_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").exists()
