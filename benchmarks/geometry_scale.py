"""Time, CPU time and memory of selecting by geometry, vectors memory-mapped from a file.

    python benchmarks/geometry_scale.py                                 100 000 x 256, all methods
    python benchmarks/geometry_scale.py --rows 1000000 --method kcenter --picks 10000
    python benchmarks/geometry_scale.py --rows 10000000 --folder /data  10 GB of vectors there

Vectors are a mixture of Gaussians (one for 1000 rows, weights falling as 1/rank), float32, written
in blocks. Memory is what the process itself holds at most (pages of the mapped file, which the
system may drop, left out), beside what it held before selecting. Linux only.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.selectors.protocol import Budget
from curate.selectors.registry import make_selector
from curate.selectors.vectors import ArrayVectors

BATCH = 65_536
METHODS = ("kcenter", "facility_location", "herding", "semdedup", "exact")
BY_GRADIENTS = ("craig", "gradmatch", "glister", "greedy_alignment")
"""Only where they are asked for; greedy_alignment is given the first 1000 rows as its target."""
BY_SCORE = ("d2", "diverse_top")
"""Only where they are asked for; the score is uniform in [0, 1)."""


class SyntheticTable:
    """A score table made one batch at a time, with vectors from a file."""

    schema = pa.schema([("shard", pa.int32()), ("row", pa.int64()), ("score", pa.float32())])
    target: ArrayVectors | None = None

    def __init__(self, array: np.ndarray) -> None:
        self.rows, self.vectors = len(array), ArrayVectors(array)

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, self.rows, BATCH):
            row = np.arange(start, min(start + BATCH, self.rows))
            draws = np.random.default_rng(start).random(len(row), dtype=np.float32)
            values = {
                "shard": pa.array(np.zeros(len(row), np.int32)),
                "row": pa.array(row),
                "score": pa.array(draws),
            }
            yield pa.record_batch({name: values[name] for name in columns})


class Held:
    """The most memory of the process's own while it runs, in megabytes, read every 20 ms."""

    def __enter__(self) -> "Held":
        self.before = self.most = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self.most = max(self.most, self._now())

    def _now(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def write_vectors(path: Path, rows: int, dimension: int, seed: int) -> np.ndarray:
    """Write the mixture and return it memory-mapped."""
    rng = np.random.default_rng(seed)
    parts = max(1, rows // 1000)
    centres = 2 * rng.standard_normal((parts, dimension), dtype=np.float32)
    share = 1 / np.arange(1, parts + 1)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dimension))
    for start in range(0, rows, BATCH):
        n = min(BATCH, rows - start)
        part = rng.choice(parts, n, p=share / share.sum())
        array[start : start + n] = centres[part] + rng.standard_normal(
            (n, dimension), dtype=np.float32
        )
    array.flush()
    return np.load(path, mmap_mode="r")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--dimension", type=int, default=256)
    options.add_argument("--picks", type=int, default=1000)
    options.add_argument("--method", action="append", choices=METHODS + BY_GRADIENTS + BY_SCORE)
    options.add_argument("--param", action="append", default=[], help="NAME=WHOLE NUMBER")
    options.add_argument("--folder", help="where the vectors are written; a temporary one")
    asked = options.parse_args()
    params = {name: int(value) for name, value in (p.split("=") for p in asked.param)}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        array = write_vectors(Path(folder, "v.npy"), asked.rows, asked.dimension, 0)
        for method in asked.method or METHODS:
            table, rng = SyntheticTable(array), np.random.default_rng(0)
            if method == "greedy_alignment":
                table.target = ArrayVectors(array[:1000])
            by = {"by": "score"} if method in BY_SCORE else {}
            selector = make_selector(method, **by, **params)
            wall, cpu = time.perf_counter(), time.process_time()
            with Held() as memory:
                selection = selector.select(table, Budget("rows", asked.picks), rng)
                selected = sum(batch.num_rows for batch in selection.batches)
            result = {
                "method": method,
                "rows": asked.rows,
                "dimension": asked.dimension,
                "selected": selected,
                "seconds": round(time.perf_counter() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "peak_mb": round(memory.most - memory.before, 1),
                **{k: v for k, v in selection.params.items() if isinstance(v, float | int)},
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
