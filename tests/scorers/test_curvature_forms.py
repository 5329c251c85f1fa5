"""Diagonal and Kronecker-factored curvature on gradients made by hand, against dense algebra.

Shapes: B rows, M directions, g groups, t tokens, l and r the sides of a layer's matrix.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curate.kernels.conv_geometry import Geometry
from curate.kernels.linear_head import HeadWants
from curate.scorers import curvature_diagonal, curvature_kronecker
from curate.scorers.curvature import HEURISTIC
from curate.scorers.curvature_diagonal import DiagonalCurvature, looked_up, squares
from curate.scorers.curvature_kronecker import (
    Factors,
    KroneckerCurvature,
    RotatedSquares,
    SideMoment,
    TokenCount,
    Tokens,
    decomposed,
)
from curate.scorers.curvature_layers import Layer
from curate.scorers.head_part import HeadPart
from curate.scorers.head_uses import HeadCall
from curate.scorers.parts import Convolved, Full, Gradient, Indexed, Layout, Pair
from curate.scorers.row_map import RowMap

B, T, L, R, M = 3, 4, 5, 6, 2
SHAPE = torch.Size((L, R))
# float64 on both sides; what is left is the order of sums, and a dense inverse.
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def dense(gradient: Gradient) -> Tensor:
    """Return the gradient [B, l, r], every token and look-up added by itself."""
    total = torch.zeros(B, *gradient.matrix_shape, dtype=torch.float64)
    if gradient.pair is not None:
        total += torch.einsum("bgto,bgti->bgoi", gradient.pair.left, gradient.pair.right).flatten(
            1, 2
        )
    if gradient.indexed is not None:
        for row, tokens in enumerate(gradient.indexed.index.tolist()):
            for t, token in enumerate(tokens):
                total[row, token] += gradient.indexed.right[row, t]
    if gradient.full is not None:
        total += gradient.full.grad.view_as(total)
    return total


PAIR, FULL = Gradient("w", SHAPE, pair=Pair(x(B, 1, T, L), x(B, 1, T, R))), Full(x(B, L, R))
TABLE = Indexed(torch.tensor([[4, 4, 0], [1, 2, 1], [0, 0, 0]]), x(B, 3, R))
GRADIENTS = {
    "a pair": PAIR,
    "a table": Gradient("w", SHAPE, indexed=TABLE),
    "a table of nothing": Gradient("w", SHAPE, indexed=Indexed(TABLE.index[:, :0], x(B, 0, R))),
    "the gradient itself": Gradient("w", SHAPE, full=FULL),
    "a tied table": replace(PAIR, indexed=TABLE),
    "a matrix used in every way": replace(PAIR, indexed=TABLE, full=FULL),
    "a vector": Gradient("w", torch.Size((R,)), full=Full(x(B, R))),
}


class TestDiagonal:
    @pytest.mark.parametrize("scratch", [1, 1 << 22])
    @pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
    def test_it_is_a_sum_over_entries(self, gradient, scratch, monkeypatch) -> None:
        """A row at a time, and all at once."""
        chunks = curvature_diagonal.chunks
        monkeypatch.setattr(curvature_diagonal, "chunks", lambda *a: chunks(*a, budget=scratch))
        true = dense(gradient)
        found = squares(gradient)
        torch.testing.assert_close(found, true.square().sum(0, keepdim=True), **EXACT)
        own = x(*gradient.matrix_shape).square()
        curvature = DiagonalCurvature({"w": Layer("w")}, {"w": own}, 0.3)
        norm = (true.square() / (own + 0.3)).sum((1, 2))
        torch.testing.assert_close(curvature(gradient), norm, **EXACT)

    def test_a_head_whose_errors_are_made_again(self) -> None:
        gradient, _, matrix = layer_of("a head with its loss")
        matrix, own = matrix[:, 0, :, :-1], x(L, R).square()  # but for the bias
        torch.testing.assert_close(squares(gradient)[0], matrix.square().sum(0), **EXACT)
        found = DiagonalCurvature({"w": Layer("w")}, {"w": own}, 0.3)(gradient)
        torch.testing.assert_close(found, (matrix.square() / (own + 0.3)).sum((1, 2)), **EXACT)

    def test_entries_of_a_table_are_those_looked_up(self) -> None:
        row, entry, g = looked_up(TABLE)
        assert list(zip(row.tolist(), entry.tolist(), strict=True)) == [
            (0, 0), (0, 4), (1, 1), (1, 2), (2, 0),
        ]  # fmt: skip
        torch.testing.assert_close(g, dense(GRADIENTS["a table"])[row, entry], **EXACT)

    def test_directions_are_solved_entry_by_entry(self) -> None:
        own = {"w": x(L, R).square(), "b": x(1, L).square()}
        curvature = DiagonalCurvature({"w": Layer("w", "b")}, own)
        assert curvature.names == {"w", "b"}
        damping = HEURISTIC * torch.cat([d.flatten() for d in own.values()]).mean()
        directions = {"w": x(M, L, R), "b": x(M, L), "another": x(M, 2)}
        solved = curvature.solve(directions)
        torch.testing.assert_close(solved["w"], directions["w"] / (own["w"] + damping), **EXACT)
        torch.testing.assert_close(solved["b"], directions["b"] / (own["b"][0] + damping), **EXACT)
        assert solved.keys() == own.keys()

    def test_no_gradient_anywhere_is_no_division_by_0(self) -> None:
        curvature = DiagonalCurvature({"w": Layer("w")}, {"w": torch.zeros(L, R).double()})
        assert (curvature(PAIR) == 0).all()


# -- Kronecker factors: of every form in which a layer's gradient comes


def layer_of(kind: str) -> tuple[Gradient, Layer, Tensor]:
    """Return a layer's gradient, and its matrices [B, g, l, r], biases included."""
    left, right = x(B, 1, T, L), x(B, 1, T, R)
    if kind == "grouped":
        geometry = Geometry((2,), (1,), (0,), (1,), 2)
        pair = Convolved(x(B, 4, T), x(B, 6, T + 1), geometry)
        left, right = pair.left, pair.right
        gradient = Gradient("w", torch.Size((4, 3, 2)), pair=pair)
    elif kind == "a head with its loss":
        left, part = head(right[:, 0])
        gradient = Gradient("w", SHAPE, pair=part)
    elif kind == "stored as [inputs, outputs]":
        gradient = Gradient("w", SHAPE, pair=Pair(left, right, swapped=True))
    else:
        gradient = Gradient("w", SHAPE, pair=Pair(left, right))
    if kind == "without a bias":
        return gradient, Layer("w"), left.mT @ right
    if kind == "stored as [inputs, outputs]":
        left = torch.cat([left, torch.ones_like(left[..., :1])], 3)
    else:
        right = torch.cat([right, torch.ones_like(right[..., :1])], 3)
    return gradient, Layer("w", "b"), left.mT @ right


