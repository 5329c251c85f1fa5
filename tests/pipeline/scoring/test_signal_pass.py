"""What a batch raises, told apart: the row's fault, too little memory, a lost device."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from curate.pipeline.scoring import signal_pass
from curate.pipeline.scoring.score import score
from curate.pipeline.scoring.score_table import ScoreTable, read_receipt
from curate.pipeline.scoring.signal_pass import DeviceLost, OutOfMemory
from curate.scorers.engine import Engine
from curate.scorers.protocol import Signal

Make = Callable[..., str]
LONG = 99.0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(corpus: str, checkpoints: str, out: Path) -> ScoreTable:
    table = score(
        corpus, checkpoints=checkpoints, scorers="loss,grand", out=str(out), progress=False,
        batch_rows=8,
    )  # fmt: skip
    assert isinstance(table, ScoreTable)
    return table


def whole(table: ScoreTable) -> pa.Table:
    return pa.Table.from_batches(list(table.scan()), table.schema)


def _forgetful(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[Engine], bool], spoilt: bool = False
) -> list[int]:
    """Let batches with a long row run out of memory unless they fit; note the rows of tries."""
    call, tried = Engine.__call__, list[int]()

    def short(self: Engine, batch: Any) -> Any:
        if (batch.inputs["x"][:, 0] == LONG).any():
            tried.append(batch.rows)
            if not fits(self):
                raise torch.OutOfMemoryError("CUDA out of memory")
        found = call(self, batch)
        if spoilt and self.recompute:
            found = {signal: value + 1 for signal, value in found.items()}
        return found

    monkeypatch.setattr(Engine, "__call__", short)
    return tried


def test_a_row_that_does_not_fit_is_tried_again_with_its_activations_made_twice(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, checkpoints = make_points([24], first={13: LONG}), points_checkpoints(steps=(1, 4))
    usual = whole(run(corpus, checkpoints, tmp_path / "a"))
    tried = _forgetful(monkeypatch, lambda engine: engine.recompute)
    table = run(corpus, checkpoints, tmp_path / "b")
    found = whole(table)
    assert found["error"].null_count == 24
    for name in ("loss", "grand"):
        np.testing.assert_allclose(found[name], usual[name], rtol=1e-5)
    # Halved down to the row, which is then run again at each of the two checkpoints.
    assert tried == [8, 4, 2, 1, 1, 1, 1]
    assert [rows for _, rows in read_receipt(table.folder, 0)["splits"]] == [8, 4, 2]


def test_a_row_that_never_fits_gets_its_error(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, checkpoints = make_points([24], first={13: LONG}), points_checkpoints()
    tried = _forgetful(monkeypatch, lambda engine: False)
    found = whole(run(corpus, checkpoints, tmp_path / "s"))
    errors = {i: e for i, e in enumerate(found["error"].to_pylist()) if e is not None}
    assert errors == {13: "the row alone does not fit in memory"}
    assert tried == [8, 4, 2, 1, 1]


def test_nothing_is_made_twice_where_that_changes_the_signals(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the probe tell before any score is made so."""
    corpus, checkpoints = make_points([24], first={13: LONG}), points_checkpoints()
    _forgetful(monkeypatch, lambda engine: engine.recompute, spoilt=True)
    found = whole(run(corpus, checkpoints, tmp_path / "s"))
    assert found["error"].to_pylist()[13] == "the row alone does not fit in memory"
    assert found["error"].null_count == 23


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("no memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=["allocator", "python", "cpu", "cublas", "runtime"],
)  # fmt: skip
def test_the_many_ways_to_say_that_memory_ran_out(error: Exception) -> None:
    def fails() -> None:
        raise error

    assert isinstance(signal_pass._guarded(fails), OutOfMemory)


def test_an_error_kept_for_its_row_keeps_no_tensors() -> None:
    """Up to a group of batches may fail before the first is settled."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        activations = torch.zeros(3)
        kept.append(weakref.ref(activations))
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("the row is bad") from inner

    found = signal_pass._guarded(fails)
    gc.collect()
    assert isinstance(found, ValueError) and str(found) == "the row is bad"
    assert kept[0]() is None


def test_a_device_that_does_not_answer_is_lost_whatever_the_error_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    def broken() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nhint")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert isinstance(signal_pass._guarded(fails), RuntimeError)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match=r"illegal memory access was encountered$"):
        signal_pass._guarded(fails)


def test_signals_come_back_in_one_transfer(
    make_points: Make, points_checkpoints: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each would wait for all that was launched before it."""
    transfers = 0
    cpu = torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        nonlocal transfers
        transfers += 1
        return cpu(self)

    corpus, checkpoints = make_points([32]), points_checkpoints(steps=(1, 4, 9))
    seen: list[tuple[int, set[Signal]]] = []
    collect = signal_pass.SignalPass._collect

    def collected(self: signal_pass.SignalPass, found: Any) -> Any:
        before = transfers
        out = collect(self, found)
        seen.append((transfers - before, set(out[0])))
        assert all(v.shape[0] == 3 and v.dtype == torch.float64 for v in out[0].values())
        return out

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    monkeypatch.setattr(signal_pass.SignalPass, "_collect", collected)
    run(corpus, checkpoints, tmp_path / "s")
    assert seen == [(1, {Signal("loss"), Signal("grad_sq_norm")})]
