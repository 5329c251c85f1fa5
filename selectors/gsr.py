"""Weights under which a last layer serves the worst group best: group-robust reweighting.

Shapes: n rows, t target rows, g groups, d features.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from curate.selectors.inner_products import target_mean
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.target_groups import target_texts
from curate.selectors.vectors import Vectors, VectorTable, finite_rows, part_of
from curate.selectors.weighing import Weighing
from curate.selectors.weighted_head import Head, fit_head

log = logging.getLogger("curate.selectors")

LARGEST = 8192  # coordinates of a head, whose Hessian then takes 512 MiB


@dataclass(frozen=True)
class Gsr(Weighing):
    """Weights of rows found by group-weighted influence on a target with known groups.

    Qiao et al. 2025 ("Group-robust sample reweighting for subpopulation shifts via influence
    functions", ICLR) on frozen features, the vectors (embeddings). Begun at equal weights, at most
    `steps` times: fit a logistic head on sum w_i loss_i + `decay` |theta|² (sum w = 1); take the
    target's loss in each group; q_g <- q_g exp(loss_g), scaled to sum 1; score_i = (1/n) sum_g q_g
    times how fast L_g falls as w_i rises (exact Hessian plus `damp`); scores longer than `clip`
    are scaled to it; w <- w + `rate` score, scaled to sum 1. The weights with the best accuracy of
    the worst group are written, the earliest of equals. The temperature of the authors' code
    cancels in the scaling of q and is left out. `pgd` keeps weights at 0 or above, as a manifest
    must; without it they may be below in the search and are written as 0.

    `label` is the column of classes in the table and (`target_label`, if it is called otherwise) in
    the target, `group` the target's column of groups. Influence and choice use the one target
    set, where the authors split it in two.

    Time for each step n (c d)² and (c d)³ for c classes of d features; memory 16 n·d bytes, the
    features and once more their weighted copy, and some 24 (c d)².
    """

    label: str
    group: str
    target_label: str | None = None
    steps: int = 100
    rate: float | int = 1.0
    decay: float | int = 0.1
    damp: float | int = 0.0
    clip: float | int = 1.0
    pgd: bool = True
    uses_vectors: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be a whole number from 1, not {self.steps!r}")
        for name in ("rate", "decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 < value < np.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if isinstance(self.damp, bool) or not 0 <= self.damp < np.inf:
            raise ValueError(f"damp must be a number of at least 0, not {self.damp!r}")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {self.label}

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        target_mean(table.target, table.vectors.dimension)  # says what is wrong with a target
        assert table.target is not None
        rows = candidates(table, by_group=self.label)
        places, labels = rows.places, rows.group.astype(np.int64)
        goal = self._goal(table, rows.groups)
        features = _features(part_of(table.vectors, places))
        size = len(rows.groups) * features.shape[1]
        if size > LARGEST:
            raise ValueError(
                f"a head of {len(rows.groups)} classes and {features.shape[1]} features has "
                f"{size} coordinates, more than the {LARGEST} whose exact Hessian is computed; "
                "take vectors of fewer dimensions"
            )
        found = self.search(features, labels, goal)
        values = np.full(table.rows, np.nan)
        values[places] = np.maximum(found.weights, 0) * len(places)
        params: dict[str, object] = {
            "best_step": found.step,
            "worst_group_accuracy": {"equal_weights": found.first, "best": found.accuracy},
        }
        return self.weighed(table, values, budget, rng, params)

    def _goal(self, table: VectorTable, classes: tuple[str, ...]) -> "Goal":
        """Return the target's rows that have a vector, labels numbered as in the corpus."""
        assert table.target is not None
        usable = np.flatnonzero(finite_rows(table.target))
        name = self.target_label or self.label
        labels = target_texts(table, name)[usable]
        number = {value: i for i, value in enumerate(classes)}
        if strange := sorted(set(labels.tolist()) - number.keys()):
            raise ValueError(
                f"the target's {name!r} holds {strange[0]!r}, which no row of the corpus has in "
                f"{self.label!r}"
            )
        groups = target_texts(table, self.group)[usable]
        return Goal(
            _features(part_of(table.target, usable)),
            np.array([number[value] for value in labels.tolist()], dtype=np.int64),
            np.unique(groups, return_inverse=True)[1].astype(np.int64),
        )

    def search(
        self, features: Float64[ndarray, "n d"], labels: Int64[ndarray, " n"], goal: "Goal"
    ) -> "Found":
        """Return the weights of the best step."""
        n, classes = len(labels), 1 + int(max(labels.max(), goal.labels.max()))
        weights = np.full(n, 1 / n)
        groups = np.full(goal.groups, 1 / goal.groups)
        head: Head | None = None
        best: Found | None = None
        for step in range(self.steps):
            start = None if head is None else head.theta
            head = fit_head(features, labels, weights, classes, float(self.decay), start)
            losses, accuracies = goal.of(head)
            worst = float(accuracies.min())
            if best is None or worst > best.accuracy:
                first = worst if best is None else best.first
                best = Found(weights.copy(), step, worst, first)
            groups = groups * np.exp(losses - losses.max())
            groups /= groups.sum()
            pull = goal.gradient(head, groups)
            score = head.helpfulness(features, labels, weights, pull, float(self.damp)) / n
            score *= min(1.0, self.clip / (float(np.linalg.norm(score)) + 1e-300))
            weights = weights + self.rate * score
            if self.pgd:
                weights = np.maximum(weights, 0)
            total = float(weights.sum())
            if not total > 0:
                log.warning("step %d leaves no weight; the search ends there", step)
                break
            weights /= total
        assert best is not None, "there was a step"
        return best


@dataclass(frozen=True)
class Found:
    """Weights, the step they were found at, and the worst group's accuracy there and at first."""

    weights: Float64[ndarray, " n"]
    step: int
    accuracy: float
    first: float


@dataclass(frozen=True)
class Goal:
    """The target's rows: what the head should do well in the worst of their groups."""

    features: Float64[ndarray, "t d"]
    labels: Int64[ndarray, " t"]
    group: Int64[ndarray, " t"]

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    def of(self, head: Head) -> tuple[Float64[ndarray, " g"], Float64[ndarray, " g"]]:
        """Return the mean loss and the accuracy of each group."""
        logs = head.log_probabilities(self.features)
        losses = -logs[np.arange(len(self.labels)), self.labels]
        right = (logs.argmax(axis=1) == self.labels).astype(np.float64)
        sizes = np.maximum(np.bincount(self.group, minlength=self.groups), 1)
        per_group = [np.bincount(self.group, x, self.groups) / sizes for x in (losses, right)]
        return per_group[0], per_group[1]

    def gradient(self, head: Head, weights: Float64[ndarray, " g"]) -> Float64[ndarray, "c d"]:
        """Return the gradient of the weighted sum of the groups' mean losses."""
        sizes = np.maximum(np.bincount(self.group, minlength=self.groups), 1)
        per_row = (weights / sizes)[self.group]
        errors = head.errors(self.features, self.labels) * per_row[:, None]
        return np.asarray(errors.T @ self.features)


def _features(vectors: Vectors) -> Float64[ndarray, "n d"]:
    """Return the vectors with a constant 1 behind, which carries the bias."""
    found = np.ones((vectors.rows, vectors.dimension + 1))
    at = 0
    for block in vectors.blocks():
        found[at : at + len(block), :-1] = block
        at += len(block)
    return found