def head(hidden: Tensor) -> tuple[Tensor, HeadPart]:
    """Return autograd's gradient at the logits of a head over L classes, and the head's part."""
    weight, seeds, targets = x(L, R), x(B, T), torch.randint(L, (B, T))
    logits = (hidden @ weight.T).requires_grad_()
    loss = F.cross_entropy(logits.mT, targets, reduction="none")
    (left,) = torch.autograd.grad((loss * seeds).sum(), logits)
    call = HeadCall(hidden, weight, None, targets)
    call.prepare(Layout("dense", 0, B), RowMap(B), HeadWants())
    call()
    return left[:, None], call.part(seeds, Layout("dense", 0, B))


KINDS = [
    "plain",
    "without a bias",
    "stored as [inputs, outputs]",
    "grouped",
    "a head with its loss",
]


def factors_of(matrix: Tensor) -> Factors:
    _, g, left, right = matrix.shape
    bases = (torch.linalg.qr(x(g, side, side))[0] for side in (left, right))
    return Factors(*bases, x(g, left, right).square())


def halves(matrix: Tensor, gradient: Gradient, layer: Layer) -> dict[str, Tensor]:
    """Return weight and bias of [n, g, l, r]."""
    if layer.bias is None:
        return {"w": matrix.reshape(-1, *gradient.shape)}
    if gradient.pair is not None and getattr(gradient.pair, "swapped", False):
        weight, bias = matrix[:, :, :-1], matrix[:, :, -1]
    else:
        weight, bias = matrix[..., :-1], matrix[..., -1]
    return {"w": weight.reshape(-1, *gradient.shape), "b": bias.flatten(1)}


