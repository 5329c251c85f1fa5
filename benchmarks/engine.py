"""What scoring a batch costs, as ratios to a plain forward or forward and backward pass of it.

    python benchmarks/engine.py                                small models, one thread of a CPU
    python benchmarks/engine.py --model gpt2 --tokens 1024     one model, longer rows
    python benchmarks/engine.py --size medium --device cuda --dtype bfloat16
    python benchmarks/engine.py --output FILE                  and the table kept

All variants take turns, round after round, in one process. `cpu` counts the seconds of all
threads, `wall` the clock's; on a shared machine trust `cpu` with one thread. Beside each ratio
stands its floor, the least that a pass with these signals can cost (benchmarks/floor.py): counted
in multiplications, and in the time that they and the traffic take by ceilings measured here. A
plain pass is the user's own: the model's loss from labels. Before timing, norms are compared with
autograd's in float64, row by row. Memory is the peak of what torch's allocator has handed out
(benchmarks/memory.py), weights and batch included, as a ratio to plain forward and backward.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import checkout  # noqa: F401  (makes curate importable)
import torch
from agreement import compare_with_autograd
from ceilings import Ceilings, ceilings
from floor import Work, work
from memory import peak_bytes, resident_bytes
from shapes import SHAPES, Shape, outputs, plain_loss
from timing import Run, in_turns, machine, ratios
from torch import nn

from curate.scorers.needs import Needs
from curate.scorers.protocol import Batch
from curate.scorers.readouts import Readout, TwoSidedSketch, sq_norm
from curate.scorers.watched_model import WatchedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
K = 32


@dataclass(frozen=True)
class Variant:
    """Something that is timed, what its ratio is to, and what its floor counts."""

    title: str
    base: str = ""
    norm: bool = False
    k: int = 0
    is_measured_for_memory: bool = False


FORWARD, BACKWARD = "plain forward", "plain forward + backward"
VARIANTS = (
    Variant(FORWARD),
    Variant(BACKWARD, is_measured_for_memory=True),
    Variant("floor: forward + activation backward", BACKWARD),
    Variant("loss + EL2N", FORWARD),
    Variant("sketch 32x32 + EL2N + loss", BACKWARD, False, K, True),
    Variant("GraNd + EL2N + loss", BACKWARD, True, 0, True),
    Variant("GraNd + sketch + EL2N + loss", BACKWARD, True, K, True),
)


def main() -> None:
    """Print the table of every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["gpt2", "bert", "llama", "resnet"], action="append")
    parser.add_argument("--size", choices=SHAPES, action="append", help="default: small and long")
    for name in ("layers", "width", "tokens", "rows", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=25, help="of timing, for each shape")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    sizes = {n: getattr(args, n) for n in ("layers", "width", "tokens", "rows", "vocab")}
    asked = [shape for size in args.size or ("small", "long") for shape in SHAPES[size]]
    shapes = [s.with_(**sizes) for s in asked if s.name in (args.model or [s.name])]
    lines = [machine(device, args.threads)]
    print(lines[0])
    for line in report(dict.fromkeys(shapes), device, dtype, args.seconds):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


def report(
    shapes: Iterable[Shape],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    quick: bool = False,
) -> Iterator[str]:
    """Return the lines of the whole table as they come to be known."""
    limits = ceilings(device, dtype, quick)
    yield f"{dtype}, {limits} (matrix product and copy, measured)"
    for shape in shapes:
        yield ""
        yield from table(shape, device, dtype, limits, seconds)


def table(
    shape: Shape, device: torch.device, dtype: torch.dtype, limits: Ceilings, seconds: float
) -> Iterator[str]:
    """Return the lines of one shape."""
    torch.manual_seed(0)
    model, batch = shape.model(device, dtype), shape.batch(device, dtype)
    counted = work(model, batch, shape.is_causal)
    error, runs = prepare(model, batch)
    fitting = {title: run for title, run in runs.items() if _fits(run)}
    times = in_turns(fitting, seconds, device)
    rounds = len(next(iter(times.values())))
    yield f"{shape.title} ({rounds} rounds; norms within {error:.0e} of float64)"
    yield f"{'':38}{'cpu ms':>9}{'wall ms':>9}{'cpu ratio':>11}{'wall ratio':>12}" + (
        f"{'floor':>8}{'w/ bytes':>10}{'peak MB':>9}{'ratio':>7}"
    )
    resident = resident_bytes(model, [*batch.inputs.values(), batch.targets])
    peaks: dict[str, int] = {}
    for variant in VARIANTS:
        if variant.title not in times:
            yield f"{variant.title:38}  out of memory"
            continue
        mine = times[variant.title]
        cpu, wall = (median(getattr(t, name) for t in mine) * 1e3 for name in ("cpu", "wall"))
        line = f"{variant.title:38}{cpu:9.1f}{wall:9.1f}"
        if variant.base:
            if variant.base in times:
                line += "{:11.2f}{:12.2f}".format(*ratios(mine, times[variant.base]))
            else:
                line += f"{'-':>11}{'-':>12}"
            line += "{:8.2f}{:10.2f}".format(*floors(variant, counted, limits))
        if variant.is_measured_for_memory:
            peaks[variant.title] = peak = peak_bytes(runs[variant.title], resident, device)
            line = f"{line:89}{peak / 2**20:9.0f}"
            if variant.base in peaks:
                line += f"{peak / peaks[variant.base]:7.2f}"
        yield line


def _fits(run: Run) -> bool:
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def floors(variant: Variant, counted: Work, limits: Ceilings) -> tuple[float, float]:
    """Return a variant's floor in multiplications, and in time by the ceilings."""
    if variant.base == FORWARD:
        return 1.0, 1.0
    norm, k = variant.norm, variant.k
    return counted.ratio(norm, k), counted.ratio(norm, k, limits)


def prepare(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Run]]:
    """Return the largest relative error of the norms, checked, and what is timed by its title."""
    watched = WatchedModel(model, outputs, probe=True)
    watched.want([""], head=False)
    watched.verify(batch)
    passes, names = watched.passes, watched.names("")
    error = compare_with_autograd(passes, batch)
    norms: dict[str, tuple[frozenset[str], Readout]] = {"sq_norm": (names, sq_norm)}
    sketch: dict[str, tuple[frozenset[str], Readout]] = {
        "sketch": (names, TwoSidedSketch(0, (K, K)))
    }
    needs = [
        Needs(input_grad=True),
        Needs(statistics=True),
        Needs(sketch, statistics=True),
        Needs(norms, statistics=True),
        Needs(norms | sketch, statistics=True),
    ]

    def forward() -> None:
        with torch.no_grad():
            plain_loss(model, batch)

    def backward() -> None:
        plain_loss(model, batch).backward()
        model.zero_grad(set_to_none=True)

    scoring = [lambda need=need: passes.run(batch, need) for need in needs]
    return error, dict(zip((v.title for v in VARIANTS), [forward, backward, *scoring], strict=True))


if __name__ == "__main__":
    main()
