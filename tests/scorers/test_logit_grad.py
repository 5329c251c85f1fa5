"""Gradients of target logits with respect to a model's input, against autograd of one row.

Shapes: B rows, S sequences, T tokens, C classes.
"""

import pytest
import torch
from torch import Tensor, nn

from curate.scorers.logit_grad import Given, LogitGradient, logit_gradient, own_tokens
from curate.scorers.parts import Layout
from curate.scorers.protocol import IGNORE, Batch, Outputs
from curate.scorers.row_map import RowMap

S, T, D, C = 3, 4, 5, 6
FIRST = Layout("dense", 0, S)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def differentiated(
    x: Tensor, outputs: Outputs, given: Given, batch: object = None, rows: RowMap | None = None
) -> LogitGradient:
    return logit_gradient(outputs, given, batch, rows or RowMap(len(x)), keep_graph=False)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 2)])
def test_a_row_of_numbers(shape) -> None:
    """Of images, [S, 3, 2, 2], the mean over channels."""
    given, net = x(S, *shape).requires_grad_(), nn.Linear(torch.Size(shape).numel(), C).double()
    targets = torch.tensor([1, IGNORE, 5])
    logits = net(given.flatten(1).tanh())
    found = differentiated(given, Outputs(torch.zeros(S), targets, logits), Given.now(given))
    for s, y in enumerate(targets.tolist()):
        true = torch.zeros(shape, dtype=torch.float64)
        if y != IGNORE:
            true = torch.autograd.grad(net(given.flatten(1).tanh())[s, y], given)[0][s]
        true = true.mean(0) if len(shape) == 3 else true
        torch.testing.assert_close(found.values[s], true.flatten())
    assert found.coordinates.tolist() == [true.numel()] * S


def language(given: Tensor, weight: Tensor) -> Tensor:
    return given.cumsum(-2).tanh() @ weight.T


TARGETS = torch.tensor([[0, 5, 2, 1], [3, IGNORE, 1, IGNORE], [IGNORE] * 4])


def true_of(given: Tensor, weight: Tensor, s: int) -> Tensor:
    logits = language(given, weight)[s]
    wanted = [logits[t, y] for t, y in enumerate(TARGETS[s].tolist()) if y != IGNORE]
    if not wanted:
        return torch.zeros_like(given[s])
    return torch.autograd.grad(torch.stack(wanted).sum(), given)[0][s]


@pytest.mark.parametrize("is_head", [False, True])
def test_a_sequence_has_the_sum_of_its_target_logits(is_head) -> None:
    """From logits, or from what goes into a head that never makes them."""
    given, head = x(S, T, D).requires_grad_(), nn.Linear(D, C).double()
    hidden = given.cumsum(-2).tanh()
    loss = torch.zeros(S)
    outputs = Outputs(loss, TARGETS, head(hidden))
    if is_head:
        outputs = Outputs(loss, TARGETS, hidden=hidden, head=head)
    found = differentiated(given, outputs, Given.now(given, FIRST))
    for s in range(S):
        true = true_of(given, head.weight, s)
        torch.testing.assert_close(found.values[s], true.flatten())
    # All tokens up to the last target are a row's own; it was cut behind them.
    assert found.coordinates.tolist() == [4 * D, 3 * D, 0]


def test_windows_of_a_row_lie_end_to_end_whatever_axis_they_come_along() -> None:
    given, weight = x(S, T, D).requires_grad_(), x(C, D)
    rows = RowMap(2, torch.tensor([1, 0, 1]))
    outputs = Outputs(torch.zeros(2), TARGETS, language(given, weight))
    first = differentiated(given, outputs, Given.now(given, FIRST), rows=rows)
    blank = torch.zeros(T * D, dtype=torch.float64)
    each = [true_of(given, weight, s).flatten() for s in range(S)]
    true = torch.stack([torch.cat([each[1], blank]), torch.cat([each[0], each[2]])])
    torch.testing.assert_close(first.values, true)
    assert first.coordinates.tolist() == [3 * D, 4 * D]
    turned = given.detach().transpose(0, 1).clone().requires_grad_()
    outputs = Outputs(torch.zeros(2), TARGETS, language(turned.transpose(0, 1), weight))
    second = differentiated(given, outputs, Given.now(turned, Layout("dense", 1, S)), rows=rows)
    torch.testing.assert_close(second.values, true)


