"""Searches the kernels' tables of configurations on the device at hand, and says what wins there.

A kernel file keeps its configurations in CONFIGS, by architecture. The entry that a case reads is
replaced by its neighbours (a block half or twice as large, half or twice the warps, a stage more or
less), the fastest right one is taken, and so on until no neighbour is faster: nothing here is
shipped, a person copies what was found into the table.
"""

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (makes curate importable)
import torch
from kernel_cases.case import Case, Inputs
from timing import milliseconds
from torch import Tensor

from curate.kernels.launch import Config, architecture

_KERNELS = Path(__file__).parents[1] / "kernels"
# What two configurations may differ by: they add up in another order.
_TOLERANCE = 1e-4
# A faster time counts from here on: below it is noise.
_GAIN = 0.97


class _Watched(Config):
    """A configuration that remembers whether somebody asked for its blocks."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("blocks", "options"):
            object.__setattr__(self, "was_read", True)
        return super().__getattribute__(name)


@dataclass(frozen=True)
class Entry:
    """One configuration of a table."""

    module: str
    table: Any
    """The dictionary that holds it."""
    key: object

    @property
    def name(self) -> str:
        return f"{self.module}[{self.key!r}]"

    @property
    def config(self) -> Config:
        config: Config = self.table[self.key]
        return config

    def put(self, config: Config) -> None:
        self.table[self.key] = config


@dataclass(frozen=True)
class Found:
    """The fastest configuration of an entry on a case."""

    entry: str
    case: Case
    dtype: torch.dtype
    before: tuple[float, Config]
    after: tuple[float, Config]

    def __str__(self) -> str:
        (old_ms, _), (ms, config) = self.before, self.after
        what = f"{self.entry} on {self.case.op} {self.case.shape} {str(self.dtype)[6:]}"
        if ms == old_ms:
            return f"{what}: {ms:.3f} ms, nothing faster"
        blocks = dict(config.blocks)
        return (
            f"{what}: {old_ms:.3f} -> {ms:.3f} ms with "
            f"Config({blocks}, {config.num_warps}, {config.num_stages})"
        )


def entries(device: torch.device) -> list[Entry]:
    """Return every entry of every kernel file's table for this device."""
    found = []
    for path in sorted(_KERNELS.glob("*.py")):
        tables = getattr(importlib.import_module(f"curate.kernels.{path.stem}"), "CONFIGS", None)
        if isinstance(tables, dict):
            key = max(a for a in tables if a <= max(architecture(device), min(tables)))
            found += list(_leaves(path.stem, tables[key]))
    return found


def _leaves(module: str, table: dict[Any, Any]) -> Iterator[Entry]:
    for key, value in table.items():
        if isinstance(value, Config):
            yield Entry(module, table, key)
        elif isinstance(value, dict):
            yield from _leaves(module, value)


def read_by(case: Case, inputs: Inputs, all_entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that a call reads."""
    kept = [entry.config for entry in all_entries]
    watched = [_Watched(c.blocks, c.num_warps, c.num_stages) for c in kept]
    try:
        for entry, config in zip(all_entries, watched, strict=True):
            entry.put(config)
        case.run(*inputs)
    finally:
        for entry, config in zip(all_entries, kept, strict=True):
            entry.put(config)
    pairs = zip(all_entries, watched, strict=True)
    return [entry for entry, config in pairs if getattr(config, "was_read", False)]


def neighbours(config: Config) -> Iterator[Config]:
    """Yield the configurations one step away."""
    for name, size in config.blocks.items():
        if name.startswith("BLOCK"):
            for other in (size // 2, size * 2):
                if 16 <= other <= 512:
                    yield replace(config, blocks={**config.blocks, name: other})
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if 1 <= warps <= 16:
            yield replace(config, num_warps=warps)
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= stages <= 6:
            yield replace(config, num_stages=stages)


def tune(
    cases: Sequence[Case], device: torch.device, dtypes: Sequence[torch.dtype], until: float
) -> Iterator[str]:
    """Return a line for each entry that a case reads, until the time (monotonic) is up."""
    tables = entries(device)
    for case in cases:
        for dtype in dtypes:
            torch.manual_seed(0)
            inputs = case.inputs(device, dtype)
            for entry in read_by(case, inputs, tables):
                if time.monotonic() > until:
                    yield "the time is up: the rest is not tuned"
                    return
                yield str(search(entry, case, inputs, dtype, device, until))


def search(
    entry: Entry, case: Case, inputs: Inputs, dtype: torch.dtype, device: torch.device, until: float
) -> Found:
    """Return what a walk from neighbour to neighbour ends at; the table is left as it was."""
    start, truth = entry.config, case.run(*inputs)
    first = best = milliseconds(lambda: case.run(*inputs), device), start
    tried = [start]
    try:
        while time.monotonic() < until:
            steps = [c for c in neighbours(best[1]) if c not in tried]
            tried += steps
            times = [(_time(entry, c, case, inputs, truth, device), c) for c in steps]
            fastest = min(times, key=lambda found: found[0], default=(float("inf"), start))
            if fastest[0] > _GAIN * best[0]:
                break
            best = fastest
    finally:
        entry.put(start)
    return Found(entry.name, case, dtype, first, best)


def _time(
    entry: Entry, config: Config, case: Case, inputs: Inputs, truth: Tensor, device: torch.device
) -> float:
    """Return the milliseconds with a configuration, infinite where it fails or is wrong."""
    entry.put(config)
    try:
        found = case.run(*inputs)
        error = (found - truth).double().norm() / truth.double().norm().clamp_min(1e-300)
        if not float(error) <= _TOLERANCE:
            return float("inf")
        return milliseconds(lambda: case.run(*inputs), device, 0.1)
    except Exception:  # too many registers, too much shared memory, no such tile: not this one
        return float("inf")
