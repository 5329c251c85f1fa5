"""Output folders of manifests that are made from manifests."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from curate.pipeline.manifests.manifest import NAME, Manifest, is_part
from curate.pipeline.storing.storage import Folder
from curate.pipeline.storing.vacate import vacated


def found_again(folder: Folder, selection: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the whole manifest of an equal request, None where a new one may be written.

    `selection` is what `manifest.json` will say of the request; results may be missing from it.

    Raises:
        ValueError: it holds something else and may not be overwritten.
    """
    names = folder.names()
    asked = json.loads(json.dumps(selection))
    if NAME in names and not overwrite:
        found = Manifest.read(folder.uri)
        if not _agrees(found.content["selection"], asked):
            raise ValueError(
                f"{folder.uri} holds another selection; choose another folder with --out or "
                "replace it with --overwrite"
            )
        found.check_files()
        return found
    foreign = [n for n in names if n != NAME and not is_part(n)] + folder.folders()
    if foreign:
        raise ValueError(
            f"{folder.uri} holds other files ({foreign[0]}); choose another folder with --out"
        )
    return None


def make_free(folder: Folder) -> None:
    """Remove a manifest and what an interrupted one left."""
    names = folder.names()
    for name in [NAME, *filter(is_part, names)]:  # the manifest first: parts alone mean nothing
        folder.delete(name)
    folder.clean_tmp()


@contextlib.contextmanager
def writing(folder: Folder) -> Iterator[None]:
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


def _agrees(there: Any, asked: Any) -> bool:
    if isinstance(asked, dict):
        return isinstance(there, dict) and all(_agrees(there.get(k), v) for k, v in asked.items())
    return bool(there == asked)