@pytest.mark.parametrize("damping", [None, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_inverse_of_the_dense_matrix(kind, damping) -> None:
    """Of a group: sum of eigenvalue (q_l x q_r)(q_l x q_r)^T + λI, over all pairs of vectors."""
    gradient, layer, matrix = layer_of(kind)
    own = factors_of(matrix)
    curvature = KroneckerCurvature({"w": layer}, {"w": own}, damping)
    assert curvature.names == {"w"}
    directions = x(M, *matrix.shape[1:])
    lam = HEURISTIC * own.eigenvalues.mean() if damping is None else damping
    norm, solved = torch.zeros(B, dtype=torch.float64), torch.zeros_like(directions)
    for g in range(matrix.shape[1]):
        basis = torch.kron(own.left[g], own.right[g])
        whole = basis @ torch.diag(own.eigenvalues[g].flatten()) @ basis.T
        inverse = torch.linalg.inv(whole + lam * torch.eye(len(whole), dtype=torch.float64))
        rows = matrix[:, g].flatten(1)
        norm += ((rows @ inverse) * rows).sum(1)
        solved[:, g] = (directions[:, g].flatten(1) @ inverse).view_as(directions[:, g])
    torch.testing.assert_close(curvature(gradient), norm, **EXACT)
    found = curvature.solve(halves(directions, gradient, layer))
    for name, value in halves(solved, gradient, layer).items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("scratch", [1, 1 << 22])
@pytest.mark.parametrize("kind", KINDS)
def test_squares_in_the_eigenbasis(kind, scratch, monkeypatch) -> None:
    chunks = curvature_kronecker.chunks
    monkeypatch.setattr(curvature_kronecker, "chunks", lambda *a: chunks(*a, budget=scratch))
    gradient, layer, matrix = layer_of(kind)
    own = factors_of(matrix)
    found = RotatedSquares({"w": layer}, {"w": own})(gradient)
    true = (own.left.mT @ matrix @ own.right).square().sum(0)[None]
    torch.testing.assert_close(found, true, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_of_both_sides(kind) -> None:
    """Of inputs with the 1 appended, tokens that are padding left out; of deltas as they are."""
    gradient, layer, _ = layer_of(kind)
    own = torch.ones(B, T, dtype=torch.bool)
    own[0, 2:] = own[2, 3] = False
    tokens = Tokens(RowMap(B), own)
    pair = gradient.pair
    assert pair is not None
    swapped = getattr(pair, "swapped", False)
    inputs, deltas = (pair.left, pair.right) if swapped else (pair.right, pair.left)
    if layer.bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], 3)
    A = torch.einsum("bgti,bgtj,bt->gij", inputs, inputs, own.double())
    S = torch.einsum("bgto,bgtp->gop", deltas, deltas)
    for on_left in (False, True):
        found = SideMoment({"w": layer}, tokens, on_left)(gradient)
        torch.testing.assert_close(found[0], A if on_left == swapped else S, **EXACT)
    assert TokenCount(tokens)(gradient).tolist() == [int(own.sum())]


class TestTokens:
    """Which tokens of [b, 1, t, i] count."""

    MASK = torch.tensor([[True, True], [True, False], [False, True]])

    def test_one_use_or_several(self) -> None:
        tokens = Tokens(RowMap(3), self.MASK)
        assert torch.equal(tokens.of(x(3, 1, 2, 4)), self.MASK)
        assert torch.equal(tokens.of(x(3, 1, 4, 4)), self.MASK.repeat(1, 2))

    def test_a_layer_over_other_tokens_counts_all_of_them(self) -> None:
        assert Tokens(RowMap(3), self.MASK).of(x(3, 1, 5, 4)) is None
        assert Tokens(RowMap(3), None).of(x(3, 1, 2, 4)) is None

    def test_windows_are_laid_end_to_end(self) -> None:
        rows = RowMap(2, torch.tensor([1, 0, 1]))
        found = Tokens(rows, self.MASK).of(x(2, 1, 4, 4))
        assert found.tolist() == [[True, False, False, False], [True, True, False, True]]
        side = rows.end_to_end(x(3, 1, 3, 4), 2)  # other tokens: all but what fills a row
        assert Tokens(rows, self.MASK).of(side).tolist() == [[True] * 3 + [False] * 3, [True] * 6]


def test_eigenvectors_of_what_is_symmetric_but_for_rounding() -> None:
    a = x(2, 4, 3)
    covariance = a.mT @ a
    covariance[1, :, 2] = covariance[1, 2] = 0.0
    values, vectors = decomposed(covariance + 1e-15 * x(2, 3, 3))
    assert (values >= 0).all()
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    torch.testing.assert_close(vectors.mT @ vectors, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        vectors * values[:, None] @ vectors.mT, covariance, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("gradient", "match"),
    [
        (GRADIENTS["a table"], "w is not used as when its curvature was made"),
        (GRADIENTS["a tied table"], "w is not used as when its curvature was made"),
        (replace(PAIR, pair=Pair(x(B, 1, T, L), x(B, 1, T, R), None)), "both as it is and transp"),
    ],
)
def test_a_layer_used_otherwise_is_refused(gradient, match) -> None:
    own = factors_of(x(1, 1, L, R))
    with pytest.raises(ValueError, match=match):
        KroneckerCurvature({"w": Layer("w")}, {"w": own})(gradient)
