"""Rows whose gradients lower the loss of a validation set most, step by step: GLISTER."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.divided import Divided, within
from curate.selectors.inner_products import inner_products, mean_of
from curate.selectors.picks import picked
from curate.selectors.protocol import Budget, Selection
from curate.selectors.target_groups import check_target_group, target_groups
from curate.selectors.vectors import Vectors, VectorTable, usable_target

HELD_BYTES = 1 << 28
"""What is known of a validation set is held up to this size, and found again above it."""

After = Callable[["Float64[ndarray, ' d']"], "Float64[ndarray, ' d']"]
"""From the sum of chosen gradients to the validation gradient after the step they make."""


@dataclass(frozen=True)
class Glister(Divided):
    """Again and again the row with the largest <g_i, grad L_val(theta - eta sum_{s in S} g_s)>.

    Killamsetty et al. 2021 (arXiv:2012.10630, algorithm 2 with its Taylor step): the row whose
    gradient step lowers the validation loss most to first order, at the weights that the chosen
    rows' steps lead to. Rows' gradients stay those at theta. The target's vectors are its rows'
    gradients. Without target vectors the rows that may be chosen, of each group by itself, are the
    validation set, as in DeepCore's code: sound where their labels are (`validation`, recorded).
    With a target and `by_group` each group is to serve the whole target or, with `target_group`, a
    column of the target, its rows of that group, as in the authors' code (per class). How the
    validation gradient moves:

    - with `classes=C` the vectors are gradients of a linear head of cross-entropy with its biases
      first, [e_1..e_C, e_1 h, .., e_C h] with e = p - onehot(y).
      Each validation row's p, y and h follow from its vector, and its gradient after the step is
      exact for the head, as in the authors' code (cords);
    - without, by one Taylor term: mean g_v - eta F sum_S g with F = mean g_v g_v', the empirical
      Fisher matrix in the place of the Hessian. Vectors may then be sketches.

    `rounds=r` updates r times only and takes the best budget / r rows each time (r-greedy of the
    authors' code); by default after every row. Equal gains in the order of the table. The sum,
    not the mean, of chosen gradients makes the step, so `eta` is the rate of one row. Ranked
    without groups. Time for each pick, or round: n·d, one pass over the vectors, and C·d or, by
    Taylor, 2·d for each row of the validation set, at most d² once d² numbers are held (up to
    256 MiB). Memory: that, or up to 256 MiB of the validation set's features, and some 50 bytes a
    row.
    """

    eta: float | int = 0.01
    classes: int | None = None
    rounds: int | None = None
    target_group: str | None = None
    uses_vectors: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.eta, int | float) and not isinstance(self.eta, bool)
        if not is_number or not 0 <= self.eta < np.inf:
            raise ValueError(f"eta must be a finite number of at least 0, not {self.eta!r}")
        for name, least in (("classes", 2), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
        check_target_group(self.target_group, self.by_group)

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        target = usable_target(table)
        if target is None and self.target_group is not None:
            raise ValueError("target_group names a column of a target: give --target-vectors")
        groups = None if self.target_group is None else target_groups(table, self.target_group)
        whole = None if target is None or groups is not None else self._after(target)
        places = []
        for part in self.parts(table, budget):
            after = whole
            if groups is not None and part.group not in groups:
                raise ValueError(
                    f"the target has no row with a vector of the group {part.group!r} to validate "
                    "it; leave target_group out to validate with all of the target"
                )
            if after is None:
                after = self._after(part.vectors if groups is None else groups[part.group])
            picks = descend(part.vectors, after, part.sizes, part.amount, self.rounds)
            places.append(part.places[picks])
        chosen = np.concatenate(places) if places else np.empty(0, dtype=np.int64)
        ranks = None if self.by_group is not None else np.arange(len(chosen))
        params: dict[str, object] = {
            "update": "fisher" if self.classes is None else "head",
            "validation": "rows" if target is None else "target",
        }
        return picked(table, chosen, ranks=ranks, params=params)

    def _after(self, validation: Vectors) -> After:
        if self.classes is None:
            return fisher_update(validation, self.eta)
        return head_update(validation, self.classes, self.eta)


def descend(
    vectors: Vectors,
    after: After,
    sizes: Int64[ndarray, " n"],
    amount: int,
    rounds: int | None = None,
) -> Int64[ndarray, " k"]:
    """Return rows in the order of the greedy search; it ends before `sizes` exceed `amount`."""
    total = np.zeros(vectors.dimension)
    picks: list[int] = []
    is_left = np.ones(vectors.rows, dtype=bool)
    each = 1 if rounds is None else -(-amount // rounds)
    left = amount
    while left > 0 and is_left.any():
        gains = np.where(is_left, inner_products(vectors, after(total)), -np.inf)
        if rounds is None:
            order = np.array([np.argmax(gains)])
        else:
            order = np.argsort(-gains, kind="stable")[: is_left.sum()]
        # A row that is larger than a round's share comes alone.
        first = within(order, sizes, min(left, each))
        first = first if len(first) else within(order[:1], sizes, left)
        if not len(first):
            break
        picks += first.tolist()
        is_left[first] = False
        left -= int(sizes[first].sum())
        total += vectors.take(first).sum(axis=0, dtype=np.float64)
    return np.array(picks, dtype=np.int64)


def fisher_update(target: Vectors, eta: float | int) -> After:
    """Return the validation gradient to first order, with the empirical Fisher as the Hessian.

    The matrix is computed once where it is not larger than HELD_BYTES and than the target, else
    the target is read again for every update.
    """
    mean, d = mean_of(target), target.dimension
    fisher: Float64[ndarray, "d d"] | None = None
    if eta and d <= target.rows and 8 * d * d <= HELD_BYTES:
        fisher = np.zeros((d, d))
        for block in target.blocks():
            wide = block.astype(np.float64)
            fisher += wide.T @ wide

    def after(total: Float64[ndarray, " d"]) -> Float64[ndarray, " d"]:
        if not eta:
            return mean
        if fisher is not None:
            return np.asarray(mean - eta * (fisher @ total) / target.rows)
        moved = np.zeros_like(mean)
        for block in target.blocks():
            wide = block.astype(np.float64)
            moved += wide.T @ (wide @ total)
        return np.asarray(mean - eta * moved / target.rows)

    return after


def head_update(target: Vectors, classes: int, eta: float | int) -> After:
    """Return the exact validation gradient of a linear head after a step.

    A vector [e, e h'] holds all there is: y is where e is below 0, p = e + onehot(y), the logits
    are log p up to a constant, which softmax forgets, and h is (e h')' e / |e|². Rows of e = 0 to
    rounding, which are sure of the right class, keep the gradient 0. Logits and features are held
    where they take no more than HELD_BYTES, else found again for every update.

    Raises:
        ValueError: the dimension is no multiple of the classes, or rows are no such gradients.
    """
    width = target.dimension // classes - 1
    if target.dimension != classes * (width + 1) or width < 1:
        raise ValueError(
            f"gradients of a head of {classes} classes have {classes} x (features + 1) "
            f"coordinates, the vectors to validate with {target.dimension}; give such gradients or "
            "leave classes out"
        )

    def known() -> Iterator[tuple[ndarray, ndarray, ndarray]]:
        return (_known(block.astype(np.float64), classes) for block in target.blocks())

    held: list[tuple[ndarray, ndarray, ndarray]] | None = None
    if 8 * target.rows * (width + 2 * classes) <= HELD_BYTES:
        held = list(known())

    def after(total: Float64[ndarray, " d"]) -> Float64[ndarray, " d"]:
        bias, weight = total[:classes], total[classes:].reshape(classes, width)
        gradient = np.zeros(target.dimension)
        for logits, features, onehot in known() if held is None else held:
            moved = logits - eta * (bias + features @ weight.T)
            moved -= moved.max(axis=1, keepdims=True)
            p = np.exp(moved)
            error = p / p.sum(axis=1, keepdims=True) - onehot
            gradient[:classes] += error.sum(axis=0)
            gradient[classes:] += (error.T @ features).ravel()
        return gradient / target.rows

    return after


def _known(block: Float64[ndarray, "b d"], classes: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return logits, features and one-hot labels of the rows that are not sure."""
    error, outer = block[:, :classes], block[:, classes:].reshape(len(block), classes, -1)
    square = np.square(error).sum(axis=1)
    unsure = square > 1e-24
    error, outer, square = error[unsure], outer[unsure], square[unsure]
    label = error.argmin(axis=1)
    onehot = np.eye(classes)[label]
    p = error + onehot
    if (p < -1e-3).any() or (np.abs(p.sum(axis=1) - 1) > 1e-2).any():
        raise ValueError(
            "the vectors to validate with are no gradients of a head of cross-entropy, biases "
            "first; give such gradients or leave classes out"
        )
    features = np.einsum("nc,ncd->nd", error, outer) / square[:, None]
    return np.log(np.maximum(p, 1e-30)), features, onehot
