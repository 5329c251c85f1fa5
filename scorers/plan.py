"""How each parameter's per-row gradient is taken, and where the rows are in each use of it."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from curate.scorers.parts import Layout
from curate.scorers.taps import UseKey

log = logging.getLogger("curate.engine")


@dataclass(frozen=True)
class Path:
    """analytic: from the taps. vmap: torch.func over a module. rows: one row at a time, through a
    module or (None) the whole model. unused: no gradient. Each is exact; they differ in cost."""

    kind: Literal["analytic", "vmap", "rows", "unused"]
    module: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.kind == "analytic":
            return f"analytic: {self.detail}"
        if self.kind == "vmap":
            return f"vmap: {self.module or 'model'}"
        if self.kind == "unused":
            return "unused"
        return "row by row" if self.module is None else f"row by row: {self.module or 'model'}"


WHOLE = Path("rows")


@dataclass(frozen=True)
class HeadPlan:
    """The use whose output the logits are, and the parameters that made them."""

    key: UseKey | None
    """None where the head is used several times (logits made in chunks)."""
    names: tuple[str, ...]
    starts_at_token_0: bool
    """The logits begin where the use's output does, so that their tokens are a prefix of its."""


@dataclass
class Plan:
    """The paths of the parameters (canonical names), best first; they only ever get slower."""

    layouts: dict[UseKey, Layout] = field(default_factory=dict)
    choices: dict[str, list[Path]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    leaf_axes: dict[str, "CallAxes"] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    """Parameters that the probe met where no gradient is recorded."""
    copies: set[UseKey] = field(default_factory=set)
    trusted: set[str] = field(default_factory=set)
    """Modules through which the probe has found parameters right."""
    head: HeadPlan | None = None
    is_slower: bool = False
    """Whether a parameter was sent to a path that is not its best, which is said once."""

    @property
    def sees_head(self) -> bool:
        """Whether the head is one use, and the rows are known in it."""
        return self.head is not None and self.head.key is not None and self.head.key in self.layouts

    def path(self, name: str) -> Path:
        return self.choices[name][0]

    def names(self, kind: str, among: Iterable[str]) -> set[str]:
        return {name for name in among if self.path(name).kind == kind}

    def doubtful(self, name: str) -> bool:
        """Tell whether a path may be wrong although its layouts agree with the values seen.

        A module run on its own may miss what joins it to the loss, a table spread over the rows
        may go where it does not fit, and a use may be hidden in a custom autograd Function.
        """
        path = self.path(name)
        if name in self.hidden:
            return True
        if path.kind in ("vmap", "rows"):
            return path != WHOLE
        keys = [key for key in self.layouts if name in key[1]]
        return any(self.layouts[key].kind.startswith("shared") for key in keys)

    def demote(self, names: Collection[str], reason: str) -> None:
        """Send parameters to their next path."""
        for name in sorted(names):
            paths = self.choices[name]
            old = paths.pop(0)
            if not paths:
                paths.append(WHOLE)
            log.debug("%s: %s (%s); now %s", name, reason, old, paths[0])
            if not self.is_slower:  # an adapter has hundreds of parameters for one reason
                log.info("some gradients go a slower way, exact too, such as %s; -v says why", name)
            self.is_slower = True

    def seen_for_the_first_time(self, names: Collection[str]) -> None:
        """Give parameters that the probe held for unused a path of their own."""
        for name in sorted(names):
            owners = [m for m in self.trusted if m == "" or name.startswith(m + ".")]
            nearest = max(owners, key=len, default=None)
            self.choices[name] = [WHOLE if nearest is None else Path("rows", nearest), WHOLE]
            log.info("%s: first used after the probe; now %s", name, self.choices[name][0])


@dataclass(frozen=True)
class CallAxes:
    """The row axis of each tensor that goes into and comes out of a module (None: shared)."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def summary(choices: Mapping[str, list[Path]]) -> dict[str, str]:
    """Return each parameter's present path in words."""
    return {name: str(paths[0]) for name, paths in choices.items()}
