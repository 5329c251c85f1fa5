"""This package as a wheel, made from its installed files: what cluster nodes get.

A checkout shipped as a working directory is not importable as `curate` (the repository root is the
package), a wheel is. It names no dependencies: nodes must have them, and nothing is downloaded.
"""

import base64
import hashlib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import curate

ROOMS = ("pipeline", "scorers", "selectors", "kernels")
WHEEL = "Wheel-Version: 1.0\nGenerator: curate\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Write `curate-VERSION-py3-none-any.whl` into the folder; return its path.

    Equal sources give equal bytes, so a cluster caches the upload.
    """
    info = f"curate-{curate.__version__}.dist-info"
    files = {f"curate/{name}": content for name, content in _sources().items()}
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: curate\nVersion: {curate.__version__}\n".encode()
    )
    files[f"{info}/WHEEL"] = WHEEL.encode()
    if points := _entry_points():
        files[f"{info}/entry_points.txt"] = points.encode()
    files[f"{info}/RECORD"] = _record(files, info)
    path = folder / f"curate-{curate.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return path


def _sources() -> dict[str, bytes]:
    assert curate.__file__ is not None, "curate is a package with a file"
    root = Path(curate.__file__).parent
    files = [*root.glob("*.py"), *root.glob("py.typed")]
    for room in ROOMS:
        files += (root / room).rglob("*.py")
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(files)}


def _entry_points() -> str | None:
    try:
        return distribution("curate").read_text("entry_points.txt")
    except PackageNotFoundError:
        return None


def _record(files: dict[str, bytes], info: str) -> bytes:
    lines = [f"{name},sha256={_urlsafe(content)},{len(content)}" for name, content in files.items()]
    return "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()


def _urlsafe(content: bytes) -> str:
    digest = hashlib.sha256(content).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
