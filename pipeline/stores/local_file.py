"""Files that a library reads or writes by their path, wherever the folder is."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from curate.pipeline.storing import commit
from curate.pipeline.storing.storage import Folder

BLOCK_BYTES = 8 << 20


@contextlib.contextmanager
def local_copy(folder: Folder, name: str) -> Iterator[str]:
    """Give the path of a file of the folder; of a remote one, that of a copy for the time being."""
    path = folder.local_path(name)
    if path is not None:
        yield str(path)
        return
    with tempfile.NamedTemporaryFile(prefix="curate-") as copy:
        with folder.open(name) as remote:
            shutil.copyfileobj(remote, copy, BLOCK_BYTES)
        copy.flush()
        yield copy.name


@contextlib.contextmanager
def scratch_file(folder: Folder, name: str) -> Iterator[Path]:
    """Give a path to write to, on the folder's own disk if it is local; it is removed at the end.

    A file that was adopted meanwhile stays under its name.
    """
    local = folder.local_path()
    if local is not None:
        path = commit.scratch(local, name)
    else:
        handle, made = tempfile.mkstemp(prefix="curate-")
        os.close(handle)
        path = Path(made)
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
