"""Signals of batches at every checkpoint: models resident, or one model whose weights are swapped.

Shapes: K checkpoints (all seeds), B rows of a batch.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from curate.pipeline.models.checkpoint import load_model, load_weights
from curate.pipeline.scoring.work import Work, model_signals
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.engine import Engine, EngineError
from curate.scorers.protocol import Batch, Signal

T = TypeVar("T")
log = logging.getLogger("curate.score")

RESIDENT_BYTES = 1 << 30
"""All checkpoints stay loaded as models below this; as plain weights below CACHED_BYTES."""
CACHED_BYTES = 8 << 30

Reading = dict[Signal, Tensor]
"""Signal -> float64 [K, B] on the CPU."""


class OutOfMemory(MemoryError):
    """A batch did not fit. It says nothing about its rows."""


class DeviceLost(RuntimeError):
    """The accelerator's context is unusable; only a new process can go on."""


class SignalPass:
    """Computes the union of what all scorers need, one forward per batch and checkpoint.

    Which checkpoints are resident decides the speed only: each batch meets the same weights.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.device = torch.device(work.device)
        self.task = task_from_description(dict(work.task), work.corpus)
        self.wanted = model_signals(work.made)
        if work.with_tokens and self.wanted:
            self.wanted |= {Signal("tokens")}
        self.engines: list[Engine] = []
        self._states: list[dict[str, Tensor]] = []
        if self.wanted:
            self._load()

    @property
    def is_resident(self) -> bool:
        """Tell whether every checkpoint has a model of its own."""
        return len(self.engines) == len(self.work.checkpoints)

    def verify(self, batch: Batch) -> None:
        """Compare the engine with autograd on these rows, at every resident checkpoint.

        Raises:
            EngineError: a parameter's gradient cannot be got right.
            ValueError: the task's outputs lack what a signal is made of.
        """
        moved = batch.to(self.device)
        for engine in self.engines:
            engine.verify(moved)
        # What the outputs lack is said now, before rows are blamed for it; one row always fits.
        self.engines[0](moved.select_rows([0]))

    def __call__(
        self, batches: Sequence[Batch], begin: Callable[[int], None]
    ) -> list[Reading | Exception]:
        """Return each batch's signals at all checkpoints, or what it raised.

        `begin(i)` is called before batch i reaches a model. A batch that raises is left out at the
        checkpoints that follow.

        Raises:
            EngineError: the engine, not the batch, is at fault.
            DeviceLost: the device needs a new process.
        """
        moved = [_guarded(partial(batch.to, self.device)) for batch in batches]
        found: list[list[dict[Signal, Tensor]] | Exception] = [
            b if isinstance(b, Exception) else [] for b in moved
        ]
        for k in range(len(self.work.checkpoints)):
            engine = self._at(k)
            for i, batch in enumerate(moved):
                so_far = found[i]
                if isinstance(so_far, Exception) or isinstance(batch, Exception):
                    continue
                begin(i)
                reading = _guarded(partial(engine, batch))
                if isinstance(reading, Exception):
                    found[i] = reading
                else:
                    so_far.append(reading)
        return self._collect(found)

    def loss(self, batch: Batch) -> Tensor:
        """Return the rows' losses at the first checkpoint, [B] on the CPU; nothing else is run."""
        self._at(0)
        with torch.no_grad():
            return self.task.outputs(self.model, batch.to(self.device)).loss.float().cpu()

    def _load(self) -> None:
        first, *rest = self.work.checkpoints
        self.model = self._model(first)
        size = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        models = [self.model]
        if size * len(self.work.checkpoints) <= RESIDENT_BYTES:
            models += [self._model(checkpoint) for checkpoint in rest]
        elif size * len(self.work.checkpoints) <= CACHED_BYTES:
            self._states = [self._weights(checkpoint) for checkpoint in self.work.checkpoints]
        self.engines = [Engine(m, self.task.outputs, self.wanted, probe=False) for m in models]
        self._loaded = 0

    def _model(self, checkpoint: object) -> nn.Module:
        return load_model(checkpoint, self.work.model).eval().to(self.device)  # type: ignore[arg-type]

    def _weights(self, checkpoint: object) -> dict[str, Tensor]:
        state = load_model(checkpoint, self.work.model).state_dict()  # type: ignore[arg-type]
        pinned = self.device.type == "cuda"
        return {n: t.pin_memory() if pinned else t for n, t in state.items()}

    def _at(self, k: int) -> Engine:
        """Return the engine with checkpoint k's weights."""
        if self.is_resident:
            return self.engines[k]
        if self._loaded != k:
            if self._states:
                self.model.load_state_dict(self._states[k])
            else:
                load_weights(self.model, self.work.checkpoints[k])
            self._loaded = k
        return self.engines[0]

    def _collect(
        self, found: list[list[dict[Signal, Tensor]] | Exception]
    ) -> list[Reading | Exception]:
        """Bring all signals to the CPU at once: one transfer per signal, not one per batch."""
        good = [f for f in found if not isinstance(f, Exception)]
        if not good:
            return [f for f in found if isinstance(f, Exception)]
        signals: dict[Signal, list[Tensor]] = {}
        for signal in self.wanted:
            columns = [torch.stack([at[signal].float() for at in batch]) for batch in good]
            sizes = [c.shape[1] for c in columns]
            together = torch.cat(columns, 1).double().cpu()
            signals[signal] = list(torch.split(together, sizes, dim=1))
        readings = iter(
            {signal: columns[j] for signal, columns in signals.items()} for j in range(len(good))
        )
        return [f if isinstance(f, Exception) else next(readings) for f in found]


def _guarded(call: Callable[[], T]) -> T | Exception:
    """Return what `call` returns or raises; faults that are not the batch's own go on up."""
    try:
        return call()
    except EngineError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return OutOfMemory(str(error).partition("\n")[0])
    except Exception as error:  # whatever a task or model raises is its row's fault until shown
        text = str(error)
        if isinstance(error, torch.AcceleratorError) or "device-side assert" in text:
            raise DeviceLost(text.partition("\n")[0]) from None
        if "can't allocate memory" in text or "not enough memory" in text:
            return OutOfMemory(text.partition("\n")[0])
        return error
