"""Leaving no trace of a run that was refused: the empty folders that it made go again."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from curate.pipeline.storing.commit import GUARDS, TMP
from curate.pipeline.storing.storage import Folder


@contextlib.contextmanager
def vacated(*folders: Folder) -> Iterator[None]:
    """Remove, where the block fails, what it made and left empty of these folders.

    Folders that were there before stay, and so does everything that holds a file.
    """
    before = [missing(folder) for folder in folders]
    try:
        yield
    except BaseException:
        for folder, made in zip(folders, before, strict=True):
            vacate(folder, made)
        raise


def missing(folder: Folder) -> list[Path]:
    """Return which of a local folder, its `.tmp` and its parents are not there, innermost first."""
    path = folder.local_path()
    if path is None:
        return []
    return [place for place in (path / TMP, path, *path.parents) if not place.exists()]


def vacate(folder: Folder, made: list[Path]) -> None:
    """Remove those of the folders in `made` that are empty, and what is empty in `folder`."""
    path = folder.local_path()
    inner = [Path(at) for at, *_ in os.walk(path, topdown=False)] if path in made else []
    for place in [*inner, *made]:
        with contextlib.suppress(OSError):  # it holds something, or was never made
            if place.name == TMP:
                _remove_guards(place)
            place.rmdir()


def _remove_guards(place: Path) -> None:
    if all(entry.name in GUARDS for entry in place.iterdir()):
        for name in GUARDS:
            with contextlib.suppress(FileNotFoundError), (place / name).open("r+") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody is at work
                (place / name).unlink()
