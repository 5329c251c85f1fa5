"""The stores of one unit while it is scored: filled batch by batch, written window by window.

Shapes: N rows of a window, B rows of a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from curate.pipeline.scoring.store_pass import Stored
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.stores.layout import Layout
from curate.pipeline.stores.writer import StoreFile
from curate.pipeline.storing.storage import Folder

FOLDER = "store"


def store_name(name: str, unit: int) -> str:
    """Return the file of a unit's vectors, below the scores folder."""
    return f"{FOLDER}/{name}/unit-{unit:05d}.arrow"


@dataclass
class _Window:
    """The vectors of the rows being scored; bool `there` [N] tells which have come."""

    start: int
    vectors: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    there: np.ndarray


class UnitStores:
    """Collects vectors of a unit's rows. Nothing has its name before `commit`; `close` in any case.

    `layouts()` are asked for when the first vectors come. Names begin with `lead`.
    """

    def __init__(
        self,
        work: Work,
        unit: Unit,
        layouts: Callable[[], Mapping[str, Layout]],
        lead: str = "",
    ) -> None:
        self.work, self.unit, self._layouts, self._lead = work, unit, layouts, lead
        self._files: dict[str, StoreFile] = {}
        self._shard = np.concatenate([np.full(s.rows, s.shard, np.int32) for s in unit.spans])
        self._row = np.concatenate([np.arange(s.start, s.start + s.rows) for s in unit.spans])
        self._window: _Window | None = None

    def begin(self, start: int, rows: int) -> None:
        """Make room for a window: rows `start` to `start + rows` of the unit."""
        vectors, norms = {}, {}
        for name, layout in self._layouts().items():
            shape = (rows, len(layout.checkpoints))
            number = np.float16 if layout.has_norms else np.float32
            vectors[name] = np.zeros((*shape, layout.width), number)
            if layout.has_norms:
                norms[name] = np.zeros((*shape, len(layout.layers)), np.float32)
        self._window = _Window(start, vectors, norms, np.zeros(rows, dtype=bool))

    def put(self, positions: Int[np.ndarray, " b"], stored: Mapping[str, Stored]) -> None:
        """Take the vectors of rows of the window, by their positions in the unit."""
        assert self._window is not None, "a window was begun"
        places = positions - self._window.start
        self._window.there[places] = True
        for name, found in stored.items():
            self._window.vectors[name][places] = found.vectors
            if found.norms is not None:
                self._window.norms[name][places] = found.norms

    def end(self, failed: Mapping[int, str]) -> None:
        """Write the window; rows that `failed` (positions in the unit) have no vector."""
        window = self._window
        assert window is not None, "a window was begun"
        rows = slice(window.start, window.start + len(window.there))
        absent = ~window.there
        absent[[p - window.start for p in failed if rows.start <= p < rows.stop]] = True
        for name, file in self._open_files().items():
            file.write(
                self._shard[rows],
                self._row[rows],
                window.vectors[name],
                window.norms.get(name),
                absent,
            )
        self._window = None

    def commit(self) -> dict[str, dict[str, str]]:
        """Give the files their names; return name and sha256 of each store's file."""
        found = {
            name: {"file": file.name, "sha256": file.commit()}
            for name, file in self._open_files().items()
        }
        self.close()
        return found

    def close(self) -> None:
        """Let go of what was not committed."""
        for file in self._files.values():
            file.close()

    def _open_files(self) -> dict[str, StoreFile]:
        if not self._files:
            receipt: dict[str, Any] = {
                "run": self.work.run,
                "unit": self.unit.number,
                "spans": [[s.shard, s.start, s.rows] for s in self.unit.spans],
                "rows": self.unit.rows,
            }
            folder = Folder(self.work.out)
            for name, layout in self._layouts().items():
                at = self._lead + store_name(name, self.unit.number)
                self._files[name] = StoreFile(folder, at, layout, receipt)
        return self._files
