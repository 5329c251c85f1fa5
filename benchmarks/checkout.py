"""Makes `curate` importable from the checkout where it is not installed.

    import checkout  # before the first import of curate

The root of the repository is the package, whatever its folder is called: a link of the right name
in a temporary folder does what an installation would. Only what `curate.kernels` and
`curate.scorers` need must be there: torch, and jaxtyping or the stand-in made here, for which an
annotation such as Float[Tensor, "b t"] means its first part.
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


class _Annotation:
    def __class_getitem__(cls, item: tuple[object, str]) -> object:
        return item[0]


def _link() -> None:
    folder = tempfile.mkdtemp(prefix="curate-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "curate").symlink_to(ROOT, target_is_directory=True)
    sys.path.insert(0, folder)


def _stand_in() -> None:
    module = ModuleType("jaxtyping")
    # No `__getattr__` for whatever name comes: `inspect` asks every module for its `__file__`.
    for name in ("Float", "Int", "Bool", "Integer", "Num", "Shaped", "UInt8", "Int32", "Int64",
                 "Float32", "Float64"):  # fmt: skip
        setattr(module, name, _Annotation)
    sys.modules["jaxtyping"] = module


def _is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ImportError:
        return True


if _is_missing("curate"):
    _link()
if _is_missing("jaxtyping"):
    _stand_in()
