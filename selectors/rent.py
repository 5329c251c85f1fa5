"""Rows drawn again as often as their labels are likely to be right: RENT.

Shapes: n rows, c classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.picks import Candidates, candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.transition import anchored, checked, confident, read_transition, symmetric
from curate.selectors.vectors import Vectors, VectorTable, part_of
from curate.selectors.weighing import Weighing

TINY = 1e-12
OFF = 0.02  # stored probabilities are float16
SHOWN = 100  # the most classes whose estimated matrix a manifest holds


@dataclass(frozen=True)
class Rent(Weighing):
    """Weights w_i = p(y_i | x_i) / sum_k T[y_i, k] p(k | x_i) of rows with noisy labels y.

    Bae et al. 2024 ("Dirichlet-based per-sample weighting by transition matrix for noisy label
    learning", ICLR): p is a model's guess of the clean label, T[noisy, clean] how labels are
    changed, and drawing rows with replacement in proportion to w undoes the noise. The weights are
    of kind `sampling`, which is such a draw in each epoch; theirs is in each batch. `--weight-kind
    loss` is the same by weighted losses. The denominator has 1e-12 added, as theirs.

    The vectors are probabilities, `--vectors probs`; of several checkpoints the weighted mean is
    taken. `label` is the column of given labels: numbers from 0 in the order of the
    probabilities, or names with `classes` in that order. T is one of: `noise`, a symmetric rate;
    `transition`, a matrix or a `.npy` or comma-separated file of one, columns summing to 1;
    `estimate="anchor"` (Patrini et al. 2017) or `"confident"` (Northcutt et al. 2021), from the
    table's own rows.

    Two passes over the vectors; estimating holds all probabilities, 8 n·c bytes.
    """

    label: str
    noise: float | int | None = None
    transition: str | Sequence[Sequence[float | int]] | None = None
    estimate: str | None = None
    classes: Sequence[str | int] | None = None
    uses_vectors: ClassVar[bool] = True
    weight_kind: ClassVar[str] = "sampling"

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [n for n in ("noise", "transition", "estimate") if getattr(self, n) is not None]
        if len(named) != 1:
            raise ValueError(
                "give how labels were changed by one of noise=RATE, transition=FILE or "
                "estimate=anchor|confident"
            )
        if self.estimate not in (None, "anchor", "confident"):
            raise ValueError(f"estimate must be anchor or confident, not {self.estimate!r}")
        if isinstance(self.classes, str):
            raise ValueError(f"classes must be a list of names, [a, b], not {self.classes!r}")
        if self.noise is not None:
            symmetric(self.noise, 2)  # says what is wrong with a rate

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {self.label}

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        values, params = self.weights(table)
        return self.weighed(table, values, budget, rng, params, self.weight_kind)

    def weights(self, table: VectorTable) -> tuple[Float64[ndarray, " n"], dict[str, object]]:
        """Return the weight of each row of the table, NaN where it has none, and what T was."""
        rows = candidates(table, by_group=self.label)
        vectors = part_of(table.vectors, rows.places)
        given = self._matrix()
        classes = self._class_count(given, vectors)
        labels = self._numbered(rows, classes)
        if self.noise is not None:
            given = symmetric(self.noise, classes)
        if given is None:
            probs = np.concatenate([mean_probs(block, classes) for block in vectors.blocks()])
            given = anchored(probs) if self.estimate == "anchor" else confident(probs, labels)
        found, at = np.empty(len(labels)), 0
        for block in vectors.blocks():
            mine = slice(at, at + len(block))
            found[mine] = label_weights(mean_probs(block, classes), labels[mine], given)
            at += len(block)
        values = np.full(table.rows, np.nan)
        values[rows.places] = found
        digest = hashlib.sha256(np.ascontiguousarray(given).tobytes()).hexdigest()
        kept = float(np.diag(given).mean())
        matrix: dict[str, object] = {"sha256": digest, "classes": classes, "kept": kept}
        if self.estimate is not None and classes <= SHOWN:
            matrix["noisy_by_clean"] = given.tolist()
        return values, {"matrix": matrix}

    def _matrix(self) -> Float64[ndarray, "c c"] | None:
        if isinstance(self.transition, str):
            return read_transition(self.transition)
        if self.transition is not None:
            if len({len(row) for row in self.transition}) > 1:
                raise ValueError("transition: the rows of the matrix differ in length")
            return checked(np.array(self.transition, dtype=np.float64), "the matrix")
        return None

    def _class_count(self, given: ndarray | None, vectors: Vectors) -> int:
        if given is not None:
            return len(given)
        if self.classes is not None:
            return len(self.classes)
        return _one_block(vectors)

    def _numbered(self, rows: Candidates, classes: int) -> Int64[ndarray, " n"]:
        """Return labels as places in the probabilities."""
        names = range(classes) if self.classes is None else self.classes
        number = {str(name): i for i, name in enumerate(names)}
        if len(number) < len(names):
            raise ValueError("classes names a class twice")
        if len(number) != classes:
            raise ValueError(f"classes names {len(number)} classes, the transition has {classes}")
        if strange := sorted(set(rows.groups) - number.keys()):
            raise ValueError(
                f"{self.label!r} holds {strange[0]!r}, which is none of the {classes} classes; "
                "give their names in the order of the probabilities by classes=[...]"
            )
        order = np.array([number[value] for value in rows.groups], dtype=np.int64)
        return np.asarray(order[rows.group])


def label_weights(
    probs: Float64[ndarray, "n c"],
    labels: Int64[ndarray, " n"],
    transition: Float64[ndarray, "c c"],
) -> Float64[ndarray, " n"]:
    """Return p_y / (sum_k T[y, k] p_k + 1e-12): 1 for T = I, c p_y for T = 1/c."""
    own = probs[np.arange(len(labels)), labels]
    return np.asarray(own / ((transition[labels] * probs).sum(axis=1) + TINY))


def mean_probs(block: ndarray, classes: int) -> Float64[ndarray, "b c"]:
    """Return the probabilities of stored rows, of several checkpoints their weighted mean.

    A store scales each checkpoint's vector by the root of its weight; as probabilities sum to 1,
    the sum of a part is that root.

    Raises:
        ValueError: the numbers are no probabilities of so many classes.
    """
    if block.shape[1] % classes:
        raise ValueError(
            f"vectors of {block.shape[1]} numbers are no probabilities of {classes} classes"
        )
    parts = block.astype(np.float64).reshape(len(block), -1, classes)
    found = (parts * parts.sum(axis=2, keepdims=True)).sum(axis=1)
    total = found.sum(axis=1, keepdims=True)
    if (parts < 0).any() or (np.abs(total - 1) > OFF).any():
        raise ValueError(
            f"the vectors are no probabilities of {classes} classes: they do not sum to 1; "
            "store them with `curate score --store probs` and name them by --vectors probs"
        )
    return np.asarray(found / total)


def _one_block(vectors: Vectors) -> int:
    """Return how many classes the vectors have, if they are of one checkpoint."""
    first = next(iter(vectors.blocks()))[:1].astype(np.float64)
    if abs(float(first.sum()) - 1) > OFF:
        raise ValueError(
            "the vectors are no probabilities of one checkpoint; say how many classes there are by "
            "classes=[...]"
        )
    return vectors.dimension