def test_padding_has_no_coordinates_whatever_its_gradient() -> None:
    given, weight = x(S, T, D).requires_grad_(), x(C, D)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    outputs = Outputs(torch.zeros(S), TARGETS[:1].expand(S, -1), language(given, weight))
    batch = Batch({"attention_mask": mask}, TARGETS, S)
    found = differentiated(given, outputs, Given.now(given, FIRST), batch)
    assert found.coordinates.tolist() == [4 * D, 2 * D, D]
    assert torch.equal(found.values.view(S, T, D) != 0, (mask != 0)[..., None].expand(-1, -1, D))


def test_the_place_in_the_graph_is_kept_through_a_change_in_place() -> None:
    given, weight = x(S, 7).requires_grad_(), x(C, 7)
    embedded = given * 1
    place = Given.now(embedded)
    embedded.mul_(3)
    outputs = Outputs(torch.zeros(S), torch.tensor([0, 1, 2]), embedded @ weight.T)
    torch.testing.assert_close(differentiated(given, outputs, place).values, 3 * weight[:3])


def test_an_input_that_no_gradient_reaches_is_refused() -> None:
    given, weight = x(S, 7).requires_grad_(), x(C, 7)
    for logits in (weight[:S, :C].clone(), x(S, C).requires_grad_() * 1):
        outputs = Outputs(torch.zeros(S), torch.tensor([0, 1, 2]), logits)
        with pytest.raises(ValueError, match="and none reaches it"):
            differentiated(given, outputs, Given.now(given))


def test_the_graph_is_kept_for_the_loss() -> None:
    given, weight = x(S, 7).requires_grad_(), x(C, 7)
    logits = (given @ weight.T).tanh()
    outputs = Outputs(torch.zeros(S), torch.tensor([0, 1, 2]), logits)
    logit_gradient(outputs, Given.now(given), None, RowMap(S), keep_graph=True)
    torch.autograd.grad(logits.sum(), given)


def test_which_tokens_are_a_rows_own() -> None:
    mask = torch.tensor([[0, 1, 1]])
    for batch in (Batch({"attention_mask": mask}, torch.zeros(1), 1), {"attention_mask": mask}):
        assert own_tokens(batch, None).tolist() == [[False, True, True]]
    targets = torch.tensor([[IGNORE, 3, IGNORE, 1, IGNORE]])
    assert own_tokens(Batch({}, targets, 1), targets).tolist() == [[True] * 4 + [False]]
    assert own_tokens(None, targets[0]) is None and own_tokens(None, None) is None


def test_what_lacks_is_named() -> None:
    given = x(S, T, D).requires_grad_()
    place, targets = Given.now(given, FIRST), TARGETS
    loss = torch.zeros(S)
    with pytest.raises(ValueError, match="differentiates with respect to the model's first"):
        logit_gradient(Outputs(loss), None, None, RowMap(S), keep_graph=False)
    with pytest.raises(ValueError, match=r"needs Outputs\.targets"):
        differentiated(given, Outputs(loss, logits=given), place)
    with pytest.raises(ValueError, match="needs Outputs with logits"):
        differentiated(given, Outputs(loss, targets), place)
    short = Batch({"attention_mask": torch.ones(S, T - 1)}, targets, S)
    with pytest.raises(ValueError, match=r"looks up 4 tokens of a row at once, but .* of 3"):
        differentiated(given, Outputs(loss, targets, given @ x(D, C)), place, short)
