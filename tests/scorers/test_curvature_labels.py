"""Labels drawn from a model's prediction: their law, and what they depend on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curate.scorers.curvature_labels import relabelled, uniforms
from curate.scorers.protocol import IGNORE, Batch, Outputs


def drawn(logits: Tensor, rows: Sequence[int], batch: Batch | None = None) -> Tensor:
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
    batch = batch or Batch({"x": logits}, targets, len(logits))
    outputs = Outputs(torch.zeros(len(logits)), batch.targets, logits)
    return relabelled(batch, outputs, rows).targets


def test_labels_are_drawn_as_the_model_predicts() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5, -30.0]).expand(40_000, 5)
    share = torch.bincount(drawn(logits, range(40_000)), minlength=5) / 40_000
    # Five standard errors of a share.
    assert ((share - logits[0].softmax(0)).abs() < 5 * 0.5 / math.sqrt(40_000)).all()


def test_a_label_depends_on_its_row_and_position_alone() -> None:
    logits = torch.randn(6, 9, 4)
    whole = drawn(logits, range(100, 106))
    alone = torch.cat([drawn(logits[i : i + 1, :5], [100 + i]) for i in range(6)])
    assert torch.equal(whole[:, :5], alone)
    assert not torch.equal(whole, drawn(logits, range(6)))


def test_positions_of_a_cut_document_count_on() -> None:
    logits = torch.randn(1, 8, 4)
    ids = torch.tensor([1, 0, 1])
    windows = torch.cat([logits[:, :4], torch.randn(1, 4, 4), logits[:, 4:]])
    batch = Batch({"x": windows}, torch.zeros(3, 4, dtype=torch.long), 2, ids)
    outputs = Outputs(torch.zeros(2), batch.targets, windows, row_ids=ids)
    found = relabelled(batch, outputs, [3, 8]).targets
    assert torch.equal(found[[0, 2]].reshape(1, 8), drawn(logits, [8]))


def test_no_label_is_drawn_where_there_is_no_target() -> None:
    targets = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]])
    logits = torch.randn(2, 3, 4)
    batch = Batch({"x": logits}, targets, 2)
    found = relabelled(batch, Outputs(torch.zeros(2), targets, logits), [0, 1]).targets
    assert torch.equal(found == IGNORE, targets == IGNORE)


def test_a_head_that_is_never_multiplied_out_gives_the_same_labels() -> None:
    head, hidden = nn.Linear(6, 11), torch.randn(5, 4, 6)
    targets = torch.randint(0, 11, (5, 4)).masked_fill(torch.rand(5, 4) < 0.3, IGNORE)
    batch = Batch({"x": hidden}, targets, 5)
    apart = Outputs(torch.zeros(5), targets, hidden=hidden, head=head)
    logits = Outputs(torch.zeros(5), targets, head(hidden))
    found = [relabelled(batch, outputs, range(5)).targets for outputs in (apart, logits)]
    assert torch.equal(*found)


def test_numbers_are_spread_evenly_and_unrelated_between_neighbours() -> None:
    batch = Batch({}, torch.zeros(500, 40, dtype=torch.long), 500)
    u = uniforms(batch, range(500), 0)
    assert ((u >= 0) & (u < 1)).all()
    counts = torch.histc(u, 20, 0, 1)
    # Counts of 1000 each have a standard deviation of 31.
    assert (counts - 1000).abs().max() < 5 * 31
    for x, y in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(x.numel())
