"""Time, memory and scans of selecting from a large score table.

    python benchmarks/select_scale.py                    10 million rows, top 50 %, no ranks
    python benchmarks/select_scale.py --rows 100000000   100 million
    python benchmarks/select_scale.py --ranked           with ranks, on disk above 16 million
    python benchmarks/select_scale.py --method importance
    python benchmarks/select_scale.py --by "rank(score) + 0.1*z(score)"

Scores are synthetic: uniform float32 made from the row number. Memory is the peak resident size
of the process, beside what it was before selecting.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from curate.selectors.budget import parse_budget
from curate.selectors.composite import Composite
from curate.selectors.expression import Expression
from curate.selectors.registry import make_selector

BATCH = 65_536
METHODS = ["top", "bottom", "random", "moderate", "stratified", "ccs", "importance", "softmax"]


@dataclass
class SyntheticTable:
    """A table that exists one batch at a time."""

    rows: int
    scans: list[list[str]] = field(default_factory=list)
    schema = pa.schema([("shard", pa.int32()), ("row", pa.int64()), ("score", pa.float32())])

    def scan(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self.scans.append(list(columns))
        for start in range(0, self.rows, BATCH):
            row = np.arange(start, min(start + BATCH, self.rows))
            score = ((row * 2654435761 + 12345) % 4294967291 / 4294967291).astype(np.float32)
            values = {"shard": pa.array(np.zeros(len(row), np.int32)), "row": row, "score": score}
            yield pa.record_batch({name: values[name] for name in columns})


def peak_mb() -> float:
    """Return the peak resident size of this process in megabytes."""
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--budget", default="0.5")
    options.add_argument("--method", default="top", choices=METHODS)
    options.add_argument("--by", default="score", help="the column `score`, or an expression")
    options.add_argument("--ranked", action="store_true")
    asked = options.parse_args()
    source = table = SyntheticTable(asked.rows)
    if asked.by != "score":
        table = Composite(source, Expression(asked.by))
    params = {} if asked.method == "random" else {"by": asked.by}
    selector = make_selector(asked.method, ranked=asked.ranked, **params)
    before, start = peak_mb(), time.perf_counter()
    selection = selector.select(table, parse_budget(asked.budget), np.random.default_rng(0))
    selected = sum(batch.num_rows for batch in selection.batches)
    result = {
        "rows": asked.rows,
        "selected": selected,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round(peak_mb(), 1),
        "peak_mb_before": round(before, 1),
        "scans": len(source.scans),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
