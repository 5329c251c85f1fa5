"""When GIO stops: the criteria as they are meant, and as the published code carries them out.

After each step the search shows its divergence before and after the nearest row. The answer is
whether that row is accepted, and whether the search goes on, ends, or begins again with the whole
pool (a reset).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

CRITERIA = (
    "increase",
    "sequential_increase_tolerance",
    "max_resets",
    "min_difference",
    "min_kl",
    "data_size",
    "never",
)


@dataclass(frozen=True)
class Verdict:
    """What becomes of the row that was shown, and of the search.

    `is_first_again`: the next descent is as long as the first one.
    """

    is_accepted: bool
    then: Literal["go on", "stop", "reset"] = "go on"
    reason: str = ""
    is_first_again: bool = False


@dataclass(frozen=True)
class Limits:
    """A criterion and its numbers, named as in the published code.

    `max_iter` bounds the accepted rows whatever the criterion (None: no bound); `max_data_size` is
    a share of the pool. `never` leaves the end to `max_iter`, a budget or the end of the pool.
    """

    criterion: str = "increase"
    max_iter: int | None = 100
    min_difference: float = 0.0
    min_kl: float = 0.0
    max_data_size: float = 1.0
    max_sequential_increases: int = 3
    resets_allowed: bool = False
    max_resets: int = 2

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise ValueError(f"unknown stop {self.criterion!r}; choose from: {known}")
        for name in ("max_iter", "max_sequential_increases", "max_resets"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value!r}")
        if not 0 < self.max_data_size <= 1:
            raise ValueError(f"max_data_size is a share in (0, 1], not {self.max_data_size!r}")


class Stop(Protocol):
    """Judges one search, step by step."""

    def judge(self, kl: float, before: float) -> Verdict:
        """Return what becomes of the row that takes the divergence from `before` to `kl`."""
        ...


class MeantStop:
    """The criteria as their names say; every one ends a search.

    - increase: the row would raise the divergence; it is not added.
    - sequential_increase_tolerance: rows that raise it are added, up to
      `max_sequential_increases` in a row; the next such row is not, and ends the search.
    - max_resets: as increase, after `max_resets` resets that rows like this brought about.
    - min_difference: the row lowers it by less than `min_difference`; it is not added.
    - min_kl: the row brings it below `min_kl`; it is added.
    - data_size: the row is the last of int(`max_data_size` * pool); it is added.

    `resets_allowed` lets `increase`, `sequential_increase_tolerance` and `min_difference` begin
    again with the whole pool, up to `max_resets` times, before they end the search.
    """

    def __init__(self, limits: Limits, pool_rows: int) -> None:
        self._limits = limits
        self._most = max(1, int(limits.max_data_size * pool_rows))
        self._accepted = self._resets = self._increases = 0

    def judge(self, kl: float, before: float) -> Verdict:
        limits = self._limits
        if limits.max_iter is not None and self._accepted >= limits.max_iter:
            return Verdict(False, "stop", "max_iter")
        rises = kl > before
        is_bad = {
            "increase": rises,
            "max_resets": rises,
            "min_difference": before - kl < limits.min_difference,
            "sequential_increase_tolerance": rises
            and self._increases == limits.max_sequential_increases,
        }.get(limits.criterion, False)
        if is_bad:
            resets = limits.resets_allowed or limits.criterion == "max_resets"
            self._increases = 0
            if resets and self._resets < limits.max_resets:
                self._resets += 1
                return Verdict(False, "reset", limits.criterion, is_first_again=True)
            return Verdict(False, "stop", limits.criterion)
        self._accepted += 1
        self._increases = self._increases + 1 if rises else 0
        is_reached = {
            "min_kl": kl < limits.min_kl,
            "data_size": self._accepted >= self._most,
        }.get(limits.criterion, False)
        if is_reached:
            return Verdict(True, "stop", limits.criterion)
        if self._accepted == limits.max_iter:
            return Verdict(True, "stop", "max_iter")
        return Verdict(True)


class PublishedStop:
    """The criteria as grad-info-opt 0.1.2 carries them out, faults included.

    `max_iter` lets max_iter + 1 rows in, `data_size` one more than the share (fewer resets), the
    row that reaches `min_kl` is not added; `sequential_increase_tolerance` ends a search only for
    `max_sequential_increases` = 0 and `max_resets` only for `max_resets` = 0, because what they
    count is counted after they have fired. With `resets_allowed` any criterion that fires begins
    again, up to `max_resets` times.
    """

    def __init__(self, limits: Limits, pool_rows: int) -> None:
        self._limits = limits
        self._most = int(limits.max_data_size * pool_rows)
        self._accepted = self._since = self._resets = self._increases = 0
        self._just_reset = False

    def judge(self, kl: float, before: float) -> Verdict:
        limits = self._limits
        if limits.max_iter is not None and self._accepted > limits.max_iter:
            return Verdict(False, "stop", "max_iter")
        rises = kl > before
        fires = {
            "increase": rises,
            "max_resets": rises and self._resets == limits.max_resets,
            "min_difference": before - kl < limits.min_difference,
            "sequential_increase_tolerance": rises
            and self._increases == limits.max_sequential_increases,
            "min_kl": kl < limits.min_kl,
            "data_size": self._since > self._most,
        }.get(limits.criterion, False)
        if not fires:
            self._just_reset, self._increases = False, 0
            self._accepted, self._since = self._accepted + 1, self._since + 1
            # A reset at the very first step takes the count below 0, so that it passes 0 again.
            return Verdict(True, is_first_again=self._since == 0)
        self._increases += self._just_reset
        self._just_reset = True
        if limits.resets_allowed and self._resets < limits.max_resets:
            self._resets += 1
            self._since -= 1
            return Verdict(False, "reset", limits.criterion, is_first_again=True)
        return Verdict(False, "stop", limits.criterion)
