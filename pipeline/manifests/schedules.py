"""Static schedules: a rule and a seed in the manifest that say what each epoch shows.

In `manifest.json`: `{"rule", "seed", "epochs", "params"}`. The loader expands it epoch by epoch;
no list of rows is stored. Rules that need the live loss are samplers (`loss_driven.py`).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, Protocol

from curate.pipeline.manifests.places import Places
from curate.pipeline.manifests.visits import Visits
from curate.selectors.settings import did_you_mean, made

SCHEDULES = {
    "rs2": "curate.pipeline.manifests.rs2:Rs2",
    "curriculum": "curate.pipeline.manifests.curriculum:Curriculum",
    "cooldown": "curate.pipeline.manifests.cooldown:Cooldown",
}

COUNTED = ("groups", "rows")
"""Parameters of rules that know groups: their names, and how many rows of the selection each has.
Nobody writes them by hand: they are counted, in the column that `by_group` names."""


class Schedule(Protocol):
    """A frozen dataclass: `seed` and `epochs` (None where the rule needs no end), and parameters.

    Its parameters are checked in `__post_init__`, and its `needs` are columns of the manifest.
    """

    seed: int
    epochs: int | None

    @property
    def needs(self) -> tuple[str, ...]: ...

    def visits(self, places: Places, epoch: int) -> Visits:
        """Return what the epoch shows; the same for all seeds of the loader."""
        ...


@dataclass(frozen=True)
class Settled:
    """What every schedule has. Not a schedule by itself."""

    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"a schedule's seed is a whole number from 0, not {self.seed!r}")
        is_count = isinstance(self.epochs, int) and not isinstance(self.epochs, bool)
        if self.epochs is not None and (not is_count or self.epochs < 1):
            raise ValueError(f"a schedule's epochs are a number from 1, not {self.epochs!r}")


def make_schedule(
    rule: str, seed: int = 0, epochs: int | None = None, params: dict[str, Any] | None = None
) -> Schedule:
    """Return the schedule of that name.

    Raises:
        ValueError: there is none, or a parameter is unknown or wrong.
    """
    cls = _class_of(rule)
    known = [f.name for f in fields(cls) if f.name not in ("seed", "epochs")]
    for key in params or {}:
        if key not in known:
            takes = [name for name in known if name not in COUNTED]
            takes += ["by_group"] if takes_groups(rule) else []
            raise ValueError(
                f"schedule {rule!r} has no parameter {key!r}; it takes: {', '.join(takes)}"
                + did_you_mean(key, takes)
            )
    settings = {"seed": seed, "epochs": epochs, **(params or {})}
    schedule: Schedule = made(f"schedule {rule!r}", cls, settings)
    return schedule


def takes_groups(rule: str) -> bool:
    """Return whether the rule knows groups: classes, languages, domains.

    Raises:
        ValueError: there is no such rule.
    """
    return {f.name for f in fields(_class_of(rule))} >= set(COUNTED)


def schedule_content(rule: str, schedule: Schedule) -> dict[str, Any]:
    """Return what `manifest.json` holds of it."""
    params = {k: v for k, v in _items(schedule) if k not in ("seed", "epochs") and v != []}
    return {"rule": rule, "seed": schedule.seed, "epochs": schedule.epochs, "params": params}


def read_schedule(content: dict[str, Any] | None, weight_kind: str) -> Schedule | None:
    """Return the schedule of a manifest, None if it has none.

    Raises:
        ValueError: it is unknown or wrong, or the weights contradict it.
    """
    if content is None:
        return None
    rule = str(content.get("rule"))
    refuse_rates(rule, weight_kind)
    params = {k: _listed(v) for k, v in (content.get("params") or {}).items()}
    return make_schedule(rule, content.get("seed", 0), content.get("epochs"), params)


def refuse_rates(rule: str, weight_kind: str) -> None:
    """Raise ValueError where the weights say how often a row is shown, as the schedule does."""
    if weight_kind in ("sampling", "repeat"):
        raise ValueError(
            f"schedule {rule!r} and weights of kind {weight_kind!r} both say how often a row is "
            "shown; take a selection without weights or with loss weights"
        )


def _class_of(rule: str) -> Any:
    if rule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {rule!r}; choose one of: {', '.join(SCHEDULES)}"
            + did_you_mean(rule, SCHEDULES)
        )
    module, _, name = SCHEDULES[rule].partition(":")
    return getattr(import_module(module), name)


def _items(schedule: Schedule) -> Iterator[tuple[str, Any]]:
    for key, value in asdict(schedule).items():  # type: ignore[call-overload]
        yield key, list(value) if isinstance(value, tuple) else value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
