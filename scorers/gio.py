"""GIO as a score: the step at which a search towards the target accepted the row's cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal

_STEP = Signal("accepted_step")


@dataclass(frozen=True)
class GIO:
    """The step, from 0, at which GIO accepts the row's cluster; null where it never does.

    Everaert and Potts 2024. The search is that of `curate select --method gio` without a budget
    (`selectors/gio.py`, which says what the fields mean), run once over all rows when everything
    else is scored. `vectors` names what rows are compared by: a store of this run, `embedding`
    (the default, stored along with it), `sketch` or `probs`, or `column:NAME` or `encoder:FOLDER`;
    `target_vectors` the target's, by default likewise.
    """

    vectors: str = "embedding"
    target_vectors: str | None = None
    seed: int = 0
    variant: str = "official"
    k: int = 5
    neighbor: int | None = None
    discard_nearest_for_xy: bool = False
    clusters: int = 1500
    target_clusters: int = 1500
    sample: int = 128
    base: str | None = None
    random_init_pct: float | int = 0.0
    uniform_start_size: int = 20
    uniform_low: float | int = -1.0
    uniform_high: float | int = 1.0
    normalize: bool = True
    v_init: str | None = None
    grad_desc_iter: int = 50
    lr: float | int = 0.01
    scale_factor: float | int | None = None
    random_restart_prob: float | int = 0.0
    stop: str | None = None
    max_iter: int | None = None
    min_difference: float | int = 0.0
    min_kl: float | int = 0.0
    max_data_size: float | int = 1.0
    max_sequential_increases: int = 3
    resets_allowed: bool = False
    max_resets: int = 2

    direction: ClassVar[Direction] = Direction(
        high_means="accepted late; rows that the target does not ask for have none",
        keep="low",
        source="Everaert and Potts 2024 keep all rows that are accepted",
        valid="a target of the rows one wants, and vectors in which near rows are alike",
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({_STEP})

    @property
    def settings(self) -> dict[str, object]:
        """The fields that are settings of the search."""
        apart = ("vectors", "target_vectors", "seed")
        return {name: value for name, value in vars(self).items() if name not in apart}

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[_STEP][0]
