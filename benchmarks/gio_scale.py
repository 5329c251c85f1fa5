"""Time and memory of `gio` on vectors that are streamed from a file.

    python benchmarks/gio_scale.py                       1 million × 384 in float16, 5 % kept
    python benchmarks/gio_scale.py --rows 10000000       10 million, a file of 7.7 GB
    python benchmarks/gio_scale.py --clusters 10000 --dtype float32

Vectors are synthetic: --clouds Gaussian clouds on the unit sphere, the target in a tenth of them.
Memory is the largest anonymous resident size, read every 50 ms, beside what it was before: pages of
the mapped file belong to the system's cache and are not counted.
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.selectors.budget import parse_budget
from curate.selectors.gio import Gio
from curate.selectors.vectors import ArrayVectors

BATCH = 65_536
BLOCK = 1 << 16


@dataclass
class SyntheticTable:
    """A table that exists one batch at a time, with vectors."""

    vectors: ArrayVectors
    target: ArrayVectors
    schema = pa.schema([("shard", pa.int32()), ("row", pa.int64())])

    @property
    def rows(self) -> int:
        return self.vectors.rows

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, self.rows, BATCH):
            row = np.arange(start, min(start + BATCH, self.rows))
            values = {"shard": pa.array(np.zeros(len(row), np.int32)), "row": row}
            yield pa.record_batch({name: values[name] for name in columns})


class PeakMemory:
    """The largest anonymous resident size while it watches, in megabytes."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_mb()

    @contextlib.contextmanager
    def watching(self) -> Iterator["PeakMemory"]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                self.peak = max(self.peak, anonymous_mb())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()


def anonymous_mb() -> float:
    """Return the anonymous resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("this system does not say how much memory is anonymous; run on Linux")


def clouds(centers: np.ndarray, of: np.ndarray, seed: int) -> np.ndarray:
    """Return a point of each of these clouds, at length 1."""
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal((len(of), centers.shape[1]), dtype=np.float32)
    rows = centers[of] + 0.5 * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_vectors(path: Path, rows: int, centers: np.ndarray, dtype: str) -> np.ndarray:
    """Write rows of all clouds in turn to a .npy file and return it memory-mapped."""
    shape = (rows, centers.shape[1])
    file = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    for start in range(0, rows, BLOCK):
        of = np.arange(start, min(start + BLOCK, rows)) % len(centers)
        file[start : start + len(of)] = clouds(centers, of, start)
    file.flush()
    del file
    return np.load(path, mmap_mode="r")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--dimension", type=int, default=384)
    options.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    options.add_argument("--clouds", type=int, default=200)
    options.add_argument("--target-rows", type=int, default=20_000)
    options.add_argument("--clusters", type=int, default=1500)
    options.add_argument("--variant", default="official", choices=["official", "l-nn"])
    options.add_argument("--budget", default="0.05", help="none: the criterion decides")
    options.add_argument("--folder", help="Where the file is written; a temporary one by default.")
    asked = options.parse_args()
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((asked.clouds, asked.dimension), dtype=np.float32)
    wanted = max(1, asked.clouds // 10)
    target = clouds(centers, np.arange(asked.target_rows) % wanted, 1 << 40)
    with tempfile.TemporaryDirectory(prefix="curate-gio-", dir=asked.folder) as folder:
        path = Path(folder) / "vectors.npy"
        rows = write_vectors(path, asked.rows, centers, asked.dtype)
        table = SyntheticTable(ArrayVectors(rows), ArrayVectors(target))
        selector = Gio(
            variant=asked.variant, clusters=asked.clusters, target_clusters=asked.clusters
        )
        budget = parse_budget(1.0 if asked.budget == "none" else asked.budget)
        memory, start, cpu = PeakMemory(), time.perf_counter(), time.process_time()
        with memory.watching():
            selection = selector.select(table, budget, np.random.default_rng(0))
            kept = [batch.column("row").to_numpy() for batch in selection.batches]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        chosen = np.concatenate(kept)
        result = {
            "rows": asked.rows,
            "dimension": asked.dimension,
            "dtype": asked.dtype,
            "file_mb": round(path.stat().st_size / 1e6),
            "clusters": asked.clusters,
            "variant": asked.variant,
            "selected": len(chosen),
            "of_the_targets_clouds": round(float((chosen % asked.clouds < wanted).mean()), 4),
            "accepted_clusters": selection.params["accepted_clusters"],
            "stopped": selection.params["stopped"],
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_mb": round(memory.peak),
            "before_mb": round(memory.before),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
            "date": time.strftime("%Y-%m-%d"),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
