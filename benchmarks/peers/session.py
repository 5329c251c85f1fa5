"""A driver's side of the talk with benchmarks/peers.py: one JSON object a line, question, answer.

    {"do": "list"}                              -> {"runs": [[case, who], ...]}
    {"do": "call", "case": ..., "who": ...}     -> {"cpu": s, "wall": s, "result": path}
    {"do": "call", ...}, and it failed          -> {"error": ...}

A run is made on its first call, and dropped when another case begins.
"""

import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from subject import Subject
from torch import Tensor

Call = Callable[[], Tensor]
Runs = Mapping[tuple[str, str], Callable[[], Call]]
"""By case and who: something that makes the model ready and returns what is timed."""

BLOCK, BIASED, ALL = "norms, block matrices", "norms, block layers", "norms, all parameters"
TWO_SIDED, ONE_SIDED = "sketch, two-sided", "sketch, one-sided"
EKFAC, TOGETHER = "EK-FAC self-influence", "everything at once"


def subject() -> tuple[Subject, Path]:
    """Return what the command line's folder holds, with torch set up for it."""
    folder = Path(sys.argv[1])
    found = Subject.read(folder)
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    return found, folder


def serve(runs: Runs, device: str, folder: Path) -> None:
    """Answer until the questions end."""
    answers = os.fdopen(int(sys.argv[2]), "w")  # of its own: peers print to the standard output
    made: dict[tuple[str, str], Call] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "list":
            answer: dict[str, object] = {"runs": list(runs)}
        else:
            key = question["case"], question["who"]
            made = {k: call for k, call in made.items() if k[0] == key[0]}
            try:
                if key not in made:
                    made[key] = runs[key]()
                answer = _called(
                    made[key], device, folder / f"{os.getpid()}-{list(made).index(key)}.pt"
                )
            except Exception as error:  # whatever a peer raises is its answer
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


def _called(call: Call, device: str, path: Path) -> dict[str, object]:
    cpu, wall = _cpu_seconds(device), time.perf_counter()
    result = call()
    spent = _cpu_seconds(device) - cpu, time.perf_counter() - wall
    torch.save(result.detach().float().cpu(), path)
    return {"cpu": spent[0], "wall": spent[1], "result": str(path)}


def _cpu_seconds(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
