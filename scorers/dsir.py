"""DSIR: the log importance weight of a row's n-grams, target against corpus."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curate.scorers.protocol import Direction, Signal


@dataclass(frozen=True)
class DSIR:
    """Σ over the row's n-grams of log(p_t + 1e-8) − log(p_r + 1e-8), in nats.

    Xie et al. 2023 (arXiv 2302.03169), section 4. p_t and p_r are the shares of the target's and of
    the corpus's 1- to `ngrams`-grams that fall into the n-gram's bucket, of `buckets` (see
    `scorers/ngrams.py`). The sum is not divided by the row's length, as it is the logarithm of a
    ratio of probabilities; drawing with Gumbel noise on top (`curate select --method gumbel`) is
    their resampling without replacement. No model and no checkpoint is needed.

    Their package scores rows with bigrams and 10 000 buckets whatever it was set to, and fits p_r
    on the corpus's first 10⁹ n-grams; here the settings hold in both places, and all rows count.

    Raises:
        ValueError: `ngrams` or `buckets` is not a positive number.
    """

    ngrams: int = 2
    buckets: int = 10_000

    direction: ClassVar[Direction] = Direction(
        high_means="its words are the target's rather than the corpus's",
        keep="high",
        source="Xie et al. 2023 draw rows by exp of it",
        valid="a target of the texts one wants; long rows lie farther from 0 on either side",
    )

    def __post_init__(self) -> None:
        for name in ("ngrams", "buckets"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"dsir: {name} must be at least 1, not {value!r}")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self._weight})

    def reduce(
        self, signals: Mapping[Signal, Float[Tensor, "k b"]], weights: Float[Tensor, " k"]
    ) -> Float[Tensor, " b"]:
        return signals[self._weight][0]

    @property
    def _weight(self) -> Signal:
        return Signal("text_weight", f"ngrams={self.ngrams} buckets={self.buckets}")
