"""Times of several things that take turns, and the line that says on which machine.

A machine that slows down for a while slows all of them, so a ratio is taken within a round and the
median over the rounds.
"""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Spent:
    """Seconds of one call: of all threads of this process, and the clock's."""

    cpu: float
    wall: float


def spent(run: Run, device: torch.device) -> Spent:
    """Return what a call takes until its last kernel is done."""
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    _wait(device)
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def in_turns(
    runs: Mapping[str, Run], seconds: float, device: torch.device, least: int = 5
) -> dict[str, list[Spent]]:
    """Return every thing's times by round, after one untimed call each; at least `least` rounds."""
    for run in runs.values():
        run()
    times: dict[str, list[Spent]] = {name: [] for name in runs}
    end, order = time.monotonic() + seconds, list(runs)
    while time.monotonic() < end or len(times[order[0]]) < least:
        for name in order:
            times[name].append(spent(runs[name], device))
        order = order[1:] + order[:1]  # nobody always follows the same neighbour
    return times


def ratios(mine: Sequence[Spent], base: Sequence[Spent]) -> tuple[float, float]:
    """Return the medians over rounds of (cpu, wall) over the neighbour's in the same round."""
    pairs = list(zip(mine, base, strict=True))
    return median(a.cpu / b.cpu for a, b in pairs), median(a.wall / b.wall for a, b in pairs)


def milliseconds(
    run: Run, device: torch.device, seconds: float = 0.2, flush: torch.Tensor | None = None
) -> float:
    """Return the median time of a call, by the device's own clock where it has one.

    `flush` is zeroed before each call: what a kernel reads is then not in the cache already.
    """
    run()
    cost = max(spent(run, device).wall, 1e-6)
    count = int(min(200, max(3, seconds / cost)))
    if device.type != "cuda":
        return median(spent(run, device).wall for _ in range(count)) * 1e3
    pairs = []
    for _ in range(count):
        if flush is not None:
            flush.zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        run()
        pair[1].record()
        pairs.append(pair)
    _wait(device)
    return median(start.elapsed_time(end) for start, end in pairs)


def machine(device: torch.device, threads: int | None = None) -> str:
    """Return the machine, the versions, the revision and the day."""
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    for name in ("triton", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    where = _processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    if threads and device.type == "cpu":
        where += f", {threads} thread(s), load {os.getloadavg()[0]:.1f}"
    return "; ".join([where, ", ".join(versions), _revision(), f"{datetime.now(UTC):%Y-%m-%d}"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return f"curate at {found or 'an unknown revision'}"
