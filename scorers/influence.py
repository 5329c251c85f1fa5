"""Influence of a row on a target: how much upweighting it lowers the target's loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.curvature import MOST_ROWS
from curate.scorers.protocol import Direction, Signal
from curate.scorers.self_influence import curvature_text, refuse_unused

GROUPS = "max", "mean"


@dataclass(frozen=True)
class Influence:
    """mean_m Σ_k η_k f_mkᵀ (G_k + λI)⁻¹ g_k, g the gradient of the row's loss, f_m that of the mean
    loss of target group m.

    Koh and Liang 2017 (arXiv 1703.04730), equation 2, with G the Fisher information in place of the
    Hessian (Grosse et al. 2023, arXiv 2308.03296) and the sign turned, so that a positive value
    helps: to first order the group's loss falls by it per unit of weight that is added to the row
    in the mean loss trained on, where a row among n has 1/n. `curvature` is `ekfac`, `kfac`,
    `diagonal`, `adam` or `adam_root` (a diagonal that Adam's moments give), or `none`: TracIn.
    Checkpoints are weighted by learning rates η that sum to 1.
    Groups count alike, however many rows they have; `groups="max"` takes the one that the row helps
    most. `damping`, `rows`, `labels` as in `CurvatureSettings`;
    `params` limits θ as in GraNd.

    Raises:
        ValueError: a setting that is none of these, or out of range.
    """

    params: str = ""
    curvature: str = "ekfac"
    damping: float | int | None = None
    rows: int = MOST_ROWS
    labels: str = "model"
    groups: str = "mean"

    def __post_init__(self) -> None:
        refuse_unused(self.curvature, self.damping, self.rows, self.labels)
        if self.groups not in GROUPS:
            raise ValueError(
                f"influence: groups is one of {', '.join(GROUPS)}, not {self.groups!r}"
            )
        _ = self.needs

    @property
    def direction(self) -> Direction:
        best = self.groups == "max"
        return Direction(
            high_means="helps the target: more weight on this row lowers the "
            + ("loss of one group of the target" if best else "target's loss"),
            keep="high",
            source="Grosse et al. 2023 list the most positive",
            valid="a trained model; a clean target drawn as the model will be used",
            asks=("right_labels_by_class",) if best else (),
        )

    @property
    def needs(self) -> frozenset[Signal]:
        curvature = curvature_text(self.curvature, self.damping, self.rows, self.labels)
        return frozenset({Signal("target_dot", self.params, curvature=curvature)})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b m"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        (signal,) = self.needs
        of_group = torch.einsum("k,kbm->bm", weights, signals[signal])
        return of_group.amax(1) if self.groups == "max" else of_group.mean(1)
