"""Kernels are tested on one thread: on small shapes two wait for one another."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from curate.kernels.launch import HAS_TRITON, IS_INTERPRETED

T = TypeVar("T")


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


class Sanitizer:
    """What NVIDIA's compute-sanitizer finds on a GPU, found where kernels are interpreted.

    Every element that a kernel reads must lie within a tensor that it was given and must have been
    written; it is written by one program, and read by no other; nothing computed in 32 bits
    overflows; a grid is within CUDA's limits; a maximum drops NaN, as it does there. `run` also
    runs the programs in another order and demands the same bits. On a GPU it only runs twice.

    With `only_ends` the first and the last programs run alone, to see what they address.
    """

    def __init__(self) -> None:
        self.launched: set[str] = set()
        self.only_ends = False
        self._random = np.random.default_rng(0)
        self._is_shuffled = False

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call does, having it checked."""
        self._is_shuffled = False
        first = call()
        self._is_shuffled = True
        again = call()
        for a, b in zip(_tensors(first), _tensors(again), strict=True):
            assert _bits(a).equal(_bits(b)), "another order of the programs gives other bits"
        return first

    def launch(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a kernel may touch, before its first program runs."""
        self.kernel = executor.fn.__name__
        self.launched.add(self.kernel)
        grid = (*executor.grid, 1, 1)[:3]
        assert grid[0] < 1 << 31 and max(grid[1:]) < 1 << 16, f"{self.kernel}: no such grid: {grid}"
        self._grid, count = grid, int(np.prod(grid, dtype=np.int64))
        if self.only_ends:
            self._order = np.unique([n for n in (0, 1, count - 2, count - 1) if 0 <= n < count])
            executor.grid = (len(self._order), 1, 1)
        else:
            self._order = self._random.permutation(count) if self._is_shuffled else np.arange(count)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        # Of large tensors only the bounds.
        self._large = [_bounds(x) for x in given if x.numel() > LARGE]
        small = [_addresses(x) for x in given if x.numel() <= LARGE]
        self._known = np.unique(np.concatenate([*small, np.empty(0, np.uint64)]))
        self._writer = np.full(len(self._known), NOBODY)
        self._reader = np.full(len(self._known), NOBODY)

    def place(self, x: int, y: int, z: int) -> tuple[int, ...]:
        """Return which program runs in the place of another."""
        at = x if self.only_ends else (x * self._grid[1] + y) * self._grid[2] + z
        self._program = int(self._order[at])
        return tuple(int(i) for i in np.unravel_index(self._program, self._grid))

    def load(self, pointers: np.ndarray, mask: np.ndarray, found: np.ndarray) -> None:
        at = self._places(pointers, mask, "reads")
        values = found[np.broadcast_to(mask, found.shape).astype(bool)]
        is_written = self.only_ends or not np.any(_is_poison(values))
        self._demand(is_written, "reads what nobody wrote")
        self._demand(
            bool(np.isin(self._writer[at], (NOBODY, self._program)).all()),
            "reads what another program writes",
        )
        others = ~np.isin(self._reader[at], (NOBODY, self._program))
        self._reader[at] = np.where(others, MANY, self._program)

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        at = self._places(pointers, mask, "writes")
        self._demand(len(np.unique(at)) == len(at), "writes an element twice at once")
        for users, does in ((self._writer, "writes"), (self._reader, "reads")):
            alone = bool(np.isin(users[at], (NOBODY, self._program)).all())
            self._demand(alone, f"writes what another program {does}")
        self._writer[at] = self._program

    def in_32_bits(self, wide: np.ndarray) -> None:
        self._demand(not np.any(wide != wide.astype(np.int32)), "overflows 32 bits")

    def _places(self, pointers: np.ndarray, mask: np.ndarray, does: str) -> np.ndarray:
        asked = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if len(self._known) == 0:
            at, is_known = np.empty(0, np.int64), np.zeros(len(asked), bool)
        else:
            at = np.minimum(np.searchsorted(self._known, asked), len(self._known) - 1)
            is_known = self._known[at] == asked
            at = at[is_known]
        is_large = np.zeros(len(asked), bool)
        for first, last in self._large:
            is_large |= (asked >= first) & (asked <= last)
        self._demand(bool((is_known | is_large).all()), f"{does} beyond its tensors")
        return at

    def _demand(self, holds: bool, fault: str) -> None:
        assert holds, f"{self.kernel}: program {self._program} of {self._grid} {fault}"


NOBODY, MANY = -1, -2
LARGE = 1 << 21


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [x for part in found or () for x in _tensors(part)]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def _addresses(x: torch.Tensor) -> np.ndarray:
    """Return the address of every element."""
    if x.numel() == 0:
        return np.empty(0, np.uint64)
    at = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        at = (at[:, None] + np.arange(size) * stride).reshape(-1)
        at = np.unique(at) if stride == 0 else at
    return (x.data_ptr() + at * x.element_size()).astype(np.uint64)


def _bounds(x: torch.Tensor) -> tuple[np.uint64, np.uint64]:
    """Return the addresses of the first and of the last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return np.uint64(x.data_ptr()), np.uint64(x.data_ptr() + last * x.element_size())


def _poison(x: torch.Tensor) -> torch.Tensor:
    """Fill a float tensor with a NaN that no arithmetic makes."""
    if x.is_floating_point() and x.numel() <= LARGE:
        x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).fill_(-1)
    return x


