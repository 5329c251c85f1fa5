"""Output folders of manifests: what may be written there, and what is there already."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from curate.pipeline.manifests.manifest import NAME, Manifest, is_part
from curate.pipeline.storing.storage import Folder
from curate.pipeline.storing.vacate import vacated

log = logging.getLogger("curate.manifest")

Differences = Callable[[dict[str, Any]], list[str]]
"""Says in words what of a request is not so in the content of a manifest."""


def found_again(folder: Folder, differences: Differences, overwrite: bool) -> Manifest | None:
    """Return the manifest of an equal request, None where a new one may be written.

    One with damaged parts is written anew.

    Raises:
        ValueError: it holds something else and may not be overwritten.
    """
    names = folder.names()
    if NAME in names and not overwrite:
        found = Manifest.read(folder.uri)
        if changed := differences(found.content):
            raise ValueError(
                f"{folder.uri} holds another selection ({'; '.join(changed)}); choose another "
                "folder with --out or replace it with --overwrite"
            )
        try:
            found.check_files()
        except ValueError as damage:
            log.warning("%s; it is made again", damage)
        else:
            log.info("%s holds this selection already", folder.uri)
            return found
    foreign = [n for n in names if n != NAME and not is_part(n)] + folder.folders()
    if foreign:
        raise ValueError(
            f"{folder.uri} holds other files ({foreign[0]}); choose another folder with --out"
        )
    return None


def unlike(selection: dict[str, Any]) -> Differences:
    """Return how a manifest differs from what it would say of this request.

    Results may be missing from `selection`.
    """
    asked = json.loads(json.dumps(selection))
    return lambda content: _differences(content["selection"], asked)


def refuse_operand(folder: Folder, read: Sequence[Folder]) -> None:
    """Raise ValueError where a new manifest would take the place of one that it is made from."""
    for other in read:
        if _same_place(folder, other):
            raise ValueError(
                f"{folder.uri} is one of the manifests to read; choose another folder with --out"
            )


@contextlib.contextmanager
def taking_place(folder: Folder) -> Iterator[Folder]:
    """Give the block a folder to write a manifest to; what it wrote is in `folder` afterwards.

    An older manifest in `folder` stays as it is until the block is through: the new one is written
    to a temporary folder and then takes its place. A block that fails leaves no trace.
    """
    if NAME not in folder.names():
        _make_free(folder)
        with _writing(folder):
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="curate-manifest-") as name:
        made = Folder(name)
        yield made
        _make_free(folder)
        with _writing(folder):
            for part in [*filter(is_part, made.names()), NAME]:
                folder.replace(part, made.read(part))


def _make_free(folder: Folder) -> None:
    """Remove a manifest and what an interrupted one left."""
    names = folder.names()
    for name in [NAME, *filter(is_part, names)]:  # the manifest first: parts alone mean nothing
        folder.delete(name)
    folder.clean_tmp()


@contextlib.contextmanager
def _writing(folder: Folder) -> Iterator[None]:
    """Remove, where the block fails, the parts that it wrote and the folders that it made."""
    with vacated(folder):
        try:
            yield
        except Exception:
            for name in filter(is_part, folder.names()):
                folder.delete(name)
            raise


def of_manifests(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Return what a new manifest says of those it was made from."""
    return [
        {
            "path": m.path,
            "digest": m.digest,
            "selected": len(m),
            "method": m.content["selection"]["method"],
        }
        for m in manifests
    ]


def _same_place(a: Folder, b: Folder) -> bool:
    if a.is_remote or b.is_remote:
        return a == b
    return os.path.realpath(a.uri) == os.path.realpath(b.uri)


def _differences(there: Any, asked: dict[str, Any]) -> list[str]:
    """Return in words what of a request is not so in a manifest."""
    there, found = there if isinstance(there, dict) else {}, []
    for key, new in asked.items():
        old = there.get(key)
        if key in ("params", "scheduled"):  # what came out may stand there, too
            found += _differences(old, new)
        elif old != new:
            # Those it was made of, and lists as long as they are many, are named alone.
            is_long = isinstance(new, list)
            found.append(f"other {key}" if is_long else f"{key} {_said(old)}, now {_said(new)}")
    return ["of other manifests" if each == "other of" else each for each in found]


def _said(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
