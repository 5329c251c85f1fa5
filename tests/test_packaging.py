"""Wheel and sdist hold the package `curate`, the command, and nothing beside them.

Everything is built in a copy, offline, by the setuptools of this environment: a `build/` left in
the tree would reinstall deleted modules.
"""

import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import curate

ROOT = Path(curate.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "run", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Return the path of the `wheel` or `sdist` that the build back-end makes of `source`."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source)
    return max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def python_files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}


def package_files() -> set[str]:
    """Names, inside the installed package, of every module in this checkout."""
    rooms = ("pipeline", "scorers", "kernels", "selectors")
    inside = {f"{room}/{name}" for room in rooms for name in python_files(ROOT / room)}
    return inside | {"__init__.py", "cli.py", "py.typed"}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree") / "checkout"
    shutil.copytree(ROOT, copy, ignore=SKIPPED)
    return copy


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel is built from the unpacked sdist, as an installer without wheels would."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_the_package_its_tests_and_its_papers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    papers = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    assert package_files() | papers | {"pyproject.toml", "constraints.txt"} <= names
    assert {f"tests/{name}" for name in python_files(ROOT / "tests")} <= names
    assert not any(".venv" in name or "__pycache__" in name for name in names)


def test_wheel_holds_one_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"curate-{curate.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"curate", info}
    assert {name for name in names if name.startswith("curate/")} == {
        f"curate/{name}" for name in package_files()
    }
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_names_the_command_the_licence_and_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"curate-{curate.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "curate = curate.cli:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert {"cpu", "gpu", "export", "dev"} <= set(re.findall(r"Provides-Extra: (\w+)", metadata))


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;~! ]", line)[0].lower() for line in requirements}


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", pin) for pin in pins)
    extras = PROJECT["project"]["optional-dependencies"]
    direct = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    direct += [line for extra in ("cpu", "gpu", "export", "dev") for line in extras[extra]]
    assert requirement_names(direct) <= requirement_names(sorted(pins))


def test_torch_is_the_pinned_one() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment that borrows the dependencies of this one, not `curate`."""
    folder = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=folder.parent)
    if "setuptools==" in listed:  # an old one of the venv would hide the borrowed one
        run(python, "-m", "pip", "uninstall", "--yes", "setuptools", cwd=folder.parent)
    (home,) = (folder / "lib").glob("python*/site-packages")
    borrowed = home.parent / "borrowed"
    borrowed.mkdir()
    for path in Path(site.getsitepackages()[0]).iterdir():
        if "curate" not in path.name and path.suffix != ".pth":
            (borrowed / path.name).symlink_to(path)
    (home / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "plain", "editable"])
def test_an_install_gives_the_package_and_the_command(
    how: str, bare_python: Path, wheel: Path, tree: Path, tmp_path: Path
) -> None:
    (site_packages,) = (bare_python.parent.parent / "lib").glob("python*/site-packages")
    checkout = tmp_path / "checkout"
    shutil.copytree(tree, checkout, ignore=SKIPPED)
    before = {path.name for path in site_packages.iterdir()}
    pip = (bare_python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index")
    target = {"wheel": [str(wheel)], "plain": [str(checkout)], "editable": ["-e", str(checkout)]}
    run(*pip, *target[how], cwd=tmp_path)
    try:
        new = {path.name for path in site_packages.iterdir()} - before - {"__pycache__"}
        assert f"curate-{curate.__version__}.dist-info" in new
        assert all("curate" in name for name in new), new
        where = run(
            bare_python,
            "-c",
            "import curate, selectors; from curate.scorers.registry import SCORERS; "
            "import os; assert hasattr(selectors, 'DefaultSelector'); print(curate.__file__)",
            cwd=tmp_path,
        )
        home = checkout if how == "editable" else site_packages / "curate"
        assert Path(where.strip()).parent == home
        assert "Usage" in run(bare_python.parent / "curate", "--help", cwd=tmp_path)
    finally:
        run(bare_python, "-m", "pip", "uninstall", "--yes", "curate", cwd=tmp_path)