def _is_poison(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return values.view(f"i{values.dtype.itemsize}") == -1
    # The interpreter holds bfloat16 as 16 bits without a sign.
    return values == 0xFFFF if values.dtype == np.uint16 else np.zeros(values.shape, bool)


@pytest.fixture
def sanitized(monkeypatch: pytest.MonkeyPatch) -> Sanitizer:
    """Check every access to memory of the kernels that a test runs."""
    sanitizer = Sanitizer()
    if not HAS_TRITON:
        pytest.skip("no Triton on this platform")
    monkeypatch.setenv("CURATE_KERNELS", "interpret" if IS_INTERPRETED else "triton")
    if not IS_INTERPRETED:
        return sanitizer
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        poisoned = lambda *args, make=make, **kwargs: _poison(make(*args, **kwargs))  # noqa: E731
        monkeypatch.setattr(owner, name, poisoned)
    _watch(sanitizer, monkeypatch)
    return sanitizer


def _watch(sanitizer: Sanitizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the sanitizer of everything that the interpreter does."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def around(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    def launches(run: Any) -> Any:
        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            sanitizer.launch(self, args, kwargs)
            run(self, *args, **kwargs)

        return launch

    def loads(load: Any) -> Any:
        def checked(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            # Not yet read: beyond its tensors, that may end the process.
            sanitizer._places(pointers.data, mask.data, "reads")
            found = load(self, pointers, mask, other, *rest)
            sanitizer.load(pointers.data, mask.data, found.data)
            return found

        return checked

    def stores(store: Any) -> Any:
        def checked(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            sanitizer.store(pointers.data, mask.data)
            return store(self, pointers, value, mask, *rest)

        return checked

    def calculates(op: Any) -> Any:
        def make(calculate: Any) -> Any:
            def checked(self: Any, x: Any, y: Any) -> Any:
                if x.dtype.scalar == interpreter.tl.int32:
                    sanitizer.in_32_bits(op(x.data.astype(np.int64), y.data.astype(np.int64)))
                return calculate(self, x, y)

            return checked

        return make

    def casts(cast: Any) -> Any:
        def checked(self: Any, x: Any, to: Any, is_signed: bool) -> Any:
            if x.dtype.scalar == interpreter.tl.int64 and to.scalar == interpreter.tl.int32:
                sanitizer.in_32_bits(x.data)
            return cast(self, x, to, is_signed)

        return checked

    def orders(_: Any) -> Any:
        return lambda self, x, y, z: setattr(self, "grid_idx", sanitizer.place(x, y, z))

    def drops_nan(op: Any) -> Any:
        return lambda _: lambda self, x, y: self.binary_op(x, y, op)

    around(executor, "__call__", launches)
    around(builder, "set_grid_idx", orders)
    around(builder, "create_masked_load", loads)
    around(builder, "create_masked_store", stores)
    around(builder, "create_int_cast", casts)
    for name, op in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        around(builder, f"create_{name}", calculates(op))
    for name, op in {"max": np.fmax, "min": np.fmin}.items():
        around(builder, f"create_{name}numf", drops_nan(op))
