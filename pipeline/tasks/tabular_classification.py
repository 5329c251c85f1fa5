"""Tables with a class: numbers standardised, words one-hot or coded; float32 [B, F] out.

Shapes: B rows, F features.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
import torch

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks import options
from curate.pipeline.tasks.arrays import (
    combined,
    dense,
    fixed_lists,
    is_number,
    is_string,
    leaf_type,
    list_shape,
    storage_type,
)
from curate.pipeline.tasks.blank import zero_inputs
from curate.pipeline.tasks.classification import Classification, described
from curate.pipeline.tasks.labels import find_labels
from curate.pipeline.tasks.schema import id_column, inputs_left
from curate.pipeline.tasks.task import Columns
from curate.scorers.protocol import Batch

ONE_HOT = 64
"""A word column with more values than this becomes one standardised code instead of columns."""
MOST_WORDS = 10_000
log = logging.getLogger("curate.tasks")


@dataclass(frozen=True)
class Feature:
    """One column: `width` features out of it.

    `number`: (value - mean) / std per value. `one_hot`: 1 at the word's place in `words`. `code`:
    the word's place, standardised like a number.
    """

    name: str
    kind: Literal["number", "one_hot", "code"]
    width: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    words: tuple[str, ...] = ()

    def encode(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return float32 [B, width]; raises ValueError for nulls, NaN and unknown words."""
        values = self.raw(column)
        if values.shape[1] != self._raw_width:
            raise ValueError(
                f"column {self.name!r} holds {values.shape[1]} values, expected {self._raw_width}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"column {self.name!r} is NaN or infinite")
        if self.kind == "one_hot":
            hot: np.ndarray = np.eye(self.width, dtype=np.float32)[values[:, 0].astype(np.int64)]
            return hot
        made: np.ndarray = (values - np.asarray(self.mean)) / np.asarray(self.std)
        return made.astype(np.float32)

    def raw(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return float64 [B, values]: the numbers, or the words' places in `words`."""
        if column.null_count:
            raise ValueError(f"column {self.name!r} is null")
        if self.kind == "number":
            values = dense(column, self.name).astype(np.float64)
            return (
                values.reshape(len(values), -1) if values.size else np.empty((0, self._raw_width))
            )
        array = _as_words(column, self.name)
        places = pc.index_in(array, value_set=pa.array(self.words, pa.string()))
        if places.null_count:
            unknown = array.filter(pc.is_null(places))[0].as_py()
            raise ValueError(f"column {self.name!r} has {unknown!r}, which the task does not know")
        found: np.ndarray = places.to_numpy().astype(np.float64)[:, None]
        return found

    @property
    def _raw_width(self) -> int:
        return 1 if self.kind == "one_hot" else self.width


@dataclass
class TabularClassification(Classification):
    """Numbers, bools, words and vectors of numbers, and a label."""

    features: tuple[Feature, ...] = ()
    kind = "tabular_classification"

    @classmethod
    def from_corpus(
        cls,
        corpus: Corpus,
        *,
        inputs: str | Sequence[str] | None = None,
        label: str | None = None,
        classes: int | str | Sequence[str | int] | None = None,
    ) -> "TabularClassification":
        """Return the task for this corpus. Reads it twice: for the words, for mean and deviation.

        Raises:
            ValueError: a named column is no feature, or there is none at all.
        """
        label, labels = find_labels(corpus, label, classes)
        names = _feature_columns(corpus.schema, label, inputs)
        raw = [_raw_feature(corpus, name) for name in names]
        made = cls(names, label, labels, id_column(corpus.schema), _standardised(corpus, raw))
        log.info("%d features from columns %s", made.width, ", ".join(names))
        return made

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "TabularClassification":
        """Return the task that `describe` described."""
        features = tuple(_from_json(one) for one in description["preprocess"]["features"])
        return cls(**described(description), features=features)

    def columns(self, schema: pa.Schema) -> Columns:
        """Return the feature and label columns, and `id` where the corpus has it."""
        found = super().columns(schema)
        for feature in self.features:
            kind = schema.field(feature.name).type
            is_word = is_string(storage_type(kind))
            if not is_feature(schema, feature.name) or is_word != bool(feature.words):
                expected = "words" if feature.words else "numbers"
                raise ValueError(f"column {feature.name!r} holds {kind}, not {expected}")
        return found

    @property
    def width(self) -> int:
        """Features of a row."""
        return sum(feature.width for feature in self.features)

    def preprocess(self) -> dict[str, Any]:
        return {"features": [_json(feature) for feature in self.features]}

    def model_args(self) -> dict[str, Any]:
        """Return the number of classes and of features."""
        return {"num_classes": len(self.labels.classes), "input_shape": (self.width,)}

    def encode(self, rows: pa.Table) -> pa.Table:
        """Return `features` (float32 [F]) and `label`."""
        label = self.encode_label(rows)
        parts = [feature.encode(rows.column(feature.name)) for feature in self.features]
        made = fixed_lists(np.concatenate(parts, axis=1))
        return pa.table({"features": made, "label": pa.array(label)})

    def collate(self, encoded: pa.Table) -> Batch:
        """Return float32 [B, F] and class indices."""
        values = torch.from_numpy(dense(encoded.column("features"), "features").copy())
        targets = torch.from_numpy(encoded.column("label").to_numpy().copy())
        return Batch({"features": values}, targets, encoded.num_rows)

    def blank(self, batch: Batch) -> Batch:
        """Return the batch with zeros in every row: the mean of what is standardised."""
        return zero_inputs(batch)


def is_feature(schema: pa.Schema, name: str) -> bool:
    """Tell whether a column holds numbers, bools, words or fixed-size vectors of numbers."""
    kind = storage_type(schema.field(name).type)
    if is_number(kind) or is_string(kind):
        return True
    shape = list_shape(kind)
    return bool(shape) and None not in shape and is_number(leaf_type(kind))


def _feature_columns(
    schema: pa.Schema, label: str, inputs: str | Sequence[str] | None
) -> tuple[str, ...]:
    if inputs is None:
        left = inputs_left(schema, label)
        names = tuple(name for name in left if is_feature(schema, name))
        if skipped := [name for name in left if name not in names]:
            log.warning("columns %s cannot be features and are left out", ", ".join(skipped))
    else:
        names = options.names(inputs)
    for name in names:
        if name not in schema.names:
            raise ValueError(f"no column {name!r}; the corpus has {', '.join(schema.names)}")
        if name == label or not is_feature(schema, name):
            raise ValueError(f"column {name!r} ({schema.field(name).type}) cannot be a feature")
    if not names:
        raise ValueError(f"no column can be a feature; the corpus has {', '.join(schema.names)}")
    return names


def _raw_feature(corpus: Corpus, name: str) -> Feature:
    """Return the feature with its words, still without mean and deviation."""
    kind = corpus.schema.field(name).type
    if not is_string(storage_type(kind)):
        return Feature(name, "number", int(np.prod([d or 1 for d in list_shape(kind)])))
    words: set[str] = set()
    for batch in _batches(corpus, [name]):
        words.update(pc.unique(_as_words(batch.column(0), name).drop_null()).to_pylist())
        if len(words) > MOST_WORDS:
            raise ValueError(
                f"column {name!r} has more than {MOST_WORDS} different words; name the columns to "
                "use with --task-option inputs=A,B,C"
            )
    if not words:
        raise ValueError(f"column {name!r} is null in all rows")
    found = tuple(sorted(words))
    if len(found) <= ONE_HOT:
        return Feature(name, "one_hot", len(found), words=found)
    log.info("column %r has %d words: coded as one number", name, len(found))
    return Feature(name, "code", 1, words=found)


def _standardised(corpus: Corpus, raw: Sequence[Feature]) -> tuple[Feature, ...]:
    """Return the features with mean and deviation (ddof 0) of their finite values in the corpus."""
    sums = {f.name: _Moments(f.width) for f in raw if f.kind != "one_hot"}
    for batch in _batches(corpus, list(sums)) if sums else ():
        for feature in raw:
            if feature.name in sums:
                whole = batch.column(feature.name).drop_null()
                try:
                    sums[feature.name].add(feature.raw(pa.chunked_array([whole])))
                except ValueError as error:  # rows with nulls inside a list: encode refuses them
                    log.debug("left out of the statistics: %s", error)
    return tuple(sums[f.name].standardise(f) if f.name in sums else f for f in raw)


class _Moments:
    """Count, mean and summed squares of deviations, merged batch by batch (Chan et al. 1983)."""

    def __init__(self, width: int) -> None:
        self.count, self.mean, self.squares = np.zeros(width), np.zeros(width), np.zeros(width)

    def add(self, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        count = finite.sum(0)
        mean = np.where(finite, values, 0).sum(0) / np.maximum(count, 1)
        squares = np.where(finite, (values - mean) ** 2, 0).sum(0)
        total = np.maximum(self.count + count, 1)
        step = mean - self.mean
        self.squares += squares + step**2 * self.count * count / total
        self.mean += step * count / total
        self.count += count

    def standardise(self, feature: Feature) -> Feature:
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        std[~(std > 0)] = 1.0  # a constant column stays at 0
        return Feature(
            feature.name,
            feature.kind,
            feature.width,
            tuple(self.mean.tolist()),
            tuple(std.tolist()),
            feature.words,
        )


def _batches(corpus: Corpus, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for shard in range(len(corpus.shards)):
        yield from corpus.read(shard, columns=columns, batch_rows=16_384)


def _as_words(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    array = combined(column)
    return array if pt.is_string(array.type) else array.cast(pa.string())


def _json(feature: Feature) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(feature).items()}


def _from_json(found: Mapping[str, Any]) -> Feature:
    lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
    return Feature(**{**found, **lists})
