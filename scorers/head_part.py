"""The gradient of a head whose logits never existed, and what is read off it.

Shapes: B rows, T tokens of a row, U look-ups of a row, V vocabulary, D hidden size.

    G = sum_t seed_t e_t h_t^T,  e = p - y,  seed = d(row loss)/d(token loss)

The sums over the vocabulary that a readout takes were made in the forward pass, when the errors of
a few rows were at hand (`kernels/linear_head.py`); only a readout that has no such sum makes the
errors again, a few rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.kernels.dot import grad_dot
from curate.kernels.embedding import embedding_cross_at
from curate.kernels.grad_norm import SCRATCH, accumulable
from curate.kernels.linear_head import HeadSums, head_error, head_gram_sq_norm, head_sq_norm
from curate.kernels.rademacher import Key
from curate.kernels.sketch import sketch_from_sides, sketch_side


@dataclass(frozen=True)
class HeadPart:
    """One head's gradient, by rows: a row's sequences lie end to end, with targets IGNORE between
    them."""

    hidden: Float[Tensor, "b t d"]
    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None
    targets: Int[Tensor, "b t"]
    sums: HeadSums
    seeds: Float[Tensor, "b t"]
    directions: tuple[Float[Tensor, "_ v d"], ...] = ()
    """The sets of directions that the errors were multiplied by, one after another."""
    signs: tuple[Key, int] | None = None
    """The stream and number of signs that the errors were summed by."""

    @property
    def left(self) -> Float[Tensor, "b 1 t v"]:
        """The seeded errors of all rows: as large as the logits."""
        return self.error(slice(0, len(self.hidden)))[:, None]

    @property
    def right(self) -> Float[Tensor, "b 1 t d"]:
        return self.hidden[:, None]

    def error(self, rows: slice) -> Float[Tensor, "r t v"]:
        """Return seed_t e_t of some rows."""
        sums = self.sums
        error = head_error(
            self.hidden, self.weight, self.bias, self.targets, sums.lse, sums.error_target, rows
        )
        return error * self.seeds[rows, :, None]

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, left [r, 1, p, v], right [r, 1, p, d]), a bounded number of errors at a
        time: what is linear in G is the sum over the pieces."""
        rows, tokens = self.targets.shape
        most = max(1, SCRATCH // len(self.weight))
        step = max(1, most // max(1, tokens))
        for row in range(0, rows, step):
            part = slice(row, min(row + step, rows))
            for start in range(0, tokens, most):
                piece = self._tokens(slice(start, start + most))
                yield part, piece.error(part)[:, None], piece.right[part]

    def _tokens(self, part: slice) -> "HeadPart":
        sums = self.sums._replace(
            lse=self.sums.lse[:, part], error_target=self.sums.error_target[:, part]
        )
        return replace(
            self,
            hidden=self.hidden[:, part],
            targets=self.targets[:, part],
            sums=sums,
            seeds=self.seeds[:, part],
        )

    def bias_gradient(self) -> Float[Tensor, "b v"]:
        """Return sum_t seed_t e_t, the gradient of the head's bias."""
        out = self.seeds.new_zeros(len(self.hidden), len(self.weight))
        for rows, left, _ in self.pieces():
            out[rows] += left.sum((1, 2))
        return out

    def sq_norm(self) -> Float[Tensor, " b"]:
        """Return ||G||_F^2."""
        if self.sums.gram is not None:
            return head_gram_sq_norm(self.sums.gram, self.hidden, self.seeds)
        lse, error_target = self.sums.lse, self.sums.error_target
        return head_sq_norm(
            self.hidden, self.weight, self.bias, self.targets, lse, error_target, self.seeds
        )

    def keeps(self, index: Int[Tensor, "b u"]) -> bool:
        """Return whether the columns that were kept are those of all look-ups: there may have
        been more after the head was called."""
        columns = self.sums.columns
        return columns is not None and columns.shape[2] == index.shape[1]

    def cross(self, right: Float[Tensor, "b u d"]) -> Float[Tensor, " b"]:
        """Return <G, sum_u unit(index_u) right_u^T>, the cross term with the same matrix used as a
        table, for the look-ups whose columns of the error were kept."""
        assert self.sums.columns is not None, "kept where the matrix is tied"
        seeded = accumulable(self.hidden) * self.seeds[..., None]
        return embedding_cross_at(self.sums.columns, right, seeded)

    def sketch(self, keys: tuple[Key, Key], k: tuple[int, int]) -> Float[Tensor, "b kk"] | None:
        """Return the two-sided sketch of G; None unless its rows' signs are those the errors were
        summed by."""
        if self.sums.sketch is None or self.signs != (keys[0], k[0]):
            return None
        tall = self.sums.sketch * self.seeds[..., None]
        return sketch_from_sides(tall, sketch_side(self.hidden, keys[1], k[1]))

    def dots(self, directions: Float[Tensor, "m v d"]) -> Float[Tensor, "b m"] | None:
        """Return <G, V_m> for directions that the errors were multiplied by; None for others."""
        start = 0
        for own in self.directions:
            if own is directions and self.sums.dots is not None:
                dots = self.sums.dots[..., start : start + len(own)]
                return (dots * self.seeds[..., None]).sum(1)
            start += len(own)
        return None

    def alignment(self) -> Float[Tensor, " b"]:
        """Return <G, W>."""
        if self.sums.aligned is None:
            out = torch.zeros_like(self.seeds[:, 0])
            for rows, left, right in self.pieces():
                out[rows] += grad_dot(left, right, self.weight[None])[:, 0]
            return out
        return (self.sums.aligned * self.seeds).sum(1)

    def logit_norm(self) -> Float[Tensor, " b"]:
        """Return the norm of d(row loss)/d(logits) over all positions."""
        return (self.sums.error_sq * self.seeds.square()).sum(1).sqrt()
