"""The benchmarks count, check and print right; what they measure is nobody's test."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curate.kernels.launch import Config

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ["engine.py", "peers.py", "kernel_speed.py", "gpu.py", "compile.py"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_are_importable() -> Iterator[None]:
    folders = [str(FOLDER), str(FOLDER / "peers")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def module(name: str) -> Any:
    """A benchmark's module, by the plain name that its neighbours use."""
    found: ModuleType = importlib.import_module(name)
    return found


def multiplications(costs: list[Any]) -> int:
    return sum(cost.multiplications for cost in costs)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "resnet"])
def test_the_floor_counts_what_torch_counts(name: str) -> None:
    """Attention as plain products and no causal discount: torch's counter knows none."""
    shapes, floor = module("shapes"), module("floor")
    torch.manual_seed(0)
    sizes = (3, 8, 16, 2, 7) if name == "resnet" else (2, 128, 9, 3, 50)
    shape = shapes.Shape(name, *sizes)
    model, batch = shape.model(CPU, torch.float32, "eager"), shape.batch(CPU, torch.float32)
    work = floor.work(model, batch, is_causal=False)
    with FlopCounterMode(display=False) as forward:
        loss = shapes.plain_loss(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert 2 * multiplications(work.forward()) == forward.get_total_flops()
    both = work.activation_backward() + work.weight_backward()
    assert 2 * multiplications(both) == backward.get_total_flops()


def test_the_floor_of_one_layer_is_worked_out_by_hand() -> None:
    """T = 5 tokens, I = 3, O = 4, k = 2: a product 60, norm min(25 x 7, 60), sketch 70 + 20."""
    floor = module("floor")
    work = floor.Work([floor.Use(0, rows=2, tokens=5, inputs=3, outputs=4)])
    assert multiplications(work.norm()) == 2 * 60
    assert multiplications(work.sketch(2)) == 2 * (5 * 7 * 2 + 5 * 4)
    assert work.ratio() == 2 / 3
    assert work.ratio(norm=True, k=2) == (60 * 3 + 90) / (60 * 3)
    few = floor.Use(0, rows=2, tokens=1, inputs=30, outputs=40)
    assert few.norm.multiplications == 2 * 70


def test_a_tied_weight_has_its_cross_term_counted_and_a_first_layer_no_backward() -> None:
    floor = module("floor")
    table = floor.Use(0, 1, 6, 8, 50, is_table=True, has_input_grad=False)
    head = floor.Use(0, 1, 6, 8, 50)
    tied = multiplications(floor.Work([table, head]).norm())
    untied = multiplications(floor.Work([table, floor.Use(1, 1, 6, 8, 50)]).norm())
    assert tied - untied == 6 * 6 * 8
    first = floor.Use(1, 1, 6, 8, 50, has_input_grad=False)
    assert multiplications(floor.Work([first]).activation_backward()) == 0


def test_a_floor_in_time_is_the_slower_of_arithmetic_and_traffic() -> None:
    ceilings = module("ceilings").Ceilings(flops=100.0, bandwidth=8.0, size=4)
    assert ceilings.seconds(50, 1) == 1.0
    assert ceilings.seconds(50, 20) == 10.0


def test_peak_memory_counts_all_that_is_held_at_once() -> None:
    """Four buffers of 1 MiB, of which two are ever held together."""
    memory = module("memory")

    def run() -> None:
        kept = torch.zeros(1 << 18)
        for _ in range(3):
            kept.add_(torch.zeros(1 << 18))

    peak = memory.peak_bytes(run, 1000, CPU)
    assert 2 << 20 <= peak - 1000 < (2 << 20) + 4096


def test_resident_bytes_count_a_tied_weight_once() -> None:
    memory = module("memory")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert memory.resident_bytes(model, [torch.zeros(3)]) == 4 * 16 + 4 * 3


def test_things_that_take_turns_are_called_equally_often_and_compared_by_round() -> None:
    timing = module("timing")
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.in_turns(runs, 0.0, CPU, least=4)
    assert calls == list("ab" + "ab" + "ba" + "ab" + "ba")
    assert [len(t) for t in times.values()] == [4, 4]
    mine, base = ([timing.Spent(c, w) for c, w in x] for x in ([(2, 9), (8, 1)], [(1, 3), (2, 1)]))
    assert timing.ratios(mine, base) == (3.0, 2.0)


def test_gram_errors_do_not_mind_the_scale_of_a_sketch() -> None:
    oracle = module("oracle")
    grads = torch.randn(5, 40, dtype=torch.float64)
    gram = grads @ grads.T
    assert oracle.gram_error(7 * gram, gram) < 1e-12
    off = gram + torch.diag(torch.full((5,), 1.0, dtype=torch.float64))
    assert 0 < oracle.gram_error(off, gram) <= float(5**0.5 / gram.norm())


def test_the_peers_table_puts_the_fastest_first_and_hides_who_disagrees() -> None:
    peers, subject = module("peers"), module("subject").Subject(rows=8)
    entries = [
        peers.Entry("norms", "slow", [(4.0, 4.0)], 1e-6),
        peers.Entry("norms", "curate", [(2.0, 1.0), (2.0, 1.0), (9.0, 9.0)], 1e-7),
        peers.Entry("norms", "wrong", fault="disagrees with autograd: 5e-01"),
    ]
    _, first, second, last = peers.table(entries, subject)
    assert first.split() == ["curate", "2.000", "1.000", "8.0", "1.00", "3", "1.0e-07"]
    assert second.split()[:5] == ["slow", "4.000", "4.000", "2.0", "2.00"]
    assert last.split(maxsplit=1) == ["wrong", "disagrees with autograd: 5e-01"]


def test_one_pass_of_ours_is_compared_with_the_sum_of_the_fastest_peers() -> None:
    peers, session = module("peers"), module("session")
    times = {session.ALL: 3.0, session.TWO_SIDED: 1.0, session.ONE_SIDED: 6.0}
    entries = [peers.Entry(case, "peer", [(t, 2 * t)], 0.0) for case, t in times.items()]
    entries += [peers.Entry(case, "slower", [(9.0, 9.0)], 0.0) for case in times]
    entries += [peers.Entry(session.ALL, "curate", [(0.1, 0.1)], 0.0)]
    entries += [peers.Entry(session.TOGETHER, "curate", [(2.0, 4.0)], 0.0)]
    _, cpu, wall = peers.sums(entries)
    assert cpu.endswith("5.0 x") and "10.000 s (3.000 + 1.000 + 6.000)" in cpu
    assert wall.endswith("4.2 x"), "the faster on the clock: 6 + 2 + 9 over 4"
    without = [e for e in entries if e.case != session.ONE_SIDED]
    assert all(
        "no peer's run of 'sketch, one-sided'" in line for line in [*peers.sums(without)][1:]
    )


def test_a_kernel_that_is_wrong_is_shown_without_a_time() -> None:
    speed, case = module("kernel_speed"), module("kernel_cases.case")

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if x.dtype == torch.float64 else 2.01 * x

    wrong = case.Case("double", "9", lambda d, t: (torch.ones(9, dtype=t),), double, double, 9, 18)
    found = speed.speed(wrong, CPU, torch.float32, 0.01)
    assert found.fault == "" and found.error == pytest.approx(5e-3, rel=1e-3)
    by_plain = case.Case(*(*vars(wrong).values(),)[:4], lambda x: 2 * x, 9, 18)
    found = speed.speed(by_plain, CPU, torch.float32, 0.01)
    assert found.fault.startswith("wrong:")
    assert "wrong:" in found.line(module("ceilings").Ceilings(1.0, 1.0, 4))


def test_a_kernel_whose_bits_change_is_wrong() -> None:
    speed, case = module("kernel_speed"), module("kernel_cases.case")
    calls = iter(range(99))

    def drift(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + next(calls) * 1e-6)

    one = case.Case("drift", "9", lambda d, t: (torch.ones(9, dtype=t),), drift, drift, 9, 18)
    assert "different bits" in speed.speed(one, CPU, torch.float32, 0.01).fault


def test_every_kernel_case_counts_what_it_does_and_has_a_name_of_its_own() -> None:
    cases = module("kernel_speed").cases()
    assert all(case.flops >= 0 and case.elements > 0 for case in cases)
    assert len({(case.op, case.shape) for case in cases}) == len(cases) > 0


def test_a_process_that_only_compiles_says_whether_a_case_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, case = module("gpu"), module("kernel_cases.case")

    def fail() -> torch.Tensor:
        raise RuntimeError("no such tile")

    good = case.Case("op", "s", lambda d, t: (), lambda: torch.ones(1), fail, 1, 1)
    bad = case.Case("op", "s", lambda d, t: (), fail, fail, 1, 1)
    monkeypatch.setattr(gpu.kernel_speed, "cases", lambda: [good, bad])
    assert [gpu.run_once(place, "cpu") for place in (0, 1)] == [False, True]


def test_kernels_after_the_deadline_are_left_out_and_said_to_be() -> None:
    speed = module("kernel_speed")
    lines = list(speed.report(speed.cases(), CPU, [torch.float32], quick=True, until=0.0))
    small = sum(case.is_small for case in speed.cases())
    assert lines[-1] == f"left out: {small} cases, the time is up"


def test_tuning_walks_to_the_fastest_neighbour_and_leaves_the_table_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuning, case = module("tuning"), module("kernel_cases.case")
    start = Config({"BLOCK_T": 32, "ROWS": 4}, 4, 2)
    table = {"key": start, "other": Config({"BLOCK_T": 16})}
    entries = [tuning.Entry("file", table, key) for key in table]

    def read() -> torch.Tensor:
        assert table["key"].options["BLOCK_T"]
        return torch.ones(3)

    one = case.Case("op", "s", lambda d, t: (), read, read, 1, 1)
    assert tuning.read_by(one, (), entries) == entries[:1]
    ideal = Config({"BLOCK_T": 128, "ROWS": 4}, 4, 3)

    def fake(run: Any, device: torch.device, seconds: float = 0.2) -> float:
        run()
        now = table["key"]
        blocks = abs(now.blocks["BLOCK_T"] - ideal.blocks["BLOCK_T"])
        return 1.0 + blocks + abs(now.num_stages - ideal.num_stages)

    monkeypatch.setattr(tuning, "milliseconds", fake)
    found = tuning.search(entries[0], one, (), torch.float32, CPU, float("inf"))
    assert found.after == (1.0, ideal) and found.before == (98.0, start)
    assert "Config({'BLOCK_T': 128, 'ROWS': 4}, 4, 3)" in str(found)
    assert table["key"] is start


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_how_they_are_used(script: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CURATE_KERNELS")}
    command = [sys.executable, FOLDER / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout or "--output" in done.stdout


# What a bare GPU machine lacks, and curate installed; given to a process before anything else.
BARE = """
import runpy, sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    names = {"ray", "datasets", "faiss", "pyarrow", "jaxtyping", "hypothesis", "pytest", "typer"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in cls.names else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
sys.path_hooks[:] = [h for h in sys.path_hooks if "__editable__" not in str(h)]
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_the_gpu_command_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """All its code on tiny shapes: no curate is installed, nor what it can do without."""
    output = tmp_path / "table.txt"
    command = [
        sys.executable,
        "-c",
        BARE,
        str(FOLDER / "gpu.py"),
        "--device",
        "cpu",
        "--only",
        "dot",
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CURATE_KERNELS")}
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = output.read_text()
    assert "wrong:" not in text and "left out: the time is up" not in text
    for part in ("kernels", "agreement", "signals", "repeats", "engine", "peers"):
        assert f"== {part} ==" in text
    assert (
        text.count("right:") >= 10
        and "grad_dot" in text
        and text.count("rounds; norms within") == 4
    )
