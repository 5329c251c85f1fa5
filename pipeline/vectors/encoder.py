"""Vectors from a sentence encoder in a local folder, made once and kept in a cache.

Shapes: B texts of a batch, T tokens, D dimensions.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32
from numpy import ndarray

from curate.pipeline.storing.storage import canonical_json
from curate.pipeline.tasks.arrays import combined, is_string, storage_type
from curate.pipeline.tasks.texts import guess_text
from curate.pipeline.vectors.sentences import SentenceEncoder
from curate.pipeline.vectors.source import Wanted
from curate.selectors.vectors import ArrayVectors, Vectors

WINDOW_ROWS = 1024  # texts sorted by length together, so that batches hold little padding
VERSION = 1  # of how vectors are made; part of the cache's key


@dataclass(frozen=True)
class Encoder:
    """What a sentence encoder makes of each row's text; a row whose text is null has no vector.

    `folder` is a Hugging Face folder as sentence-transformers writes it, or any encoder with a
    tokenizer. The text is the score run's input, or `column`. Vectors are kept under the cache
    folder (`CURATE_CACHE`, else ~/.cache/curate) by encoder, corpus and column.

    Raises:
        ValueError: there is no such folder or text, or the encoder is not one we can run.
    """

    folder: str
    wanted: Wanted
    column: str | None = None

    def __post_init__(self) -> None:
        if not Path(self.folder, "config.json").is_file():
            raise ValueError(
                f"{self.wanted.flag}: {self.folder} is no encoder: a local folder with a model "
                "and its tokenizer is needed"
            )
        self._text_column()

    @property
    def content(self) -> dict[str, Any]:
        column = self._text_column()
        content = {
            "digest": self._digest(),
            "corpus": self.wanted.corpus.digest,
            "version": VERSION,
        }
        sum_ = hashlib.sha256(canonical_json({**content, "column": column})).hexdigest()
        return {"source": f"encoder:{self.folder}", "column": column, "digest": sum_}

    def read(self) -> Vectors:
        content = self.content
        kept = _cache() / f"{content['digest']}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            self._write(kept, str(content["column"]))
        return ArrayVectors(np.load(kept, mmap_mode="r"))

    def _write(self, kept: Path, column: str) -> None:
        """Encode all rows into a file that appears whole."""
        encoder = SentenceEncoder.load(self.folder)
        rows = self.wanted.corpus.rows
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=kept.parent) as folder:
            path = Path(folder, "vectors.npy")
            array = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(rows, encoder.dimension)
            )
            at = 0
            for block in self._blocks(encoder, column):
                array[at : at + len(block)] = block
                at += len(block)
            assert at == rows, "every row was encoded"
            array.flush()
            del array
            os.replace(path, kept)

    def _blocks(self, encoder: SentenceEncoder, column: str) -> Iterator[Float32[ndarray, "b d"]]:
        for batch in self.wanted.batches([column], WINDOW_ROWS):
            texts = combined(pa.chunked_array([batch.column(0)]))
            there = np.asarray(texts.is_valid())
            block = np.full((len(texts), encoder.dimension), np.nan, dtype=np.float32)
            block[there] = encoder.encode(texts.drop_null().to_pylist())
            yield block

    def _text_column(self) -> str:
        schema = self.wanted.corpus.schema
        strings = [n for n in schema.names if is_string(storage_type(schema.field(n).type))]
        task = self.wanted.scores.meta.get("task") or {}
        scored = ((task.get("columns") or {}).get("inputs") or [None])[0]
        guessed = guess_text(schema, None, 1) or (None,)
        name = self.column or (scored if scored in strings else guessed[0])
        if name is None or name not in strings:
            what = "which column is the text?" if name is None else f"column {name!r} is no text;"
            raise ValueError(
                f"{self.wanted.flag}: {what} the texts of {self.wanted.corpus.uri} are: "
                f"{', '.join(strings) or 'none'}; write encoder:{self.folder}@COLUMN"
            )
        return str(name)

    def _digest(self) -> str:
        """Return the sha256 over the folder's files that decide vectors."""
        total = hashlib.sha256()
        folder = Path(self.folder)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            if path.suffix in (".json", ".txt", ".safetensors", ".bin", ".model"):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                total.update(json.dumps([name, digest]).encode())
        return total.hexdigest()


def _cache() -> Path:
    """Return where vectors are kept from one selection to the next."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "curate")
    return Path(os.environ.get("CURATE_CACHE") or default, "vectors")
