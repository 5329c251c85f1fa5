"""Peak memory of a call: what torch's allocator has handed out at once, whoever asked for it.

On a GPU that is `torch.cuda.max_memory_allocated`, weights and batch included. On a CPU it is read
off the profiler, which sees every allocation and every release of torch's CPU allocator, scratch
within an operation included, and not what the matrix library (oneDNN, MKL) keeps for itself; what
was there before the call (weights, buffers, batch) is added.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from timing import Run
from torch import Tensor, nn


def peak_bytes(run: Run, resident: int, device: torch.device) -> int:
    """Return the peak during a call; `resident` bytes were there before (a CPU's alone are asked).

    The call is made once before, so that nothing is counted that is made once and kept.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    assert results is not None, "the profiler ran"
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    return resident + _peak(nbytes for _, nbytes in sorted(changes, key=lambda c: c[0]))


def _peak(changes: Iterable[int]) -> int:
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler prints at its start and stop off standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def resident_bytes(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Return the bytes of a model and of its batch; a tied weight counts once."""
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
