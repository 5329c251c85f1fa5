"""The vectors of each class of a target set."""

import numpy as np
import pyarrow as pa
import pytest

from curate.selectors.target_groups import check_target_group, target_groups, target_values
from curate.selectors.vectors import ArrayVectors, matrix


class Target:
    """A table of which only the target matters: one number each, the class beside it."""

    def __init__(self, numbers, classes) -> None:
        self.target = ArrayVectors(np.array(numbers, np.float32)[:, None])
        self.target_values = {"label": pa.array(classes)}.__getitem__


def test_each_class_has_its_finite_vectors_in_order():
    table = Target([0, 1, np.nan, 3, 4, np.inf], ["b", "a", "a", "b", "a", "only here"])
    found = {name: matrix(v)[:, 0].tolist() for name, v in target_groups(table, "label").items()}
    assert found == {"b": [0, 3], "a": [1, 4]}  # a class without a vector is none


def test_classes_are_named_as_groups_of_rows_are():
    assert list(target_groups(Target([0, 1, 2], [3, None, 3]), "label")) == ["3", "null"]


def test_a_column_of_another_corpus_is_refused():
    with pytest.raises(ValueError, match="target corpus has 2 rows, its vectors 3"):
        target_groups(Target([0, 1, 2], ["a", "b"]), "label")


def test_vectors_from_a_file_have_no_columns():
    table = Target([0], ["a"])
    del table.target_values
    with pytest.raises(ValueError, match="has vectors only, and its column 'label'"):
        target_values(table, "label")


def test_groups_of_the_target_need_groups_of_rows():
    check_target_group("label", "lang")
    with pytest.raises(ValueError, match="by_group=COLUMN"):
        check_target_group("label", None)
