"""Self-influence: TracIn's checkpoint form, or with a curvature between the two gradients."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from curate.scorers.curvature import MOST_ROWS, NONE, CurvatureSettings
from curate.scorers.protocol import Direction, Signal

_TRACIN = Direction(
    high_means="hard, mislabelled or an outlier",
    keep="low",
    source="Thakkar et al. 2023 (PRESENCE-Sequential) keep low, Anand et al. 2023 all but the "
    "lowest 30 %; high finds wrong labels",
    valid="checkpoints spread over a run",
    asks=("spread_checkpoints",),
)
_CURVED = replace(
    _TRACIN,
    source="none; Thakkar et al. 2023 keep low without a curvature, high finds wrong labels",
    valid="a trained model",
    asks=(),
)


@dataclass(frozen=True)
class SelfInfluence:
    """Σ_k η_k g_kᵀ (G_k + λI)⁻¹ g_k over the checkpoints of a run, g the row's loss gradient.

    With `curvature="none"`, the default, Σ_k η_k ‖∇_θ ℓ(θ_k; x, y)‖²: Pruthi et al. 2020 (arXiv
    2002.08484), TracInCP with z' = z. Learning rates η sum to 1; normalising them changes the scale
    alone, so with one checkpoint this is GraNd². Otherwise G is the Fisher information of the
    loss, `diagonal`, `kfac` or `ekfac` (Grosse et al. 2023, arXiv 2308.03296), or `adam` or
    `adam_root`, a diagonal that Adam's moments give (`curvature_moments.py`); `damping`, `rows` and
    `labels` as in `CurvatureSettings`. `params` limits θ as in GraNd; `first_encoder_layer` is
    the first repeated block (Thakkar et al. 2023).

    Raises:
        ValueError: a setting out of range.
    """

    params: str = ""
    curvature: str = NONE
    damping: float | int | None = None
    rows: int = MOST_ROWS
    labels: str = "model"

    def __post_init__(self) -> None:
        refuse_unused(self.curvature, self.damping, self.rows, self.labels)
        _ = self.needs

    @property
    def direction(self) -> Direction:
        return _TRACIN if self.curvature == NONE else _CURVED

    @property
    def needs(self) -> frozenset[Signal]:
        curvature = curvature_text(self.curvature, self.damping, self.rows, self.labels)
        return frozenset({Signal("grad_sq_norm", self.params, curvature=curvature)})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        (signal,) = self.needs
        return weights @ signals[signal]


def curvature_text(kind: str, damping: float | int | None, rows: int, labels: str) -> str:
    """Return what a signal says of a scorer's curvature, "" for none.

    Raises:
        ValueError: a setting out of range.
    """
    return "" if kind == NONE else CurvatureSettings(kind, damping, rows, labels).text


def refuse_unused(kind: str, damping: float | int | None, rows: int, labels: str) -> None:
    """Raise ValueError where there is a setting of a curvature, but none is asked for."""
    if kind == NONE and (damping is not None or rows != MOST_ROWS or labels != "model"):
        raise ValueError(
            "damping, rows and labels belong to a curvature: add curvature=ekfac, kfac, diagonal "
            "or, without rows and labels, adam"
        )
