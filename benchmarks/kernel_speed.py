"""Each kernel against its roofline: the time that its arithmetic and its traffic must take.

    python benchmarks/kernel_speed.py                          small cases, on a CPU
    python benchmarks/kernel_speed.py --device cuda            every case, in 32 and 16 bits
    python benchmarks/kernel_speed.py --only sketch --dtype bfloat16 --output FILE

The cases, with their counts of operations and elements, are in benchmarks/kernel_cases/. First a
result is compared with the same function's on the same inputs in float64: its error may be as large
as that of plain torch in the dtype, and a little more; and a second call must give the same bits.
Then kernel and plain torch are timed. The ceilings are measured here, by a large matrix product in
the dtype and a large copy: `roofline` is the least time by them over the time taken.
"""

import argparse
import importlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import checkout  # noqa: F401  (makes curate importable)
import torch
from ceilings import Ceilings, ceilings
from kernel_cases.case import Case
from timing import machine, milliseconds
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a result may be off by however exact plain torch is: some last places of the dtype that sums
# are taken in, and of the dtype that inputs are read in.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_CASES = Path(__file__).parent / "kernel_cases"
# More than the caches of a GPU hold (an H100's second level: 50 MB).
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Speed:
    """One case in one dtype."""

    case: Case
    dtype: torch.dtype
    error: float
    plain_error: float
    fault: str = ""
    ms: float = math.nan
    plain_ms: float = math.nan

    def line(self, limits: Ceilings) -> str:
        """Return the table's line."""
        name = f"{self.case.op:22}{self.case.shape:34}{str(self.dtype)[6:]:>9}"
        errors = f"{self.error:9.0e}{self.plain_error:9.0e}"
        if self.fault:
            return f"{name}{errors}  {self.fault}"
        seconds = self.ms * 1e-3
        least = limits.seconds(self.case.flops / 2, self.case.elements)
        moved = self.case.elements * limits.size / seconds / 1e9
        return (
            f"{name}{errors}{self.ms:10.3f}{self.plain_ms:10.3f}{moved:9.1f}"
            f"{self.case.flops / seconds / 1e12:9.3f}{least / seconds:9.2f}"
        )


HEADER = (
    f"{'op':22}{'shape':34}{'dtype':>9}{'error':>9}{'plain':>9}{'ms':>10}{'plain ms':>10}"
    f"{'GB/s':>9}{'TFLOP/s':>9}{'roofline':>9}"
)


def main() -> int:
    """Print the table; return 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the operation's name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtypes = [DTYPES[name] for name in args.dtype or default_dtypes(device)]
    found = [case for case in cases() if args.only in case.op]
    lines = [machine(device, args.threads)]
    print(lines[0])
    for line in report(found, device, dtypes):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return int(any("wrong:" in line for line in lines))


def default_dtypes(device: torch.device) -> list[str]:
    """Return all dtypes for a GPU, and what a CPU computes in."""
    return ["float32"] if device.type == "cpu" else ["bfloat16", "float32", "float16"]


def cases() -> list[Case]:
    """Return every case of every file in kernel_cases/."""
    names = sorted(path.stem for path in _CASES.glob("*.py") if path.stem != "case")
    return [c for name in names for c in importlib.import_module(f"kernel_cases.{name}").CASES]


def report(
    found: Sequence[Case],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    seconds: float = 0.2,
    quick: bool = False,
    until: float = math.inf,
) -> Iterator[str]:
    """Return the lines of the table as they come to be known; a CPU takes the small cases.

    `until` is a time of the monotonic clock: what would begin later is left out, and said to be.
    """
    if device.type != "cuda":
        found = [case for case in found if case.is_small]
    for dtype in dtypes:
        limits = ceilings(device, dtype, quick)
        yield f"{dtype}: {limits} (matrix product and copy, measured)"
        yield HEADER
        for done, case in enumerate(found):
            if time.monotonic() > until:
                yield f"left out: {len(found) - done} cases, the time is up"
                break
            try:
                yield speed(case, device, dtype, seconds).line(limits)
            except Exception as error:  # whatever a kernel raises is its answer
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                yield f"{case.op:22}{case.shape:34}{str(dtype)[6:]:>9}  wrong: {said}"
    if not found:
        yield "no cases"


def speed(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> Speed:
    """Return a case's speed, or its fault where the result is wrong."""
    torch.manual_seed(0)
    inputs = case.inputs(device, dtype)
    truth = case.run(*(x.double() if x.is_floating_point() else x for x in inputs)).double()
    found = case.run(*inputs)
    error, same = _error(found, truth), torch.equal(found, case.run(*inputs))
    try:
        plain_error = _error(case.plain(*inputs), truth)
    except torch.OutOfMemoryError:
        plain_error = math.nan
    del truth, found
    allowed = TOLERANCE[dtype] + (0.0 if math.isnan(plain_error) else plain_error)
    if not error <= allowed:
        return Speed(
            case, dtype, error, plain_error, f"wrong: an error of {allowed:.0e} is allowed"
        )
    if not same:
        return Speed(case, dtype, error, plain_error, "wrong: two calls give different bits")
    flush = None
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    ms = milliseconds(lambda: case.run(*inputs), device, seconds, flush)
    plain_ms = math.nan
    if not math.isnan(plain_error):
        plain_ms = milliseconds(lambda: case.plain(*inputs), device, seconds, flush)
    return Speed(case, dtype, error, plain_error, ms=ms, plain_ms=plain_ms)


def _error(found: Tensor, truth: Tensor) -> float:
    """Return the relative error, in the Euclidean norm over everything."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-300))


if __name__ == "__main__":
    raise SystemExit(main())
