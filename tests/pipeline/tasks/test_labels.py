"""Labels of every type, against what a dictionary of classes would say."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.labels import Labels, find_labels

Write = Callable[..., Corpus]


def declared(names: list[str], values: pa.Array) -> pa.Table:
    """A table whose metadata says, as `datasets` does, that `label` is a ClassLabel."""
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"label": values}).replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    ("values", "classes", "indices"),
    [
        (pa.array([3, 7, 3], pa.int8()), (3, 7), [0, 1, 0]),
        (pa.array([2**40, -1, 2**40]), (-1, 2**40), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"]), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"], pa.large_string()), ("cat", "dog"), [1, 0, 1]),
        (pa.array([True, False, True]), ("false", "true"), [1, 0, 1]),
        (pa.array([1.0, 0.0, 1.0]), (0, 1), [1, 0, 1]),
    ],
)
def test_classes_are_found_in_any_type(
    corpus: Write,
    read_all: Callable,
    values: pa.Array,
    classes: tuple[Any, ...],
    indices: list[int],
) -> None:
    opened = corpus({"label": values}, shards=2)
    name, labels = find_labels(opened, None, None)
    assert labels.classes == classes
    assert labels.encode(read_all(opened).column(name), name).tolist() == indices


def test_declared_class_names_are_the_classes_even_those_without_a_row(
    corpus: Write, read_all: Callable
) -> None:
    opened = corpus(declared(["ant", "bee", "cow"], pa.array([2, 0, 2])))
    _, labels = find_labels(opened, None, None)
    assert labels == Labels(("ant", "bee", "cow"), by_index=True)
    assert labels.encode(read_all(opened).column("label"), "label").tolist() == [2, 0, 2]
    assert labels.encode(pa.array(["cow", "ant"]), "label").tolist() == [2, 0]
    labels.check(opened.schema, "label")
    other = corpus(declared(["bee", "ant", "cow"], pa.array([2, 0, 2])))
    with pytest.raises(ValueError, match=r"has the classes \(bee, ant, cow\), but the task"):
        labels.check(other.schema, "label")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([0, None], "label column 'label' is null"),
        ([0, 3], r"label 3 is not one of the 3 classes \(ant, bee, cow\)"),
        ([0, -1], "label -1 is not one of"),
        ([0.0, float("nan")], "is null"),
        ([0.5, 1.0], "holds fractions"),
        (["ant", "dog"], "label 'dog' is not one of"),
    ],
)
def test_a_bad_label_is_named(values: list[Any], complaint: str) -> None:
    labels = Labels(("ant", "bee", "cow"), by_index=True)
    with pytest.raises(ValueError, match=complaint):
        labels.encode(pa.array(values), "label")


def test_integers_are_no_positions_where_classes_are_words() -> None:
    with pytest.raises(ValueError, match="holds int64 values such as 1, but the classes are"):
        Labels(("cat", "dog")).encode(pa.array([1]), "label")


@pytest.mark.parametrize(
    ("columns", "options", "complaint"),
    [
        ({"x": [1, 2]}, (None, None), "no label column among x; name it with --task-option label="),
        ({"label": pa.nulls(2, pa.int64())}, (None, None), "is null in all 2 rows"),
        ({"label": pa.nulls(2)}, (None, None), "is null in all 2 rows"),
        ({"label": [float("nan")] * 2}, (None, None), "is null in all 2 rows"),
        ({"label": [1, 1]}, (None, None), r"needs two classes or more, found \[1\]"),
        ({"label": [7, 8]}, (None, 3), r"no label among the 3 classes \(0, 1, 2\) in any row"),
        ({"label": [0.5, 1.5]}, (None, None), "holds fractions"),
        ({"x": [b"a", b"b"]}, ("x", None), "has type binary"),
        ({"x": [1, 2]}, ("y", None), "no label column 'y'; the corpus has x"),
        ({"x": ["a", "b"]}, ("x", "a,a"), "class names repeat"),
    ],
)
def test_a_corpus_without_usable_labels_is_refused_at_once(
    corpus: Write, columns: dict[str, Any], options: tuple[Any, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        find_labels(corpus(columns), *options)


@pytest.mark.parametrize("given", [3, "3", [0, 1, 2]])
def test_classes_can_be_given(corpus: Write, given: Any) -> None:
    _, labels = find_labels(corpus({"label": [2, 1]}), None, given)
    assert labels.classes == (0, 1, 2)
    assert labels.encode(pa.array([2, 0]), "label").tolist() == [2, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5) | st.none(), min_size=1), st.data())
def test_encoding_is_looking_up(values: list[int | None], data: st.DataObject) -> None:
    classes = tuple(data.draw(st.permutations(range(-5, 6))))
    labels, array = Labels(classes), pa.array(values, pa.int64())
    start = data.draw(st.integers(0, len(values) - 1))
    kept = values[start:]
    if None in kept:
        with pytest.raises(ValueError, match="null"):
            labels.encode(array.slice(start), "label")
    else:
        found = labels.encode(array.slice(start), "label")
        assert found.dtype == np.int64
        assert found.tolist() == [classes.index(v) for v in kept]
