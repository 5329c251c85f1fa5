"""Sketches put together from a pass, and embeddings as means over target tokens.

Shapes: B rows, S sequences, T tokens, D hidden size.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from curate.kernels.sparse_projection import MOST_OUTPUTS
from curate.scorers.needs import Harvest
from curate.scorers.protocol import IGNORE
from curate.scorers.readouts import Projection, TwoSidedSketch
from curate.scorers.row_vectors import embedding, sketch_kind, sketches
from curate.scorers.watched_model import WatchedModel


@pytest.mark.parametrize(
    ("k", "jl", "kind"),
    [
        (4, None, TwoSidedSketch(7, (4, 4))),
        ((2, 3), None, TwoSidedSketch(7, (2, 3))),
        ((8,), None, Projection(7, 8, True)),
        ((6,), None, Projection(7, 6, False)),
        ((2 * MOST_OUTPUTS,), None, Projection(7, 2 * MOST_OUTPUTS, False)),
        ((8,), "dense", Projection(7, 8, False)),
        ((8,), "sparse", Projection(7, 8, True)),
    ],
)
def test_the_kind_of_a_size(k, jl, kind) -> None:
    assert sketch_kind(k, jl, 7) == kind


@pytest.mark.parametrize(
    ("k", "jl", "match"),
    [
        ((2, 3, 4), None, "must be k,"),
        (0, None, "must be k,"),
        ((2, -1), None, "must be k,"),
        ((6,), "sparse", "needs a power of two up to 16384 in sketch_dim, not 6"),
        ((2 * MOST_OUTPUTS,), "sparse", "a power of two up to"),
        ((8,), "thin", "must be 'sparse' or 'dense', not 'thin'"),
    ],
)
def test_a_size_that_no_sketch_has(k, jl, match) -> None:
    with pytest.raises(ValueError, match=match):
        sketch_kind(k, jl, 0)


def test_sketches_are_put_end_to_end_or_added() -> None:
    """In the order of the names; a parameter that the loss does not depend on is 0."""
    a, b = torch.randn(2, 3, 4)
    harvest = Harvest(torch.zeros(3), {"sketch": {"b": b, "a": a}})
    names = ["a", "idle", "b"]
    two_sided = sketches(harvest, "sketch", names, TwoSidedSketch(0, (2, 2)))
    assert torch.equal(two_sided, torch.cat([a, torch.zeros(3, 4), b], 1))
    added = sketches(harvest, "sketch", names, Projection(0, 4))
    assert torch.equal(added, a + b)
    assert torch.equal(sketches(harvest, "sketch", [], Projection(0, 4)), torch.zeros(3, 4))


def core(starts_at_token_0: bool = True) -> WatchedModel:
    watched = WatchedModel(nn.Linear(1, 1), lambda m, x: m(x).sum(1), probe=False)
    watched.passes.plan.head = SimpleNamespace(starts_at_token_0=starts_at_token_0)
    return watched


def harvested(hidden: Tensor, targets: Tensor | None, ids: Tensor | None = None) -> Harvest:
    rows = len(hidden) if ids is None else int(ids.max()) + 1
    return Harvest(torch.zeros(rows), {}, hidden=hidden, targets=targets, row_ids=ids)


def test_an_embedding_is_a_mean_over_target_tokens() -> None:
    hidden = torch.randn(3, 4, 5, dtype=torch.float64)
    targets = torch.tensor([[1, 2, IGNORE], [IGNORE, 0, IGNORE], [3, 3, 3]])  # the last cut off
    found = embedding(harvested(hidden, targets), core())
    places = [[0, 1], [1], [0, 1, 2]]
    true = torch.stack([hidden[s, t].mean(0) for s, t in enumerate(places)])
    torch.testing.assert_close(found, true)
    ids = torch.tensor([1, 0, 1])  # windows: of all tokens of the row alike
    of_rows = embedding(harvested(hidden, targets, ids), core())
    tokens = torch.cat([hidden[0, :2], hidden[2, :3]])
    torch.testing.assert_close(of_rows, torch.stack([hidden[1, 1], tokens.mean(0)]))


def test_one_state_a_row_is_the_embedding() -> None:
    hidden = torch.randn(3, 5, dtype=torch.float64)
    for targets in (None, torch.tensor([1, IGNORE, 2])):
        assert torch.equal(embedding(harvested(hidden, targets), core()), hidden)


def test_without_targets_all_positions_count() -> None:
    hidden = torch.randn(3, 2, 2, 5, dtype=torch.float64)
    found = embedding(harvested(hidden, None), core())
    torch.testing.assert_close(found, hidden.mean((1, 2)))


def test_a_row_without_targets_has_no_mean() -> None:
    targets = torch.full((1, 4), IGNORE)
    assert embedding(harvested(torch.ones(1, 4, 5), targets), core()).isnan().all()


def test_half_precision_is_added_up_in_float32() -> None:
    """4096 ones: bfloat16 itself counts to 256."""
    hidden = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    found = embedding(harvested(hidden, torch.zeros(1, 4096, dtype=torch.long)), core())
    assert found.dtype == torch.float32 and found.tolist() == [[1.0, 1.0]]


def test_targets_that_lie_elsewhere_are_refused() -> None:
    hidden, targets = torch.ones(1, 4, 5), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="targets do not lie on the positions"):
        embedding(harvested(hidden, targets), core())
    with pytest.raises(ValueError, match="targets do not lie on the positions"):
        embedding(harvested(hidden, targets[:, 1:]), core(starts_at_token_0=False))
