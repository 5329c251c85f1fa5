"""GSNR: how steadily the row's gradient points one way over the checkpoints of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal

MOST = float(2**23)
"""Noise of less than a 2^-23th of the signal cannot be told from float32's rounding."""


@dataclass(frozen=True)
class GSNR:
    """‖ḡ‖² / ((1/K) Σ_k ‖g_k − ḡ‖²) over the K checkpoints of a run, at most 2²³.

    g_k = ∇_θ ℓ(θ_k; x, y) and ḡ = (1/K) Σ_k g_k. Squared mean over variance is the gradient
    signal-to-noise ratio of Liu et al. 2020 (arXiv 2001.07384, definition 1), who take it of a
    parameter over the data; here it is of a row over training, all parameters together. (Yuan et
    al. 2026, arXiv 2601.13697, select data by a G-SNR too, of norms over an ensemble: a drop from
    early to late over a late variance. That is another quantity.)

    A row without a gradient at any checkpoint has 0. With g_k independent of k it is unbounded,
    and cut at 2²³. `params` limits θ as in GraNd.

    Gradients of more than 2¹⁷ numbers are compared by sketches of `sketch` numbers, always the
    same map: each of the two squares is estimated without bias, with a relative standard deviation
    of at most √(2 / sketch), and so the score to twice that, 4.4 % with 4096, to first order.
    `sketch=0` keeps all gradients as they are: P numbers for each row at hand.

    Raises:
        ValueError: `sketch` is no number of dimensions.
    """

    params: str = ""
    sketch: int = 4096

    direction: ClassVar[Direction] = Direction(
        high_means="its gradient keeps its way over training: a steady pull, right or wrong",
        keep="high",
        source="the ratio of Liu et al. 2020, of a row over checkpoints; no source keeps by it",
        valid="two or more checkpoints of a run; wrong labels pull steadily too",
        asks=("two_checkpoints",),
    )

    def __post_init__(self) -> None:
        if isinstance(self.sketch, bool) or not isinstance(self.sketch, int) or self.sketch < 0:
            raise ValueError(f"gsnr: sketch is a number of dimensions, not {self.sketch!r}")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self._signal, self._noise})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "j b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        signal, noise = signals[self._signal][0], signals[self._noise][0]
        ratio = signal / torch.maximum(noise, signal / MOST)
        return ratio.masked_fill(signal == 0, 0.0)

    @property
    def _signal(self) -> Signal:
        return Signal("grad_signal", self.params, projection=self.sketch)

    @property
    def _noise(self) -> Signal:
        return Signal("grad_noise", self.params, projection=self.sketch)
