"""Random state and thread count that belong to one computation and leave the caller's alone."""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.utils.deterministic as deterministic


@contextmanager
def reproducible(threads: int, device: str) -> Iterator[None]:
    """Run with `threads` CPU threads, deterministic algorithms and a random state of its own.

    On the same device model, versions and thread count the same seeds then give the same bytes.
    An operation that has no deterministic form on a GPU warns instead of failing.
    """
    threads_before = torch.get_num_threads()
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    devices = [torch.device(device)] if device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(devices):
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_all(*words: int | str) -> None:
    """Set Python's, NumPy's and torch's random state to a function of the words.

    Done before every step, so that there is no random state to save: dropout in step 7 depends on
    the seed and on 7, not on what happened before.
    """
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[8:12]))
    # torch.manual_seed would queue calls with stack traces for devices that are not in use: 0.3 ms.
    number = int.from_bytes(digest[:8]) >> 1
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
