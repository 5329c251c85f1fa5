"""One number for a whole column of scores at each checkpoint, from moments that units hand in.

Shapes: N rows, K checkpoints.

A unit's moments stand in its part's receipt, so they come and go with its rows. They are merged in
the order of units, so that the result is the same whoever scored what.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from curate.pipeline.scoring.score_table import read_receipt
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.storage import Folder
from curate.scorers.protocol import Scorer

log = logging.getLogger("curate.score")

KEY = "moments"
"""Of a receipt: alias -> one list per checkpoint, the fields of `Moments` in order."""
BETA = 1.2
"""Added to the excess kurtosis: that of a uniform law is -1.2 (Hölzl et al. 2025)."""


@dataclass(frozen=True)
class Moments:
    """Count, mean, and sums of the second, third and fourth powers of deviations from the mean."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> "Moments":
        """Return those of the values that are numbers, in float64."""
        x = values[np.isfinite(values)].astype(np.float64)
        if not len(x):
            return cls()
        mean = float(x.mean())
        deviation = x - mean
        square = deviation * deviation
        return cls(
            len(x),
            mean,
            float(square.sum()),
            float((square * deviation).sum()),
            float((square * square).sum()),
        )

    def __add__(self, other: "Moments") -> "Moments":
        """Return those of both together (Pébay 2008, SAND2008-6212, equations 1.6 to 1.8)."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b = self.count, other.count
        n, d = a + b, other.mean - self.mean
        m3 = d**3 * a * b * (a - b) / n**2 + 3 * d * (a * other.m2 - b * self.m2) / n
        m4 = (
            d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d * d * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * d * (a * other.m3 - b * self.m3) / n
        )
        return Moments(
            n,
            self.mean + d * b / n,
            self.m2 + other.m2 + d * d * a * b / n,
            self.m3 + other.m3 + m3,
            self.m4 + other.m4 + m4,
        )

    @property
    def kurtosis(self) -> float | None:
        """Excess kurtosis as scipy has it by default (Fisher, biased); None where all are alike."""
        if not self.count:
            return None
        variance = self.m2 / self.count
        if variance <= (np.finfo(np.float64).resolution * self.mean) ** 2:
            return None
        return self.m4 / self.count / variance**2 - 3.0

    def gwa(self) -> dict[str, Any]:
        """Return mean / (excess kurtosis + 1.2), and what it is made of.

        Hölzl et al. 2025, the epoch's aggregate of γ. Of fewer values the kurtosis can be as low as
        -2, and the denominator -0.8: where it is not positive the quotient would turn the order
        round, and is None; so it is where all values are alike.
        """
        kurtosis = self.kurtosis
        denominator = None if kurtosis is None else kurtosis + BETA
        is_sound = denominator is not None and denominator > 0
        return {
            "rows": self.count,
            "mean": self.mean if self.count else None,
            "kurtosis": kurtosis,
            "denominator": denominator,
            "gwa": self.mean / denominator if is_sound and denominator else None,
        }


def aggregate_of(scorer: Scorer) -> str | None:
    """Return which aggregate a scorer asks for, None for none.

    Raises:
        ValueError: there is no aggregate of that name.
    """
    asked = getattr(scorer, "aggregate", None)
    if asked not in (None, "gwa"):
        raise ValueError(f"unknown aggregate {asked!r} of {type(scorer).__name__}; there is: gwa")
    return asked


def part_moments(columns: dict[str, Float[np.ndarray, "n k"]]) -> dict[str, list[list[float]]]:
    """Return what a receipt holds of these scores by checkpoint; {} where none is asked for."""
    return {
        alias: [list(vars(Moments.of(values[:, k])).values()) for k in range(values.shape[1])]
        for alias, values in columns.items()
    }


def aggregates(work: Work, units: Sequence[Unit]) -> dict[str, list[dict[str, Any]]]:
    """Return each scorer's aggregate at each checkpoint, by alias, and tell it."""
    wanted = [alias for alias, scorer in work.made.items() if aggregate_of(scorer) is not None]
    if not wanted:
        return {}
    folder = Folder(work.out)
    receipts = [read_receipt(folder, unit.number) for unit in units]
    found: dict[str, list[dict[str, Any]]] = {}
    for alias in wanted:
        parts = [receipt[KEY][alias] for receipt in receipts if alias in receipt.get(KEY, {})]
        found[alias] = [
            {"checkpoint": checkpoint.path.rsplit("/", 1)[-1], **_merged(p[k] for p in parts).gwa()}
            for k, checkpoint in enumerate(work.checkpoints)
        ]
        for line in found[alias]:
            _tell(alias, line)
    return found


def _merged(parts: Iterable[Sequence[float]]) -> Moments:
    total = Moments()
    for count, *rest in parts:
        total += Moments(int(count), *rest)
    return total


def _tell(alias: str, line: dict[str, Any]) -> None:
    if line["gwa"] is not None:
        log.info("%s at %s: GWA = %.4g", alias, line["checkpoint"], line["gwa"])
    else:
        log.warning(
            "%s at %s: no GWA over %d rows, mean / (kurtosis + 1.2) has %s below",
            alias,
            line["checkpoint"],
            line["rows"],
            "nothing" if line["denominator"] is None else f"{line['denominator']:.3g}",
        )
