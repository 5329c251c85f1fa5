"""Features against NumPy's own mean and deviation, and what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.tasks.registry import make_task, task_from_description

Write = Callable[..., Corpus]


def features_of(task: Any, table: pa.Table) -> np.ndarray:
    return np.asarray(task.collate(task.encode(table)).inputs["features"])


def test_numbers_are_standardised_over_all_shards(corpus: Write, read_all: Callable) -> None:
    rng = np.random.default_rng(0)
    small, large = rng.normal(3, 2, 50), rng.integers(10**9, 10**9 + 5, 50)
    vectors = rng.normal(-1, 4, (50, 3)).astype(np.float32)
    columns = {
        "small": small,
        "large": large,
        "constant": np.full(50, 7),
        "flag": small > 3,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3),
        "label": rng.integers(0, 3, 50),
    }
    opened = corpus(columns, shards=3)
    task = make_task("tabular_classification", opened)
    found = features_of(task, read_all(opened))
    raw = np.column_stack([small, large, np.full(50, 7), small > 3, vectors]).astype(np.float64)
    std = raw.std(0)
    expected = (raw - raw.mean(0)) / np.where(std > 0, std, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert task.model_args() == {"num_classes": 3, "input_shape": (7,)}
    again = task_from_description(task.describe())
    assert again == task
    np.testing.assert_array_equal(features_of(again, read_all(opened)), found)


def test_words_are_one_hot_until_there_are_many(corpus: Write, read_all: Callable) -> None:
    few = ["b", "a", "c", "a"] * 20
    many = [f"w{i:02d}" for i in range(80)]
    opened = corpus({"few": few, "many": many, "label": [0, 1] * 40}, shards=2)
    task = make_task("tabular_classification", opened)
    found = features_of(task, read_all(opened))
    assert found.shape == (80, 4)
    assert found[:4, :3].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    code = np.arange(80)
    np.testing.assert_allclose(found[:, 3], (code - code.mean()) / code.std(), rtol=1e-5)


def test_the_id_and_unusable_columns_are_no_features(
    corpus: Write, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"id": [1, 2], "x": [1.0, 2.0], "notes": [b"a", b"b"], "label": [0, 1]}
    task = make_task("tabular_classification", corpus(columns))
    assert task.inputs == ("x",) and task.id == "id"
    assert "notes cannot be features" in caplog.text


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ([1.0, 2.0, None], "column 'x' is null"),
        ([1.0, 2.0, float("nan")], "'x' is NaN or infinite"),
        ([1.0, 2.0, float("inf")], "'x' is NaN or infinite"),
        (["a", "b", None], "column 'x' is null"),
        ([True, False, None], "column 'x' is null"),
    ],
)
def test_a_row_without_its_features_is_its_own_error(
    corpus: Write, read_all: Callable, column: list[Any], complaint: str
) -> None:
    opened = corpus({"x": column, "label": [0, 1, 0]})
    task = make_task("tabular_classification", opened)
    table = read_all(opened)
    assert np.isfinite(features_of(task, table.slice(0, 2))).all()
    for bad in (table, table.slice(2)):
        with pytest.raises(ValueError, match=complaint):
            task.encode(bad)


def test_an_unknown_word_is_named(corpus: Write, read_all: Callable) -> None:
    task = make_task("tabular_classification", corpus({"x": ["a", "b"], "label": [0, 1]}))
    with pytest.raises(ValueError, match="column 'x' has 'z', which the task does not know"):
        task.encode(read_all(corpus({"x": ["a", "z"], "label": [0, 1]})))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"inputs": "y"}, "no column 'y'"),
        ({"inputs": "x,label"}, "column 'label' .* cannot be a feature"),
        ({"inputs": "blob"}, r"column 'blob' \(binary\) cannot be a feature"),
    ],
)
def test_a_column_that_is_no_feature_is_refused(
    corpus: Write, options: dict[str, str], complaint: str
) -> None:
    opened = corpus({"x": [1.0, 2.0], "blob": [b"a", b"b"], "label": [0, 1]})
    with pytest.raises(ValueError, match=complaint):
        make_task("tabular_classification", opened, **options)
    bare = corpus({"blob": [b"a", b"b"], "label": [0, 1]})
    with pytest.raises(ValueError, match="no column can be a feature"):
        make_task("tabular_classification", bare)
