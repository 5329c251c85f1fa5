"""Which classes a corpus has, and labels as class indices."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.arrays import combined, is_string, storage_type
from curate.pipeline.tasks.model_classes import in_order, model_classes
from curate.pipeline.tasks.schema import LABEL_NAMES, class_names, label_column

MAX_CLASSES = 65_536
log = logging.getLogger("curate.tasks")


@dataclass(frozen=True)
class Labels:
    """The classes of a task. `by_index`: integers in the corpus are positions in `classes`."""

    classes: tuple[str | int, ...]
    by_index: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(f"a classifier needs two classes or more, found {list(self.classes)}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"class names repeat: {list(self.classes)}")

    def encode(self, column: pa.ChunkedArray | pa.Array, name: str) -> np.ndarray:
        """Return each label's class index, int64 [n].

        Raises:
            ValueError: a label is null or none of the classes; the message names the value.
        """
        array = _plain(combined(column), name)
        if array.null_count:
            raise ValueError(f"label column {name!r} is null")
        found = self._positions(array, name)
        if found.null_count:
            value = array.filter(pc.is_null(found))[0].as_py()
            raise ValueError(f"label {value!r} is not one of the {self._say()}")
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def check(self, schema: pa.Schema, name: str) -> None:
        """Refuse a column whose declared class names, or sort of values, are others than these."""
        names, kind = class_names(schema, name), storage_type(schema.field(name).type)
        is_word = is_string(kind) or pt.is_boolean(kind)
        if is_word != isinstance(self.classes[0], str) and not (self.by_index or pt.is_null(kind)):
            raise ValueError(
                f"label column {name!r} holds {kind}, but the classes are {_few(self.classes)}"
            )
        if names is not None and self.by_index and names != self.classes:
            raise ValueError(
                f"label column {name!r} has the classes {_few(names)}, but the task was made for "
                f"{_few(self.classes)}"
            )

    def _positions(self, array: pa.Array, name: str) -> pa.Array:
        if pt.is_int64(array.type) and self.by_index:
            inside = pc.and_(pc.greater_equal(array, 0), pc.less(array, len(self.classes)))
            return pc.if_else(inside, array, pa.scalar(None, pa.int64()))
        values = pa.array(self.classes)
        if values.type != array.type:
            raise ValueError(
                f"label column {name!r} holds {array.type} values such as {array[0].as_py()!r}, "
                f"but the classes are {_few(self.classes)}"
            )
        return pc.index_in(array, value_set=values).cast(pa.int64())

    def _say(self) -> str:
        return f"{len(self.classes)} classes {_few(self.classes)}"


def find_labels(
    corpus: Corpus,
    label: str | None,
    classes: int | str | Sequence[str | int] | None,
    model: str | None = None,
) -> tuple[str, Labels]:
    """Return the label column and its classes: given, declared by the schema, or found by a scan.

    A Hugging Face classifier as `model` tells their order, where its classes are the corpus's.

    Raises:
        ValueError: no column is evidently the label, it has no usable type, or no row has a label.
    """
    name = label or label_column(corpus.schema)
    if name is None:
        raise ValueError(
            f"no label column among {', '.join(corpus.schema.names)}; name it with "
            f"--task-option label=COLUMN (looked for {', '.join(LABEL_NAMES)})"
        )
    if name not in corpus.schema.names:
        raise ValueError(
            f"no label column {name!r}; the corpus has {', '.join(corpus.schema.names)}"
        )
    given, outputs = _given(classes), model_classes(model)
    if given is None and (given := _declared(corpus.schema, name)) and outputs:
        given = _declared_in_order(given, outputs, name, str(model))
    if given is not None:
        _require_one_label(corpus, name, given)
        return name, given
    values = _scan(corpus, name)
    ordered = in_order(values, outputs) if outputs else None
    if ordered is not None:
        log.info("the classes are those of %s: %s", model, _few(ordered[0]))
        return name, Labels(*ordered)
    if outputs and len(outputs) == len(values):
        log.warning(
            "%s calls its classes %s, the corpus %s: they are paired in this order "
            "(--task-option classes=... for another)", model, _few(outputs), _few(values)
        )  # fmt: skip
    log.info("found %d classes in column %r: %s", len(values), name, _few(values))
    return name, Labels(values)


def _given(classes: int | str | Sequence[str | int] | None) -> Labels | None:
    if classes is None:
        return None
    if isinstance(classes, str) and classes.isdigit():
        classes = int(classes)
    if isinstance(classes, int):
        return Labels(tuple(range(classes)), by_index=True)
    names = classes.split(",") if isinstance(classes, str) else classes
    by_index = not all(isinstance(n, int) for n in names)
    return Labels(tuple(n.strip() if isinstance(n, str) else n for n in names), by_index)


def _declared(schema: pa.Schema, name: str) -> Labels | None:
    names = class_names(schema, name)
    if names is not None:
        return Labels(names, by_index=True)
    if pt.is_boolean(storage_type(schema.field(name).type)):
        return Labels(("false", "true"))
    return None


def _declared_in_order(declared: Labels, outputs: Sequence[str], name: str, model: str) -> Labels:
    """Return the declared classes in the model's order.

    Raises:
        ValueError: the corpus's numbers mean other classes than the model's.
    """
    ordered = in_order(declared.classes, outputs)
    if ordered is None or ordered[0] == declared.classes:
        return declared
    if not declared.by_index:
        return Labels(*ordered)
    raise ValueError(
        f"label column {name!r} numbers its classes {_few(declared.classes)}, but {model} "
        f"{_few(outputs)}; write the labels as text, or --task-option classes=... in the order "
        "of the numbers"
    )


def _scan(corpus: Corpus, name: str) -> tuple[str | int, ...]:
    """Return the different labels, sorted."""
    values: set[str | int] = set()
    for array in _stream(corpus, name):
        values.update(pc.unique(array.drop_null()).to_pylist())
        if len(values) > MAX_CLASSES:
            raise ValueError(
                f"label column {name!r} has more than {MAX_CLASSES} different values; "
                "that is no class"
            )
    if not values:
        raise ValueError(f"label column {name!r} is null in all {corpus.rows} rows")
    return tuple(sorted(values, key=lambda v: (isinstance(v, str), v)))


def _require_one_label(corpus: Corpus, name: str, labels: Labels) -> None:
    for array in _stream(corpus, name):
        known = array.drop_null()
        if len(known) and labels._positions(known, name).null_count < len(known):
            return
    raise ValueError(f"label column {name!r} has no label among the {labels._say()} in any row")


def _stream(corpus: Corpus, name: str) -> Iterator[pa.Array]:
    for shard in range(len(corpus.shards)):
        for batch in corpus.read(shard, columns=[name], batch_rows=65_536):
            yield _plain(combined(batch.column(0)), name)


def _plain(array: pa.Array, name: str) -> pa.Array:
    """Return labels as int64 or string; NaN counts as missing, bools read "false" and "true"."""
    kind = array.type
    if pt.is_boolean(kind) or is_string(kind):
        return array.cast(pa.string())
    if pt.is_null(kind):
        return array.cast(pa.string())
    if pt.is_integer(kind):
        return array.cast(pa.int64())
    if pt.is_floating(kind):
        whole = pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
        if not pc.all(pc.equal(whole, pc.floor(whole))).as_py() and whole.null_count < len(whole):
            raise ValueError(f"label column {name!r} holds fractions; labels are classes")
        return whole.cast(pa.int64())
    raise ValueError(f"label column {name!r} has type {kind}; labels are integers, text or bools")


def _few(classes: Sequence[str | int]) -> str:
    shown = ", ".join(str(c) for c in classes[:6])
    return f"({shown}, …)" if len(classes) > 6 else f"({shown})"
