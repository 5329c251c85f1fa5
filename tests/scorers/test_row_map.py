"""The map from sequences to rows, against loops over Python lists."""

import pytest
import torch

from curate.scorers.row_map import RowMap

# Rows of one, three, no and two sequences, out of order.
IDS = [1, 3, 1, 0, 3, 1]
MAP = RowMap(4, torch.tensor(IDS))
OF_ROW = [[s for s, row in enumerate(IDS) if row == r] for r in range(4)]


def test_sums_over_the_sequences_of_a_row() -> None:
    x = torch.arange(24.0).view(6, 2, 2)
    for row, sequences in enumerate(OF_ROW):
        assert torch.equal(MAP.add(x)[row], sum((x[s] for s in sequences), torch.zeros(2, 2)))
    assert torch.equal(MAP.total(x), MAP.add(x).sum((1, 2)))
    assert torch.equal(MAP.total(x[:, 0, 0]), MAP.add(x[:, 0, 0]))


@pytest.mark.parametrize("axis", [1, 2])
def test_sequences_end_to_end_along_an_axis(axis) -> None:
    x = torch.randn(6, 2, 2, 3)
    found = MAP.end_to_end(x, axis, fill=-100)
    assert MAP.most == 3 and found.shape[axis] == 6
    for row, sequences in enumerate(OF_ROW):
        blank = [torch.full_like(x[0], -100)] * (3 - len(sequences))
        assert torch.equal(found[row], torch.cat([x[s] for s in sequences] + blank, axis - 1))


def test_what_fills_a_row_is_no_ones_infinity() -> None:
    x = torch.zeros(6, 2)
    x[0] = torch.inf  # the sequence that stands in for those that are not there
    assert MAP.end_to_end(x, 1)[2].tolist() == [0.0] * 6


def test_apart_undoes_end_to_end() -> None:
    x = torch.randn(6, 5)
    assert torch.equal(MAP.apart(MAP.end_to_end(x, 1)), x)


def test_one_sequence_a_row_is_left_as_it_is() -> None:
    alone, x = RowMap(6), torch.randn(6, 2)
    assert alone.most == 1 and alone.add(x) is x
    assert alone.end_to_end(x, 1) is x and alone.apart(x) is x
    assert torch.equal(alone.total(x), x.sum(1))
    listed = RowMap(6, torch.arange(6))
    assert torch.equal(listed.end_to_end(x, 1), x) and torch.equal(listed.add(x), x)
