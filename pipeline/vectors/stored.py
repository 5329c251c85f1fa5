"""Vectors that the score run stored: embeddings, sketches of gradients, probabilities."""

import hashlib
from dataclasses import dataclass
from typing import Any

from curate.pipeline.stores.layout import STORES
from curate.pipeline.stores.store import Store, open_store
from curate.pipeline.storing.storage import canonical_json
from curate.pipeline.vectors.source import Wanted
from curate.selectors.vectors import Vectors, held_if_few


@dataclass(frozen=True)
class Stored:
    """The store called `name` of the score folder, all its checkpoints one after the other.

    Small ones are copied into memory: a method may read them many times, and each reading of a
    store multiplies directions by norms.

    Raises:
        ValueError: the score run stored no such vectors.
    """

    name: str
    wanted: Wanted

    def __post_init__(self) -> None:
        self._store()

    @property
    def content(self) -> dict[str, Any]:
        lead = ("target/" if self.wanted.is_target else "") + f"store/{self.name}/"
        recorded = self.wanted.scores.success["stores"]
        sums = {file: sums for file, sums in recorded.items() if file.startswith(lead)}
        return {"source": self.name, "digest": hashlib.sha256(canonical_json(sums)).hexdigest()}

    def read(self) -> Vectors:
        return held_if_few(self._store())

    def _store(self) -> Store:
        if self.wanted.elsewhere is not None:
            raise ValueError(
                f"{self.wanted.flag} {self.name} are vectors of the score run's own target; "
                "leave --target out, or give column:NAME or encoder:FOLDER"
            )
        return open_store(self.wanted.scores, self.name, target=self.wanted.is_target)


def is_store(text: str) -> bool:
    """Tell whether `text` names a store."""
    return text in STORES
