"""A head's use together with its loss, and what its part says, against autograd on dense logits.

Shapes: S sequences, B rows, T tokens, D width, V vocabulary.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.cross_entropy import gathering, token_statistics
from curate.kernels.linear_head import HeadWants
from curate.scorers import head_part, head_uses
from curate.scorers.head_part import HeadPart
from curate.scorers.parts import Gradient, Indexed, Layout
from curate.scorers.protocol import IGNORE
from curate.scorers.readouts import Dots, Projection, TwoSidedSketch, sq_norm
from curate.scorers.row_map import RowMap
from curate.scorers.uses import Param

S, T, D, V = 4, 3, 5, 7
LAYOUT = Layout("dense", 0, S)
# float64 on both sides; what is left is the order of sums.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
ALONE, WINDOWS = RowMap(S), RowMap(2, torch.tensor([1, 0, 1, 1]))


class Case:
    """One call of a head, and the rows' true gradients of sum_t seed_t loss_t."""

    def __init__(self, row_map: RowMap = ALONE) -> None:
        self.row_map = row_map
        double = torch.float64
        self.hidden, self.weight = torch.randn(S, T, D, dtype=double), torch.randn(V, D).double()
        self.bias, self.seeds = torch.randn(V, dtype=double), torch.randn(S, T, dtype=double)
        self.targets = torch.randint(V, (S, T))
        self.targets[0, 1] = self.targets[3] = IGNORE
        w, b = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        logits = self.hidden @ w.T + b
        loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none")
        self.loss = loss.view(S, T)
        rows = torch.arange(S) if row_map.ids is None else row_map.ids
        total = (self.loss * self.seeds).sum(1)
        self.at_logits = torch.autograd.grad(total.sum(), logits, retain_graph=True)[0]
        G, at_bias, norm = [], [], []
        for row in range(row_map.rows):
            one = torch.autograd.grad(total[rows == row].sum(), [w, b], retain_graph=True)
            G.append(one[0])
            at_bias.append(one[1])
            norm.append(self.at_logits[rows == row].norm())
        self.G, self.at_bias, self.norm = map(torch.stack, (G, at_bias, norm))

    def use(self, wants: HeadWants, layout: Layout | None = LAYOUT, **more: Any) -> Any:
        def find(value: object) -> Param | None:
            known = {id(self.weight): ("w", (V, D)), id(self.bias): ("b", (V,))}
            name, shape = known.get(id(value), ("", ()))
            return Param(name, torch.Size(shape)) if name else None

        args = self.hidden, self.weight, self.targets
        use = head_uses.linear_cross_entropy(find, *args, bias=self.bias)
        assert use is not None
        use.call.prepare(layout, self.row_map, wants, **more)
        torch.testing.assert_close(use.call(), self.loss.detach(), **EXACT)
        return use

    def part(self, wants: HeadWants, **more: Any) -> HeadPart:
        return self.use(wants, **more).call.part(self.seeds, LAYOUT)


@pytest.fixture(params=[ALONE, WINDOWS], ids=["alone", "windows"])
def case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("gram", [True, False])
def test_what_is_read_off_a_heads_gradient(case, gram) -> None:
    directions = torch.randn(2, V, D, dtype=torch.float64)
    wants = HeadWants(gram=gram, directions=directions, aligned=gram)
    part = case.part(wants, directions=[directions])
    assert (part.sums.gram is not None) == gram
    torch.testing.assert_close((part.left.mT @ part.right)[:, 0], case.G, **EXACT)
    torch.testing.assert_close(part.sq_norm(), case.G.square().sum((1, 2)), **EXACT)
    torch.testing.assert_close(part.bias_gradient(), case.at_bias, **EXACT)
    torch.testing.assert_close(part.logit_norm(), case.norm, **EXACT)
    torch.testing.assert_close(part.alignment(), (case.G * case.weight).sum((1, 2)), **EXACT)
    dots = torch.einsum("bvd,mvd->bm", case.G, directions)
    torch.testing.assert_close(part.dots(directions), dots, **EXACT)
    assert part.dots(directions.clone()) is None  # not those the errors were multiplied by


def test_several_sets_of_directions_lie_one_after_another(case) -> None:
    sets = [torch.randn(m, V, D, dtype=torch.float64) for m in (1, 2)]
    part = case.part(HeadWants(directions=torch.cat(sets)), directions=sets)
    for own in sets:
        dots = torch.einsum("bvd,mvd->bm", case.G, own)
        torch.testing.assert_close(part.dots(own), dots, **EXACT)


def test_a_kept_sketch_is_that_of_the_gradient(case) -> None:
    read = TwoSidedSketch(5, (2, 3))
    keys = read.keys("w")
    part = case.part(HeadWants(sketch=(keys[0], 2)))
    found = part.sketch(keys, read.k)
    plain = case.part(HeadWants())
    assert found is not None and plain.sketch(keys, read.k) is None
    assert part.sketch(read.keys("another"), read.k) is None
    expected = read(Gradient("w", case.weight.shape, pair=plain))  # from the errors made again
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_cross_term_with_look_ups_in_the_same_matrix(case) -> None:
    ids, right = torch.randint(V, (S, 2)), torch.randn(S, 2, D, dtype=torch.float64)
    index = case.row_map.end_to_end(ids, 1)
    part = case.part(HeadWants(columns=index))
    right = case.row_map.end_to_end(right, 1)
    assert part.keeps(index) and not part.keeps(index[:, :1])
    assert not case.part(HeadWants()).keeps(index)
    table = torch.zeros_like(case.G)
    for row, token in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        table[row, index[row, token]] += right[row, token]
    torch.testing.assert_close(part.cross(right), (case.G * table).sum((1, 2)), **EXACT)
    tied = Gradient("w", case.weight.shape, pair=part, indexed=Indexed(index, right))
    torch.testing.assert_close(sq_norm(tied), (case.G + table).square().sum((1, 2)), **EXACT)


