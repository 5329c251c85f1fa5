"""The curvature that may stand between two gradients: how it is asked for, and what has it.

Shapes: B rows, M directions.

G stands for the Fisher information of the rows, E[g g^T] with g the gradient of a row's loss: for
a loss that is a negative log likelihood, and labels drawn from the model, the Gauss-Newton matrix.
It is never made; `curvature_diagonal.py`, `curvature_moments.py` and `curvature_kronecker.py` say
what is in its place.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.parts import Gradient

NONE = "none"
KINDS = "diagonal", "adam", "adam_root", "kfac", "ekfac"
FROM_MOMENTS = frozenset({"adam", "adam_root"})
"""Kinds that checkpoints' Adam moments give, not the rows."""
LABELS = "model", "data"
MOST_ROWS = 100_000
"""Rows that a curvature is estimated from by default (Grosse et al. 2023 take as many)."""
HEURISTIC = 0.1
"""Damping as a share of the mean eigenvalue where none is given (Grosse et al. 2023)."""


class CurvatureRefused(ValueError):
    """What is asked for cannot be had of this model, whatever the rows."""


Asked = tuple[str, str]
"""Which curvature a signal wants: its `params` and its `curvature`."""


@dataclass(frozen=True)
class CurvatureSettings:
    """`kind` of the approximation of G, the damping λ, and how it is estimated.

    `damping` None is 0.1 times the mean eigenvalue of each layer, for `adam_root` the optimizer's
    ε. `rows` of the corpus, evenly spaced, are what G is estimated from. `labels` are drawn from
    the `model` (the Fisher information) or those of the `data` (the empirical Fisher). Kinds from
    Adam's moments have neither.

    Raises:
        ValueError: a setting out of range.
    """

    kind: str
    damping: float | int | None = None
    rows: int = MOST_ROWS
    labels: str = "model"

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("labels", LABELS)):
            if getattr(self, name) not in choices:
                what = "curvature" if name == "kind" else name
                known = ", ".join((NONE, *choices) if name == "kind" else choices)
                raise ValueError(f"{what} is one of {known}, not {getattr(self, name)!r}")
        numbers = (int, float)
        if self.damping is not None and (
            isinstance(self.damping, bool)
            or not isinstance(self.damping, numbers)
            or not 0 < self.damping < float("inf")
        ):
            raise ValueError(f"damping is a positive number or None, not {self.damping!r}")
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows is a whole number of at least 1, not {self.rows!r}")
        if self.from_moments and (self.rows != MOST_ROWS or self.labels != "model"):
            raise ValueError(
                f"rows and labels have no meaning for curvature={self.kind}, which is read off "
                "Adam's moments: leave them out"
            )

    @property
    def from_moments(self) -> bool:
        """Whether checkpoints must have Adam's moments beside them."""
        return self.kind in FROM_MOMENTS

    @property
    def text(self) -> str:
        """What a `Signal` carries; `of` reads it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str) -> "CurvatureSettings":
        return cls(**json.loads(text))

    @property
    def undamped(self) -> "CurvatureSettings":
        """What the factors depend on: those that differ in damping alone share them."""
        return replace(self, damping=None)


@runtime_checkable
class Curvature(Protocol):
    """(G + λI)^-1 at one checkpoint, as it is applied."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters whose gradient is to be read; a layer's bias is read off its weight's."""
        ...

    def __call__(self, gradient: Gradient) -> Float[Tensor, " b"]:
        """Return this parameter's share of g^T (G + λI)^-1 g of each row."""
        ...

    def solve(self, directions: Mapping[str, Float[Tensor, "m ..."]]) -> dict[str, Tensor]:
        """Return (G + λI)^-1 v by parameter; what the curvature does not cover is absent."""
        ...


def inverse(
    eigenvalues: Float[Tensor, "..."], damping: float | int | None, mean: Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """Return 1 / (Λ + λ), λ a number or 0.1 times the `mean` of all eigenvalues of the layer.

    0 where nothing is left to divide by: there no row had a gradient.
    """
    total = eigenvalues + (HEURISTIC * mean if damping is None else damping)
    return torch.where(total > 0, total, torch.inf).reciprocal()
