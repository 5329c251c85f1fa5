"""Ours and the peers on the same model, batch, dtype and threads, in turns, in one run.

The peers live in an environment of their own, which this makes:

    python3.11 -m venv PEERS && PEERS/bin/pip install torch==2.13.0
    PEERS/bin/pip install -r benchmarks/peers/requirements.txt
    PEERS/bin/pip uninstall -y torchvision torchaudio     where torch is a build for the CPU: theirs
                                                          are not, and break what imports them

    python benchmarks/peers.py --python PEERS/bin/python                 a small GPT-2 on a CPU
    python benchmarks/peers.py --python PEERS/bin/python --width 768 --device cuda
    python benchmarks/peers.py --python PEERS/bin/python --case sketch --rounds 3 --output FILE

Every driver (benchmarks/peers/) is a process that stays; they are asked one after another, round
after round. First each result is compared with float64 autograd, one row at a time: norms by their
largest relative error, sketches by how far their inner products are from those of the gradients
(Frobenius norm of the difference of the Gram matrices, relative, at the best common scale, since
peers scale as they like). A run whose norms are off by more than 1e-3 (3e-2 in 16 bits) is shown
without a time. Times are those of a call on the whole batch, medians, the first not among them; a
call of over 10 s is timed once, and one of over 60 s made once. `ratio` is the CPU seconds over
ours, on a GPU the clock's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

DRIVERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(1, str(DRIVERS))

import torch  # noqa: E402
from oracle import Truth, ekfac, error_of, truths  # noqa: E402
from session import ALL, EKFAC, ONE_SIDED, TOGETHER, TWO_SIDED  # noqa: E402
from subject import Subject  # noqa: E402
from timing import machine  # noqa: E402

SLOW_S, ONCE_S = 10.0, 60.0
OURS = "curate"


@dataclass
class Entry:
    """What one run has answered."""

    case: str
    who: str
    times: list[tuple[float, float]] = field(default_factory=list)
    """(cpu, wall) seconds of each call."""
    error: float = float("nan")
    fault: str = ""

    @property
    def cpu(self) -> float:
        return median(cpu for cpu, _ in self.times)

    @property
    def wall(self) -> float:
        return median(wall for _, wall in self.times)


class Driver:
    """A driver's process, asked over its standard input; it answers over a pipe of its own."""

    def __init__(self, python: str, path: Path, folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / f"{path.stem}.log"
        reading, writing = os.pipe()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(path), str(folder), str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                cwd=folder,
                pass_fds=[writing],
            )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def ask(self, **question: str) -> dict[str, Any]:
        """Return the answer; a process that died answers with the end of its log."""
        assert self._process.stdin is not None, "it is a pipe"
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self.log.read_text().strip().splitlines()[-1:]
            return {"error": f"died: {' '.join(last)}", "runs": []}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="of the peers' environment; without it, ours alone")
    parser.add_argument("--peer", action="append", help="part of a driver's name; default: all")
    parser.add_argument("--case", action="append", help="part of a case's name; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    for size in fields(Subject):
        parser.add_argument(
            f"--{size.name.replace('_', '-')}", type=size.type, default=size.default
        )
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    subject = Subject(**{size.name: getattr(args, size.name) for size in fields(Subject)})
    with tempfile.TemporaryDirectory() as name, drivers(subject, Path(name), args) as runs:
        device = torch.device(subject.device)
        torch.set_num_threads(subject.threads)
        lines = [machine(device, subject.threads), f"{subject}"]
        print("\n".join(lines), flush=True)
        truth = truths(subject, Path(name))
        every: list[Entry] = []
        for case in dict.fromkeys(case for case, _ in runs):
            if not any(part in case for part in args.case or [""]):
                continue
            asked = {who: driver for (of, who), driver in runs.items() if of == case}
            if case == EKFAC:  # ours is made with the factors that the peer fits
                asked = dict(reversed(asked.items()))
            entries = measured(case, asked, truth, subject, args.rounds)
            every += entries
            lines += (new := ["", *table(entries, subject)])
            print("\n".join(new), flush=True)
        lines += (new := ["", *sums(every)])
        print("\n".join(new))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


@contextmanager
def drivers(
    subject: Subject, folder: Path, args: argparse.Namespace
) -> Iterator[dict[tuple[str, str], Driver]]:
    """Write the subject, start the drivers, and yield who answers which run."""
    subject.write(folder)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(subject.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins would count as CPU seconds
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    paths = [DRIVERS / "curate_driver.py"]
    if args.python:
        found = sorted(DRIVERS.glob("*_driver.py"))
        paths += [p for p in found if p not in paths and _is_asked(p, args.peer)]
    with ExitStack() as stack:
        runs: dict[tuple[str, str], Driver] = {}
        for path in paths:
            # Absolute, yet not resolved: an environment's python is a link.
            python = sys.executable if path == paths[0] else os.path.abspath(args.python)
            driver = Driver(python, path, folder, environment)
            stack.callback(driver.close)
            answer = driver.ask(do="list")
            if not answer["runs"]:
                print(f"{path.stem}: {answer.get('error')}", file=sys.stderr)
            runs |= {(case, who): driver for case, who in answer["runs"]}
        yield runs


def _is_asked(path: Path, peers: Sequence[str] | None) -> bool:
    return any(part in path.stem for part in peers or [""])


def measured(
    case: str, asked: dict[str, Driver], truth: Truth, subject: Subject, rounds: int
) -> list[Entry]:
    """Return what every run of a case answered: checked once, then timed in turns."""
    entries = {who: Entry(case, who) for who in asked}
    for who, entry in entries.items():
        _check(entry, asked[who].ask(do="call", case=case, who=who), truth, subject)
    in_turn = [who for who, entry in entries.items() if not entry.fault and not entry.times]
    for _ in range(rounds):
        for who in in_turn:
            answer = asked[who].ask(do="call", case=case, who=who)
            entries[who].times.append((answer["cpu"], answer["wall"]))
        in_turn = [who for who in in_turn if entries[who].wall < SLOW_S]
        in_turn = in_turn[1:] + in_turn[:1]
    return list(entries.values())


def _check(entry: Entry, answer: dict[str, Any], truth: Truth, subject: Subject) -> None:
    if fault := answer.get("error"):
        entry.fault = fault
        return
    if entry.case == EKFAC and EKFAC not in truth.norms:  # the factors are there now
        truth.norms[EKFAC] = ekfac(subject, Path(answer["result"]).parent)
    entry.error = error_of(entry.case, torch.load(answer["result"]), truth)
    limit = 1e-3 if subject.dtype == "float32" else 3e-2
    if not entry.error <= limit and entry.case in truth.norms:
        entry.fault = f"disagrees with autograd: {entry.error:.1e}"
    if answer["wall"] > ONCE_S:
        entry.times.append((answer["cpu"], answer["wall"]))


def table(entries: Sequence[Entry], subject: Subject) -> Iterator[str]:
    """Return the lines of one case, fastest first."""
    title = entries[0].case
    yield f"{title:30}{'cpu s':>9}{'wall s':>9}{'rows/s':>9}{'ratio':>8}{'calls':>7}{'error':>10}"
    clock = _clock(subject)
    ours = [clock(e) for e in entries if e.who.startswith(OURS) and not e.fault]
    for entry in sorted(entries, key=lambda e: clock(e) if e.times else float("inf")):
        if entry.fault:
            yield f"  {entry.who:28}{entry.fault}"
            continue
        ratio = f"{clock(entry) / min(ours):8.2f}" if ours else f"{'':8}"
        yield (
            f"  {entry.who:28}{entry.cpu:9.3f}{entry.wall:9.3f}{subject.rows / entry.wall:9.1f}"
            f"{ratio}{len(entry.times):7}{entry.error:10.1e}"
        )


def _clock(subject: Subject):  # type: ignore[no-untyped-def]
    return (lambda e: e.cpu) if subject.device == "cpu" else (lambda e: e.wall)


def sums(entries: Sequence[Entry]) -> Iterator[str]:
    """Return what all scores that have a peer cost in one pass of ours, and of the peers' best."""
    best: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.times and not entry.fault:
            best[entry.case].append(entry)
    ours = best.get(TOGETHER, [])
    yield "everything at once (norms of all parameters, both sketches, EL2N, loss)"
    for name in ("cpu", "wall"):
        peers = []
        for case in (ALL, TWO_SIDED, ONE_SIDED):
            times = [getattr(e, name) for e in best[case] if not e.who.startswith(OURS)]
            if not times or not ours:
                yield f"  {name}: no peer's run of {case!r} to add up" if ours else f"  {name}: -"
                break
            peers.append(min(times))
        else:
            mine = getattr(ours[0], name)
            yield (
                f"  {name}: {mine:.3f} s, the fastest peers one after another {sum(peers):.3f} s "
                f"({' + '.join(f'{t:.3f}' for t in peers)}): {sum(peers) / mine:.1f} x"
            )


if __name__ == "__main__":
    main()
