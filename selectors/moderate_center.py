"""Rows at a middling distance from the centre of their class: the Moderate coreset.

Shapes: n rows, m rows of a class, d coordinates.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.selectors.added_column import AddedColumn
from curate.selectors.choose import Choice
from curate.selectors.inner_products import mean_of
from curate.selectors.moderate import Moderate
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import Vectors, VectorTable, matrix, part_of

COLUMN = "distance (computed)"


@dataclass(frozen=True)
class ModerateCenter(Choice):
    """The rows whose distance from their class's centre is closest to the median distance.

    Xia et al. 2023 ("Moderate coreset", ICLR, section 3): Euclidean distances between vectors from
    before a model's last layer. `label` is the column of classes. `center="mean"` is the paper's
    centre, `"median"` (of each coordinate) that of their code. What is close is `moderate`'s:
    `closest="rank"`, as their code, or `"value"`. All classes stand in one order, so that classes
    may end up unequal; `by_group` gives each its own.

    Time three passes over the vectors; memory 30 bytes a row, with `center="median"` twice the
    vectors of the largest class.
    """

    label: str
    center: Literal["mean", "median"] = "mean"
    closest: Literal["rank", "value"] = "rank"
    uses_vectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center not in ("mean", "median"):
            raise ValueError(f"center must be mean or median, not {self.center!r}")
        self._middle()  # says what else is wrong

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {self.label}

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        away = AddedColumn(table, COLUMN, self.distances(table))
        return self._middle().select(away, budget, rng)

    def distances(self, table: VectorTable) -> Float64[ndarray, " n"]:
        """Return how far each row of the table is from its class's centre; NaN without a vector."""
        rows = candidates(table, by_group=self.label)
        found = np.full(table.rows, np.nan)
        for number in range(len(rows.groups)):
            places = rows.places[rows.members(number)]
            vectors = part_of(table.vectors, places)
            center = mean_of(vectors) if self.center == "mean" else _median(vectors)
            found[places] = np.concatenate(
                [np.linalg.norm(block - center, axis=1) for block in vectors.blocks()]
            )
        return found

    def _middle(self) -> Moderate:
        return Moderate(
            by=COLUMN,
            closest=self.closest,
            by_group=self.by_group,
            group_shares=self.group_shares,
            min_shares=self.min_shares,
            include_errors=self.include_errors,
            ranked=self.ranked,
            carry=self.carry,
        )


def _median(vectors: Vectors) -> Float64[ndarray, " d"]:
    return np.asarray(np.median(matrix(vectors), axis=0, overwrite_input=True), dtype=np.float64)
