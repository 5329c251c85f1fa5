"""Everything on a GPU in one command, in at most eight minutes.

    python benchmarks/gpu.py                        results on the screen
    python benchmarks/gpu.py --output FILE          and in a file
    python benchmarks/gpu.py --tune --only sketch   search the kernels' configurations instead
    python benchmarks/gpu.py --device cpu           the same code on tiny shapes, in a minute

It needs torch, triton and transformers, and curate from the checkout, installed or not. In turn:

    kernels     every case against float64 and against itself, and its time against the roofline
                (kernel_speed.py)
    agreement   signs and sketches on the CPU and on the device, the same bits where sums are exact
    signals     every kind of signal on the device against the CPU in float64 (all_signals.py)
    repeats     a pass of the engine twice, the same bits
    engine      ratios beside their floors, and peak memory (engine.py)
    peers       Bergson beside ours, where it can be imported (peers.py)

A part that would begin after `--minutes` is left out, and said to be. Exit status 1 if a result is
wrong.
"""

import argparse
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import checkout  # noqa: F401  (makes curate importable)
import engine
import kernel_speed
import torch
from all_signals import all_signals
from kernel_cases.case import Case
from shapes import SHAPES, Shape, outputs
from timing import machine
from torch import Tensor
from tuning import tune

from curate.kernels.rademacher import signs, stream_key
from curate.kernels.sketch import sketch
from curate.scorers.engine import Engine
from curate.scorers.protocol import Signal

HERE = Path(__file__).resolve().parent
WRONG = "wrong:"


@dataclass(frozen=True)
class Plan:
    """Where, on what, and until when."""

    device: torch.device
    until: float
    """Of the monotonic clock."""
    cases_by_place: dict[int, Case]
    """Where each is among all cases: a process knows a case by that alone."""

    @property
    def cases(self) -> list[Case]:
        return list(self.cases_by_place.values())

    @property
    def is_rehearsal(self) -> bool:
        """On a CPU everything is run on tiny shapes, for the code's sake."""
        return self.device.type == "cpu"

    @property
    def dtypes(self) -> list[torch.dtype]:
        names = kernel_speed.default_dtypes(self.device)
        return [kernel_speed.DTYPES[name] for name in names]

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until


