"""How training is seen while it runs: a bar on a terminal, a log line now and then elsewhere."""

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

LOG_EVERY_S = 10.0

log = logging.getLogger("curate.train")


@runtime_checkable
class Progress(Protocol):
    def report(self, step: int, loss: float | None) -> None:
        """Show that `step` steps are done."""
        ...

    def close(self) -> None: ...


def train_progress(name: str, steps: int, wanted: bool = True) -> Progress:
    """Return a bar on stderr where that is a terminal, else periodic log lines."""
    if wanted and sys.stderr.isatty():
        return _Bar(name, steps)
    return _Lines(name, steps, LOG_EVERY_S if wanted else float("inf"))


@contextmanager
def evaluation_progress(trainings: int, wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """Give a function that shows one more training as done, with what came out."""
    if not (wanted and sys.stderr.isatty()):
        done = itertools.count(1)
        yield lambda said: log.info("%s (%d of %d trainings)", said, next(done), trainings)
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    with RichProgress(console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=trainings)
        yield lambda said: bar.update(task, advance=1, description=said)


class _Lines:
    def __init__(self, name: str, steps: int, every_s: float) -> None:
        self._name, self._steps, self._every_s = name, steps, every_s
        self._started = self._said = time.monotonic()
        self._first: int | None = None

    def report(self, step: int, loss: float | None) -> None:
        if self._first is None:
            self._first = step
        now = time.monotonic()
        if now - self._said < self._every_s:
            return
        self._said = now
        rate = (step - self._first) / (now - self._started)
        left = f", {(self._steps - step) / rate:.0f} s left" if rate else ""
        shown = "" if loss is None else f", loss {loss:.4f}"
        log.info("%s: step %d of %d%s%s", self._name, step, self._steps, shown, left)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, name: str, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f} of {task.total:.0f} {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(name, total=steps, loss="")

    def report(self, step: int, loss: float | None) -> None:
        self._bar.update(self._task, completed=step)
        if loss is not None:
            self._bar.update(self._task, loss=f"loss {loss:.4f}")

    def close(self) -> None:
        self._bar.stop()
