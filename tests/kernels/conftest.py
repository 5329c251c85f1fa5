"""Kernels are tested on one thread: on small shapes two wait for one another."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from curate.kernels.launch import HAS_TRITON, IS_INTERPRETED


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once per form of a kernel: torch, and Triton, interpreted where no GPU is."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("no Triton on this platform")
    triton = "interpret" if IS_INTERPRETED else "triton"
    monkeypatch.setenv("CURATE_KERNELS", triton if request.param == "triton" else "torch")
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device on which the backend's kernels run here."""
    return torch.device("cpu" if backend == "torch" or IS_INTERPRETED else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever `torch.empty` returns with NaN, so that an element never written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