@pytest.mark.parametrize("scratch", [1, V * T, 2 * V * T, 1 << 22])
def test_pieces_add_up_whatever_their_size(case, scratch, monkeypatch) -> None:
    """One token at a time, one row, two rows, all."""
    monkeypatch.setattr(head_part, "SCRATCH", scratch)
    part = case.part(HeadWants())
    total = torch.zeros_like(case.G)
    for rows, left, right in part.pieces():
        assert left.numel() <= max(scratch, V)
        total[rows] += (left.mT @ right)[:, 0]
    torch.testing.assert_close(total, case.G, **EXACT)
    torch.testing.assert_close(part.bias_gradient(), case.at_bias, **EXACT)
    torch.testing.assert_close(part.alignment(), (case.G * case.weight).sum((1, 2)), **EXACT)


def test_tokens_before_rows_are_put_in_order_afterwards() -> None:
    case = Case()
    truth = case.G, case.at_bias
    case.hidden, case.targets = case.hidden.transpose(0, 1), case.targets.T
    case.loss, seeds = case.loss.T, case.seeds.T
    layout = Layout("dense", 1, S)
    use = case.use(HeadWants(gram=True), layout)
    parts = use.parts(seeds, layout, frozenset(use.params))
    assert parts["weight"].sums.gram is None  # of tokens by themselves it says nothing of a row
    torch.testing.assert_close(parts["weight"].sq_norm(), truth[0].square().sum((1, 2)), **EXACT)
    torch.testing.assert_close(parts["bias"].grad, truth[1], **EXACT)


def test_one_state_a_row() -> None:
    case = Case()
    case.hidden, case.targets, case.loss = case.hidden[:, 0], case.targets[:, 0], case.loss[:, 0]
    use = case.use(HeadWants(gram=True))
    (part, _) = use.parts(case.seeds[:, 0], LAYOUT, frozenset(use.params)).values()
    true = case.at_logits[:, 0].norm(dim=1) * case.hidden.norm(dim=1)
    torch.testing.assert_close(part.sq_norm(), true.square(), **EXACT)


def test_what_the_prediction_says_is_kept_where_the_targets_are(case) -> None:
    with gathering() as gathered:
        case.use(HeadWants(statistics=True))
    logits = case.hidden @ case.weight.T + case.bias
    true = token_statistics(logits, case.targets)
    assert gathered.head is not None
    for kept in (gathered.head, gathered.statistics(case.hidden)):
        for found, expected in zip(kept, true, strict=True):
            torch.testing.assert_close(found, expected.to(found.dtype), **EXACT)
    with gathering() as gathered:
        case.use(HeadWants())  # not asked for
    assert gathered.head is None


def test_long_rows_make_no_gram_matrix() -> None:
    case = Case()
    case.weight, case.hidden = case.weight[:, :1].clone(), case.hidden[..., :1]
    call = head_uses.HeadCall(case.hidden, case.weight, None, case.targets)
    call.prepare(LAYOUT, RowMap(S), HeadWants(gram=True))
    call()
    assert call.sums is not None and call.sums.gram is None  # 3 tokens > 2 * 1 wide


def test_a_row_without_targets_has_no_gradient_even_by_an_infinite_seed() -> None:
    case = Case()
    case.seeds[3] = torch.inf
    part = case.part(HeadWants(gram=True))
    assert part.sq_norm()[3] == 0 and (part.left[3] == 0).all()
    torch.testing.assert_close(part.sq_norm()[:3], case.G[:3].square().sum((1, 2)), **EXACT)


def test_what_is_wanted_of_the_forward_pass() -> None:
    sketch, directions = TwoSidedSketch(1, (2, 3)), [torch.randn(m, V, D) for m in (1, 2)]
    dots = [Dots({"w": v}) for v in directions]
    ids = torch.tensor([[1], [2], [3], [4]])

    def wants(*readouts: Any, alignment: bool = False, looked_up: Tensor | None = None) -> Any:
        return head_uses.head_wants("w", readouts, alignment, looked_up, WINDOWS)

    assert wants(Projection(0, 4)) == HeadWants()
    assert wants(sq_norm) == HeadWants(gram=True)
    assert wants(alignment=True) == HeadWants(gram=True, aligned=True)
    assert wants(sketch) == HeadWants(sketch=(sketch.keys("w")[0], 2))
    assert wants(dots[0]).directions is directions[0]
    assert torch.equal(wants(*dots).directions, torch.cat(directions))
    assert head_uses.head_directions("w", [sq_norm, *dots]) == directions
    assert wants(dots[0], looked_up=ids).columns is None  # the norm alone has a cross term
    columns = wants(sq_norm, looked_up=ids).columns
    assert columns.tolist() == [[2, 0, 0], [1, 3, 4]]  # the windows of each row


def test_what_is_not_read() -> None:
    case = Case()

    def known(*values: Tensor, transposed: bool = False) -> Any:
        return lambda x: Param("w", x.shape, transposed) if any(x is v for v in values) else None

    args = case.hidden, case.weight, case.targets
    assert head_uses.linear_cross_entropy(known(case.bias), *args, bias=case.bias) is None
    assert head_uses.linear_cross_entropy(known(case.hidden, case.weight), *args) is None
    assert head_uses.linear_cross_entropy(known(case.weight, transposed=True), *args) is None
