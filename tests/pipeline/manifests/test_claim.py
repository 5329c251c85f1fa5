"""A new manifest in the place of an older one: whole, or none that could be taken for one."""

import uuid
from pathlib import Path

import pytest

from curate.pipeline.manifests.claim import taking_place
from curate.pipeline.manifests.manifest import NAME
from curate.pipeline.storing.storage import Folder

PARTS = [f"part-0000{i}.parquet" for i in range(3)]


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names()}


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A manifest of three parts."""
    found = Folder(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    for name in [*PARTS, NAME]:
        found.replace(name, b"old")
    return found


def test_no_part_of_the_older_one_stays(folder: Folder) -> None:
    before = contents(folder)
    with taking_place(folder) as place:
        for name in (PARTS[0], NAME):
            place.replace(name, b"new")
        assert contents(folder) == before
    assert contents(folder) == {PARTS[0]: b"new", NAME: b"new"}


def test_what_cannot_be_made_leaves_the_older_one(folder: Folder) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match="too many groups"), taking_place(folder) as place:
        place.replace(PARTS[0], b"new")
        raise ValueError("too many groups")
    assert contents(folder) == before


@pytest.mark.parametrize("at", [*PARTS, NAME])
@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_whatever_stops_the_move_leaves_parts_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, at: str, stop: type[BaseException]
) -> None:
    replace = Folder.replace

    def stopped(self: Folder, name: str, data: bytes) -> None:
        if self == folder and name == at:
            raise stop
        replace(self, name, data)

    monkeypatch.setattr(Folder, "replace", stopped)
    with pytest.raises(stop), taking_place(folder) as place:
        for name in [*PARTS, NAME]:
            place.replace(name, b"new")
    there = contents(folder)
    assert NAME not in there and set(there.values()) <= {b"new"}
    assert stop is KeyboardInterrupt or not there
    monkeypatch.undo()
    with taking_place(folder) as place:  # as the next try does
        place.replace(NAME, b"again")
    assert contents(folder) == {NAME: b"again"}