def main() -> int:
    """Print all tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", default="", help="part of the name of the kernels' operations")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--tune", action="store_true", help="search configurations instead")
    parser.add_argument("--output", type=Path, help="write it all there as well")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny shapes: two would wait for one another
    cases = {
        place: case
        for place, case in enumerate(kernel_speed.cases())
        if args.only in case.op and (device.type == "cuda" or case.is_small)
    }
    plan = Plan(device, time.monotonic() + 60 * args.minutes, cases)
    parts = {"tune": _tuned} if args.tune else {n: PARTS[n] for n in args.part or PARTS}
    lines = []
    for line in _all(plan, parts):
        print(line, flush=True)
        lines.append(line)
        if args.output:  # as it grows: whoever ends this keeps what there is
            args.output.write_text("\n".join(lines) + "\n")
    wrong = sum(WRONG in line for line in lines)
    print(f"{wrong} wrong")
    return int(wrong > 0)


def _all(plan: Plan, parts: dict[str, Callable[[Plan], Iterator[str]]]) -> Iterator[str]:
    yield machine(plan.device, torch.get_num_threads())
    for name, part in parts.items():
        start = time.monotonic()
        yield f"\n== {name} =="
        if plan.is_over:
            yield "left out: the time is up"
            continue
        try:
            yield from part(plan)
        except Exception as error:  # one part's failure must not hide the others
            yield f"{WRONG} {name} ended with {type(error).__name__}: {error}"
        yield f"({time.monotonic() - start:.0f} s)"


def _kernels(plan: Plan) -> Iterator[str]:
    """At most half of the time that is left; compiled by many processes at once before."""
    half = (time.monotonic() + plan.until) / 2
    if not plan.is_rehearsal:
        start = time.monotonic()
        workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn) as pool:
            failed = sum(pool.map(run_once, plan.cases_by_place))
        yield f"compiled in {time.monotonic() - start:.0f} s, {failed} cases failed there"
    seconds = 0.02 if plan.is_rehearsal else 0.05
    quick = plan.is_rehearsal
    yield from kernel_speed.report(plan.cases, plan.device, plan.dtypes, seconds, quick, half)


def run_once(place: int, device: str = "cuda") -> bool:
    """Run a case in every dtype, so that Triton's cache has its kernels; return whether it failed.

    What it raises is shown where the case is timed.
    """
    case = kernel_speed.cases()[place]
    where = torch.device(device)
    try:
        for name in kernel_speed.default_dtypes(where):
            case.run(*case.inputs(where, kernel_speed.DTYPES[name]))
    except Exception:
        return True
    finally:
        if where.type == "cuda":
            torch.cuda.empty_cache()
    return False


def _agreement(plan: Plan) -> Iterator[str]:
    """Signs are hashes: the same everywhere. Sums of small integers are exact in float32."""
    key, cpu = stream_key(0, "layer.weight", "rows"), torch.device("cpu")
    columns = torch.tensor([0, 1, 31, 32, 65535, 262143, (1 << 31) - 1])
    here, there = (signs(key, columns.to(d), 1000).cpu() for d in (cpu, plan.device))
    yield _verdict("signs, CPU and device", torch.equal(here, there))
    torch.manual_seed(0)
    for t, o, i in ((1, 16, 16), (37, 130, 257), (512, 768, 3072)):
        left, right = (torch.randint(-3, 4, (2, 1, t, side)).float() for side in (o, i))
        here, there = (_sketch(left, right, d) for d in (cpu, plan.device))
        # 9 t o i at most: below 2^24 for the first two shapes.
        exact = 9 * t * o * i < 1 << 24
        error = float((here - there).norm() / here.norm())
        same = torch.equal(here, there) if exact else error < 1e-6
        which = "same bits" if exact else f"within {error:.0e}"
        yield _verdict(f"sketch of integers, {t} x {o} x {i}, {which}", same)
        left, right = torch.randn_like(left), torch.randn_like(right)
        here, there = (_sketch(left, right, d) for d in (cpu, plan.device))
        error = float((here - there).norm() / here.norm())
        yield _verdict(f"sketch of normals, {t} x {o} x {i}, within {error:.0e}", error < 1e-5)


def _sketch(left: Tensor, right: Tensor, device: torch.device) -> Tensor:
    keys = stream_key(0, "layer.weight", "rows"), stream_key(0, "layer.weight", "columns")
    return sketch(left.to(device), right.to(device), keys, (32, 32)).cpu()


def _signals(plan: Plan) -> Iterator[str]:
    exact = torch.device("cpu"), torch.float64
    for shape in SHAPES["tiny"]:
        truth, found = all_signals(shape, [exact, (plan.device, torch.float32)])
        for name, value in truth.items():
            error = float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
            # EK-FAC's small eigenvalues part with more digits than sums do.
            limit = 1e-2 if "fac" in name else 1e-3
            yield _verdict(f"{shape.name}, {name}, within {error:.0e}", error < limit)


def _repeats(plan: Plan) -> Iterator[str]:
    wanted = [Signal("loss"), Signal("el2n"), Signal("grad_sq_norm")]
    for shape in SHAPES["tiny" if plan.is_rehearsal else "small"]:
        torch.manual_seed(0)
        # Attention as plain products: the fused one's backward pass adds in any order on a GPU.
        model = shape.model(plan.device, torch.float32, "eager")
        batch = shape.batch(plan.device, torch.float32)
        run = Engine(model, outputs, wanted)
        first, second = run(batch), run(batch)
        same = all(torch.equal(first[s], second[s]) for s in wanted)
        yield _verdict(f"engine on {shape.name} twice, the same bits", same)


def _verdict(what: str, is_right: bool) -> str:
    return f"{'right:' if is_right else WRONG} {what}"


def _engine(plan: Plan) -> Iterator[str]:
    if plan.is_rehearsal:
        yield from engine.report(SHAPES["tiny"], plan.device, torch.float32, 0.1, True)
        return
    yield from engine.report(_in_time(plan, SHAPES["medium"]), plan.device, torch.bfloat16, 6)
    yield from engine.report(_in_time(plan, SHAPES["large"]), plan.device, torch.bfloat16, 8)
    yield from engine.report(_in_time(plan, SHAPES["medium"][:1]), plan.device, torch.float32, 6)


def _in_time(plan: Plan, shapes: tuple[Shape, ...]) -> Iterator[Shape]:
    for shape in shapes:
        if plan.is_over:
            print(f"left out: {shape.title}")
            continue
        yield shape


def _peers(plan: Plan) -> Iterator[str]:
    if importlib.util.find_spec("bergson") is None:
        yield "left out: bergson is not installed"
        return
    sizes = "--rows 8 --tokens 512 --width 768 --layers 12 --vocab 50257 --rounds 5"
    if plan.is_rehearsal:
        sizes = "--rows 2 --tokens 8 --width 64 --layers 1 --vocab 50 --rounds 1"
    command = [sys.executable, str(HERE / "peers.py"), "--python", sys.executable]
    command += ["--peer", "bergson", "--device", plan.device.type, *sizes.split()]
    left = max(30.0, plan.until - time.monotonic())
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=left, env=os.environ, check=False
    )
    yield from (done.stdout if done.returncode == 0 else done.stderr).splitlines()


def _tuned(plan: Plan) -> Iterator[str]:
    yield from tune(plan.cases, plan.device, plan.dtypes, plan.until)


PARTS: dict[str, Callable[[Plan], Iterator[str]]] = {
    "kernels": _kernels,
    "agreement": _agreement,
    "signals": _signals,
    "repeats": _repeats,
    "engine": _engine,
    "peers": _peers,
}


if __name__ == "__main__":
    sys.exit(main())
