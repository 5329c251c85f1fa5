"""What a user's own Python file defines, named as `file.py:name`."""

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def is_user_code(spec: str) -> bool:
    """Tell whether `spec` has the form `file.py:name`."""
    return _SPEC.fullmatch(spec) is not None


def absolute_spec(spec: str) -> str:
    """Return `file.py:name` with the file's absolute path, so that any process finds it."""
    path, name = _parts(spec)
    return f"{path}:{name}"


def load_named(spec: str) -> object:
    """Return what `file.py:name` names, importing the file at most once per content.

    The file is imported by its path under a name made from that path, so that objects of its
    classes can be pickled in one process and loaded in another.

    Raises:
        ValueError: there is no such file or name, or importing the file fails.
    """
    path, name = _parts(spec)
    module = _module(path)
    if not hasattr(module, name):
        public = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ValueError(f"{path} defines no {name!r}; it defines {', '.join(public) or 'nothing'}")
    return getattr(module, name)


def file_digest(spec: str) -> str:
    """Return the sha256 of the file that `file.py:name` names."""
    return hashlib.sha256(_parts(spec)[0].read_bytes()).hexdigest()


def _parts(spec: str) -> tuple[Path, str]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec!r} is not of the form file.py:name")
    path = Path(os.path.abspath(os.path.expanduser(match["file"])))
    if not path.is_file():
        raise ValueError(f"no file {match['file']} (named by {spec!r})")
    return path, match["name"]


def _module(path: Path) -> ModuleType:
    name = f"curate_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if (
        name in sys.modules
        and getattr(sys.modules[name], "__mtime__", None) == path.stat().st_mtime_ns
    ):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__mtime__"] = path.stat().st_mtime_ns
    sys.modules[name] = module
    if (
        str(path.parent) not in sys.path
    ):  # its neighbours are importable; at the end, they hide nothing
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
