"""The wheel that cluster nodes get: all of the package, importable, the same bytes each time."""

import subprocess
import sys
import zipfile
from pathlib import Path

import curate
from curate.pipeline.wheel import write_wheel


def test_the_wheel_holds_every_module_and_is_reproducible(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_wheel(tmp_path / "a"), write_wheel(tmp_path / "b")
    assert first.name == f"curate-{curate.__version__}-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    root = Path(curate.__file__ or "").parent
    for room in ("pipeline", "scorers", "selectors", "kernels"):
        for module in (root / room).rglob("*.py"):
            assert f"curate/{module.relative_to(root)}" in names
    assert {n.split("/")[0] for n in names} == {
        "curate",
        f"curate-{curate.__version__}.dist-info",
    }
    assert not [n for n in names if n.startswith(("curate/tests", "curate/benchmarks"))]


def test_the_wheel_is_importable_from_its_place(tmp_path: Path) -> None:
    zipfile.ZipFile(write_wheel(tmp_path)).extractall(tmp_path / "site")
    code = "import curate, curate.pipeline.scoring.units; print(curate.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "site" / "curate" / "__init__.py")
