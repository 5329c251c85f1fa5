"""Trials: rows that may kill a process are run in a child first, so that only the child dies.

`isolate` halves a suspect set of rows until the rows that kill are alone. The child is
`python -m curate.pipeline.scoring.trial`; it gets the work and the unit on its standard input,
then lists of rows, and answers each on a pipe of its own.
"""

import ctypes
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

import torch

from curate.pipeline.scoring.score_unit import Way, try_rows
from curate.pipeline.scoring.signal_pass import SignalPass
from curate.pipeline.scoring.units import Unit
from curate.pipeline.scoring.windows import Groups
from curate.pipeline.scoring.work import Work

log = logging.getLogger("curate.score")

PR_SET_PDEATHSIG = 1
PATIENCE_S = 300.0
"""A trial that has not answered by then is taken for a hang."""
MAX_DEATHS = 64
"""Children that a suspect set may cost before it is given up."""


def kills(work: Work, unit: Unit, way: Way) -> bool:
    """Tell whether the rows of a small unit kill a process that tries them in this way."""
    with _Child(work, unit) as child:
        return child.survives(list(range(unit.rows)), way) is not None


def isolate(work: Work, unit: Unit, rows: list[int]) -> Groups | None:
    """Return groups of these rows that can be run, and the rows that kill, with the reason.

    One group of all rows means that nothing was found: what killed came from outside, or needs
    more than these rows. Rows that kill only together come back as separate groups. None: reading
    kills, so no row can be blamed.
    """
    log.warning("unit %d: trying %d suspect rows in a child process", unit.number, len(rows))
    with _Child(work, unit) as child:
        if child.survives(rows, "read") is not None:
            return None
        return _isolate(child.survives, rows)


def _isolate(survives: Callable[[list[int]], str | None], rows: list[int]) -> Groups:
    reason = survives(rows)
    if reason is None:
        return [(rows, None)]
    if len(rows) == 1:
        return [(rows, reason)]
    middle = len(rows) // 2
    return _isolate(survives, rows[:middle]) + _isolate(survives, rows[middle:])


class _Child:
    """A process that tries rows; started again whenever it dies."""

    def __init__(self, work: Work, unit: Unit) -> None:
        self.work, self.unit = work, unit
        self.deaths = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def survives(self, rows: list[int], way: Way = "run") -> str | None:
        """Return None when a child lived through these rows, else how it ended."""
        if self.deaths >= MAX_DEATHS:
            return f"given up after {MAX_DEATHS} rows that kill their process"
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([rows, way]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        ready, _, _ = select.select([self.answers], [], [], PATIENCE_S)
        if not ready:
            self._stop()
            self.deaths += 1
            return f"did not finish within {PATIENCE_S:.0f} s"
        return None if self.answers.readline() else self._ended()

    def _start(self) -> None:
        reading, writing = os.pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "curate.pipeline.scoring.trial", str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(writing,),
            env=environment,
        )
        os.close(writing)
        self.answers: IO[bytes] = os.fdopen(reading, "rb", buffering=0)
        assert self.process.stdin is not None
        pickle.dump((self.work, self.unit), self.process.stdin)
        self.process.stdin.flush()

    def _ended(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        self._stop()
        self.deaths += 1
        if code < 0:
            return f"scoring this row kills the process ({signal.Signals(-code).name})"
        return f"scoring this row ends the process (exit code {code})"

    def _stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.answers.close()
        self.process = None


def main(argument: str) -> None:
    """Answer every list of rows with one line, as long as we live."""
    _die_with_parent()
    source: Any = sys.stdin.buffer
    work, unit = pickle.load(source)
    torch.set_num_threads(work.threads)
    signals = SignalPass(work)
    with os.fdopen(int(argument), "wb", buffering=0) as answers:
        for line in source:
            try_rows(work, unit, signals, *json.loads(line))
            answers.write(b"alive\n")


def _die_with_parent() -> None:
    """Let the kernel end this process with the worker that started it, even in mid-computation."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
