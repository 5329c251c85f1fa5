"""The attempts ledger: what a scoring process was about to do, so that its death can be explained.

`attempts/00012-000.json` is the first try at unit 12: who tried, the steps it is in, and how it
ended. A step is written down before it is run; a process that dies cannot say which row killed it,
but the ledger can say where. On a local disk the line is rewritten in place for every step (no
fsync: it must outlive the process, not the machine). On an object store steps are written only
from a unit's second try on.
"""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from curate.pipeline.storing.commit import explained
from curate.pipeline.storing.storage import Folder

FOLDER = "attempts"
SLOT_BYTES = 512
ON_TRIAL = " on trial"
"""Behind the key of a step whose rows are being tried in a child process."""
LETHAL = 3
"""A step that kills its process this often is not tried again."""
SUSPECT = 2
"""From this many deaths on, a step is looked at row by row before it is run again. A single death
is usually a machine that went away, and rows in a batch of another size score differently in the
last bits."""

State = Literal["running", "committed", "died", "gone", "failed", "interrupted", "late"]
"""`died`: alone, under the eyes of its run. `gone`: with the whole run, maybe killed from outside.
"""


@dataclass
class Record:
    """What the ledger says of one try at a unit. `unit` -1 is the probe of the model."""

    unit: int
    number: int
    session: str
    pid: int
    state: State = "running"
    steps: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        return _name(self.unit, self.number)


class Attempt:
    """One try at a unit: `step` before anything that a row could make fatal, `end` after all."""

    def __init__(self, folder: Folder, unit: int, number: int, session: str) -> None:
        self.folder = folder
        self.record = Record(unit, number, session, os.getpid())
        self._lock = threading.Lock()
        self._file: int | None = None
        path = folder.local_path(self.record.name)
        if path is not None:
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write()

    def step(self, kind: str, key: str | None) -> None:
        """Note that step `key` of this kind begins; None, that no step of the kind is under way."""
        with self._lock:  # the thread that reads ahead has steps of its own
            if key is None:
                self.record.steps.pop(kind, None)
            else:
                self.record.steps[kind] = key
            if self._file is not None or (key is not None and self.record.number > 0):
                self._write()

    def end(self, state: State, reason: str = "") -> None:
        """Note how the try ended."""
        with self._lock:
            self.record.state, self.record.reason = state, reason
            self._write()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _write(self) -> None:
        line = json.dumps(vars(self.record), sort_keys=True).encode()
        if self._file is None:
            self.folder.replace(self.record.name, line)
        else:
            with explained(Path(self.folder.full_name(self.record.name))):
                os.pwrite(self._file, line.ljust(SLOT_BYTES - 1) + b"\n", 0)


def read_attempts(folder: Folder) -> dict[int, list[Record]]:
    """Return the tries at each unit, oldest first."""
    found: dict[int, list[Record]] = {}
    for name in folder.names(f"{FOLDER}/"):
        label, _, number = name.removeprefix(f"{FOLDER}/").removesuffix(".json").rpartition("-")
        if label != "trials":
            record = _read(folder, name, -1 if label == "probe" else int(label), int(number))
            found.setdefault(record.unit, []).append(record)
    return {unit: sorted(tries, key=lambda r: r.number) for unit, tries in found.items()}


def attempts_at(folder: Folder, unit: int, below: int) -> list[Record]:
    """Return the tries at one unit with numbers under `below`; lists no folder."""
    found = []
    for number in range(below):
        with contextlib.suppress(FileNotFoundError):  # its process died before it began
            found.append(_read(folder, _name(unit, number), unit, number))
    return found


def close_attempt(folder: Folder, record: Record, state: State, reason: str) -> None:
    """Note the end of a try that could not do so itself."""
    if record.state == "running":
        record.state, record.reason = state, reason
        folder.replace(record.name, json.dumps(vars(record), sort_keys=True).encode())


def deaths(records: list[Record], survived: Collection[str] = ()) -> Counter[str]:
    """Return how often each step (`kind:key`) was under way when its process died.

    One that went with its whole run may have been killed from outside: no step that a child
    `survived` is to blame for it, nor one on trial, where the child takes the blow.
    """
    count: Counter[str] = Counter()
    for record in records:
        for kind, key in record.steps.items():
            step = f"{kind}:{key.removesuffix(ON_TRIAL)}"
            is_excused = key.endswith(ON_TRIAL) or step in survived
            if record.state == "died" or (record.state == "gone" and not is_excused):
                count[step] += 1
    return count


def forget_attempts(folder: Folder) -> None:
    """Remove the ledger of a finished run: it tells of processes, not of rows."""
    for name in folder.names(f"{FOLDER}/"):
        folder.delete(name)
    path = folder.local_path(FOLDER)
    if path is not None:
        with contextlib.suppress(OSError):
            path.rmdir()


def trials_name(unit: int) -> str:
    """Return the name of the file that holds what row-by-row trials of a unit found."""
    return f"{FOLDER}/trials-{unit:05d}.json"


def read_trials(folder: Folder, unit: int) -> dict[str, Any]:
    """Return {step: [[positions, None or why they cannot be run], ...]}."""
    name = trials_name(unit)
    trials: dict[str, Any] = folder.read_json(name) if folder.exists(name) else {}
    return trials


def _read(folder: Folder, name: str, unit: int, number: int) -> Record:
    try:
        return Record(**json.loads(folder.read(name)))
    except json.JSONDecodeError:  # killed, or out of space, before its first line
        return Record(unit, number, "", 0, "interrupted")


def _name(unit: int, number: int) -> str:
    return f"{FOLDER}/{'probe' if unit < 0 else f'{unit:05d}'}-{number:03d}.json"
