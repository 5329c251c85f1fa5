"""Progress of a scoring run: rows, rows a second, time left; on stderr.

The rate counts rows scored by this process alone, so it is right after a resume.
"""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger("curate.score")

LINE_EVERY_S = 10.0


class Progress:
    """A bar on a terminal, a log line every ten seconds elsewhere, or nothing at all."""

    def __init__(
        self,
        rows: int,
        done: int,
        *,
        show: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows, self.already, self.done = rows, done, done
        self.show, self.clock = show, clock
        self._started = self._last = clock()
        self._bar: object = None

    def __enter__(self) -> "Progress":
        if self.show and sys.stderr.isatty():
            self._open_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]
        elif self.show and kind is None and self.done > self.already:
            log.info("%s", self.line())

    @property
    def rate(self) -> float:
        """Rows a second since this process began to score."""
        elapsed = self.clock() - self._started
        return (self.done - self.already) / elapsed if elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at this rate; None before the first row."""
        return (self.rows - self.done) / self.rate if self.rate > 0 else None

    def add(self, rows: int) -> None:
        """Count rows; a negative number takes back those of a try that came to nothing."""
        self.done += rows
        if self._bar is not None:
            text = self._text()
            self._bar.update(self._task, completed=self.done, text=text)  # type: ignore[attr-defined]
        elif self.show and self.clock() - self._last >= LINE_EVERY_S:
            self._last = self.clock()
            log.info("%s", self.line())

    def line(self) -> str:
        """Return one line for a log."""
        return f"scored {self.done:,} of {self.rows:,} rows, {self._text()}"

    def _text(self) -> str:
        left = self.seconds_left
        return f"{self.rate:,.0f} rows/s, {'?' if left is None else duration(left)} left"

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task("", total=self.rows, completed=self.done, text="")
        self._bar.start()


def duration(seconds: float) -> str:
    """Return seconds as people say them: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
