"""Weights p_target(x) / p_corpus(x) from a classifier that tells the two apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray

from curate.selectors.clustered import some_places
from curate.selectors.inner_products import target_mean
from curate.selectors.picks import candidates
from curate.selectors.protocol import Budget, Selection
from curate.selectors.vectors import VectorTable, finite_rows, part_of
from curate.selectors.weighing import Weighing

Ratio = Callable[["Float32[ndarray, 'b d']"], "Float64[ndarray, ' b']"]

SURE = 1e-9  # no classifier is surer than this of anything; weights stay below 1e9


@dataclass(frozen=True)
class DensityRatio(Weighing):
    """Weights w(x) = P(target | x) / P(corpus | x) · n_corpus / n_target.

    With a classifier that knows these probabilities this is the ratio of the densities (Bickel,
    Brückner and Scheffer 2007, "Discriminative learning for differing training and test
    distributions", ICML; Sugiyama, Suzuki and Kanamori 2012, chapter 4). The classifier is a
    logistic regression on the vectors, standardised, with penalty |theta|² / (2 C) (scikit-learn);
    it is fit on up to `sample` rows of the corpus, drawn by the seed, and as many of the target,
    and all rows are then weighed block by block. `calibrate`: a logistic function of its score is
    fit on folds that it was not trained on (Platt 1999), so that a classifier that is too sure of
    rows it saw does not make weights too large; the exact ratio of two normal densities of one
    covariance is logistic, and then nothing is lost.

    The mean weight (1 where the ratio is right) is recorded, and how often held-out rows of the two
    sets are told apart in the right order (`auc`; 0.5: the sets do not differ to this classifier).
    Time n·d and the fit; memory the sample and some 40 bytes a row.
    """

    C: float | int = 1.0
    calibrate: bool = True
    sample: int = 50_000
    uses_vectors: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        is_number = isinstance(self.C, int | float) and not isinstance(self.C, bool)
        if not is_number or not 0 < self.C < np.inf:
            raise ValueError(f"C must be a number above 0, not {self.C!r}")
        if isinstance(self.sample, bool) or self.sample < 10:
            raise ValueError(f"sample must be a whole number from 10, not {self.sample!r}")

    def select(self, table: VectorTable, budget: Budget, rng: np.random.Generator) -> Selection:
        target_mean(table.target, table.vectors.dimension)  # says what is wrong with a target
        assert table.target is not None
        seed = int(rng.bit_generator.random_raw()) >> 1
        places = candidates(table).places
        usable = np.flatnonzero(finite_rows(table.target))
        vectors = part_of(table.vectors, places)
        ratio, auc = fitted_ratio(
            vectors.take(some_places(len(places), self.sample, seed)),
            table.target.take(usable[some_places(len(usable), self.sample, seed)]),
            self.C,
            self.calibrate,
            seed,
        )
        values = np.full(table.rows, np.nan)
        values[places] = np.concatenate([ratio(block) for block in vectors.blocks()])
        params: dict[str, object] = {"mean_ratio": float(np.nanmean(values)), "auc": auc}
        return self.weighed(table, values, budget, rng, params)


def fitted_ratio(
    source: Float32[ndarray, "n d"],
    target: Float32[ndarray, "t d"],
    C: float | int,
    calibrate: bool,
    seed: int,
) -> tuple[Ratio, float]:
    """Return the function from vectors to density ratios, and the held-out AUC.

    Raises:
        ValueError: fewer than 5 rows of a set, too few to hold some out.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(source), len(target)) < 5:
        raise ValueError(
            f"{len(source)} rows of the corpus and {len(target)} of the target with vectors; a "
            "classifier that tells them apart needs 5 of each"
        )
    points = np.vstack([source, target]).astype(np.float64)
    is_target = np.repeat([0, 1], [len(source), len(target)])
    mean, spread = points.mean(axis=0), points.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    points = (points - mean) / spread
    folds = StratifiedKFold(5, shuffle=True, random_state=seed % (1 << 31))
    plain = LogisticRegression(C=C, max_iter=1000)
    held_out = cross_val_predict(plain, points, is_target, cv=folds, method="decision_function")
    model = CalibratedClassifierCV(plain, cv=folds, ensemble=False) if calibrate else plain
    model.fit(points, is_target)
    odds = len(source) / len(target)

    def ratio(block: Float32[ndarray, "b d"]) -> Float64[ndarray, " b"]:
        p = model.predict_proba((block.astype(np.float64) - mean) / spread)[:, 1]
        p = np.clip(p, SURE, 1 - SURE)
        return np.asarray(p / (1 - p) * odds)

    return ratio, float(roc_auc_score(is_target, held_out))
