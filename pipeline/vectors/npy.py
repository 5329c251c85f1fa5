"""Vectors from a NumPy file, memory-mapped."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from curate.pipeline.reading.fingerprint import WHOLE_BYTES, file_state, fingerprint
from curate.pipeline.vectors.source import Wanted
from curate.selectors.vectors import ArrayVectors, Vectors


@dataclass(frozen=True)
class NpyFile:
    """The rows of a `.npy` file of shape [rows, dimensions], in the order of the score table.

    Raises:
        ValueError: no such file, it is damaged, or it does not have a row for each row.
    """

    path: str
    wanted: Wanted

    def __post_init__(self) -> None:
        array, wanted = self._mapped(), self.wanted
        if wanted.rows is not None and len(array) != wanted.rows:
            whose = f"target {wanted.corpus.uri}"
            if not wanted.is_target:
                whose = f"score table {wanted.scores.path}"
            raise ValueError(
                f"{self.path} holds {len(array)} vectors, the {whose} "
                f"has {wanted.rows} rows; give one vector for each row, NaN where there is none"
            )
        if not len(array):
            raise ValueError(f"{self.path} holds no vector")

    @property
    def content(self) -> dict[str, Any]:
        state = file_state(self.path)
        kind = "sha256" if state.size <= WHOLE_BYTES else "blocks"
        return {"source": self.path, "digest": fingerprint(self.path, state, kind)}

    def read(self) -> Vectors:
        return ArrayVectors(self._mapped())

    def _mapped(self) -> ndarray:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            ArrayVectors(array)
        except FileNotFoundError:
            raise ValueError(f"{self.wanted.flag}: there is no file {self.path}") from None
        except (ValueError, OSError, EOFError) as problem:
            said = str(problem).split("\n")[0].rstrip(".")
            if "allow_pickle" in said:  # NumPy takes any other file for a pickle
                said = "it was not written by numpy.save"
            raise ValueError(
                f"{self.wanted.flag}: {self.path} is no array of vectors: {said}"
            ) from None
        return np.asarray(array)
