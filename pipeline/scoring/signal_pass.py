"""Signals of batches at every checkpoint: models resident, or one model whose weights are swapped.

Shapes: K checkpoints (all seeds), B rows of a batch, M groups of a target.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from curate.pipeline.models.adapters import is_adapter
from curate.pipeline.models.checkpoint import load_model, load_weights
from curate.pipeline.scoring.adam_targets import AdamTargets
from curate.pipeline.scoring.curvature_factors import CurvatureFactors
from curate.pipeline.scoring.reference_pass import ReferencePass, joint_task
from curate.pipeline.scoring.store_pass import Held, Stored, StorePass
from curate.pipeline.scoring.target_gradients import TargetGradients
from curate.pipeline.scoring.target_sketch import sketch_error
from curate.pipeline.scoring.text_weights import TextWeights
from curate.pipeline.scoring.windows import said
from curate.pipeline.scoring.work import Work, text_signals
from curate.pipeline.tasks.task import Task
from curate.scorers.engine import Engine, EngineError
from curate.scorers.memory import is_out_of_memory
from curate.scorers.protocol import (
    ADAM_KINDS,
    REFERENCE_KINDS,
    SPREAD_KINDS,
    TARGET_KINDS,
    VECTOR_KINDS,
    Batch,
    Signal,
)
from curate.scorers.run_state import RunState, of_one_checkpoint

T = TypeVar("T")
log = logging.getLogger("curate.score")

RESIDENT_BYTES = 1 << 30
"""All checkpoints stay loaded as models below this; as plain weights below CACHED_BYTES."""
CACHED_BYTES = 8 << 30


class Reading(dict[Signal, Tensor]):
    """Signal -> float64 [K, B] on the CPU; of a whole run, at the run's last checkpoint.

    `vectors` are what goes into stores, by their names.
    """

    vectors: Mapping[str, Stored] = MappingProxyType({})


class OutOfMemory(MemoryError):
    """A batch did not fit. It says nothing about its rows."""


class DeviceLost(RuntimeError):
    """The accelerator's context is unusable; only a new process can go on."""


class SignalPass:
    """Computes the union of what all scorers need, one forward per batch and checkpoint.

    Which checkpoints are resident decides the speed only: each batch meets the same weights.
    `keeps`: gradients of a target that are made here are kept in the run's folder.
    """

    def __init__(self, work: Work, keeps: bool = True) -> None:
        self.work = work
        self.device = torch.device(work.device)
        self.task = joint_task(work)
        self.wanted = work.signals
        if work.with_tokens and self.wanted:
            self.wanted |= {Signal("tokens")}
        self.engines: list[Engine] = []
        self._states: list[dict[str, Tensor]] = []
        self._probed: Batch | None = None
        self._may_recompute: bool | None = None
        self._spreads = sorted(s for s in self.wanted if s.kind in SPREAD_KINDS)
        self.stores = StorePass(work) if work.stores is not None else None
        self._last = {indices[-1] for indices in work.runs.values() if indices}
        self._kept_per_entry = math.inf if self._spreads else 0.0
        self.texts = TextWeights(work, keeps) if text_signals(work.made) else None
        if self.wanted:
            self._load()
        self.references = ReferencePass(work, self.device)
        self._compared: dict[int, int] = {}
        self._target: TargetGradients | None = None
        self._adam: AdamTargets | None = None
        kinds = {s.kind for s in self.wanted}
        if work.target is not None and kinds & TARGET_KINDS:
            self._target = TargetGradients(work, self.device, keeps)
        if work.target is not None and kinds & ADAM_KINDS:
            self._adam = AdamTargets(work, self.device, keeps)
        self._curvature: CurvatureFactors | None = None
        if any(s.curvature for s in self.wanted):
            self._curvature = CurvatureFactors(work, self.device, keeps)

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
        self._probed, moved = batch, self._moved(batch)
        for engine in self.engines:
            engine.verify(moved)
        self.references.verify(moved)
        asks_more = self._curvature is not None or self.references.expert is not None
        if self.work.target is not None or asks_more:
            # All now, so that a target or reference at fault stops no unit.
            for k in reversed(range(len(self.work.checkpoints))):
                self._ready(k).expert.check()
        # What the outputs lack is said now, before rows are blamed for it; one row always fits.
        one = moved.select_rows([0])
        reading = self.engines[0](one)
        self._learn_size(one, reading)
        if self.stores is not None:
            self.stores.learn(self.engines[0], reading)

    def __call__(
        self, batches: Sequence[Batch], begin: Callable[[int], None]
    ) -> list[Reading | Exception]:
        """Return each batch's signals at all checkpoints, or what it raised.

        `begin(i)` is called before batch i reaches a model. A batch that raises is left out at the
        checkpoints that follow. A row that does not fit in memory alone is tried once more with its
        activations made twice instead of kept.

        Raises:
            EngineError: the engine, not the batch, is at fault.
            DeviceLost: the device needs a new process.
        """
        moved = [_guarded(partial(self._moved, batch)) for batch in batches]
        found: list[list[dict[Signal, Tensor]] | Exception] = [
            b if isinstance(b, Exception) else [] for b in moved
        ]
        spreads = [RunState(self._spreads) for _ in batches]
        held = [Held() for _ in batches]
        for k in range(len(self.work.checkpoints)):
            engine = self._ready(k)
            for i, batch in enumerate(moved):
                so_far = found[i]
                if isinstance(so_far, Exception) or isinstance(batch, Exception):
                    continue
                begin(i)
                reading = self._reading(engine, batch)
                if not isinstance(reading, Exception):
                    self._learn_size(batch, reading)
                    reading = _guarded(partial(spreads[i].take, reading, k in self._last))
                if self.stores is not None and not isinstance(reading, Exception):
                    reading = _guarded(partial(self.stores.take, engine, k, reading, held[i]))
                if isinstance(reading, Exception):
                    found[i] = reading
                    spreads[i].clear()
                    held[i].clear()
                else:
                    so_far.append(reading)
        self._add_references(found, moved, begin)
        collected = _guarded(partial(self._collect, found))
        if isinstance(collected, Exception):
            raise collected
        for outcome, kept in zip(collected, held, strict=True):
            if not isinstance(outcome, Exception):
                outcome.vectors = kept.stored()
        return collected

    def _add_references(
        self,
        found: list[list[dict[Signal, Tensor]] | Exception],
        moved: Sequence[Batch | Exception],
        begin: Callable[[int], None],
    ) -> None:
        """Put the references' losses, which no checkpoint changes, beside the other signals."""
        if not self.references.wanted:
            return
        left = [
            f if isinstance(f, Exception) else batch for f, batch in zip(found, moved, strict=True)
        ]
        for i, losses in enumerate(self.references(left, begin, _guarded)):
            so_far = found[i]
            if isinstance(losses, Exception) or isinstance(so_far, Exception):
                found[i] = losses if isinstance(losses, Exception) else so_far
            else:
                found[i] = [at | losses for at in so_far]

    @contextmanager
    def reading(self, task: Task) -> Iterator[None]:
        """Within: batches come from another corpus, by its own task; the models stay.

        What is read from texts is not asked of it: that is for scores alone.
        """
        before = self.task, self.texts
        self.task, self.texts = task, None
        try:
            yield
        finally:
            self.task, self.texts = before

    def sketch_error(self, batch: Batch) -> float | None:
        """Return the measured error of cosines by stored sketches, at the last checkpoint."""
        if self.stores is None or (kind := self.stores.plan.kind) is None:
            return None
        engine, moved = self._ready(len(self.work.checkpoints) - 1), self._moved(batch)
        params = engine.target_params(moved, self.stores.plan.sketch["params"])
        return sketch_error(engine, moved, params, kind)

    def loss(self, batch: Batch) -> Tensor:
        """Return the rows' losses at the first checkpoint, [B] on the CPU; nothing else is run."""
        self._at(0)
        with torch.no_grad():
            return self.task.outputs(self.model, self._moved(batch)).loss.float().cpu()

    def _moved(self, batch: Batch) -> Batch:
        """Return the batch on the device; from a GPU's view on its way there."""
        if self.device.type != "cuda":
            return batch.to(self.device)

        def sent(x: Tensor) -> Tensor:
            # From pinned memory: the CPU goes on at once, and what uses the copy comes after it.
            return x.pin_memory().to(self.device, non_blocking=True)

        return replace(
            batch,
            inputs={name: sent(x) for name, x in batch.inputs.items()},
            targets=sent(batch.targets),
            row_ids=None if batch.row_ids is None else sent(batch.row_ids),
            weights=None if batch.weights is None else sent(batch.weights),
            prompt=None if batch.prompt is None else sent(batch.prompt),
        )

    def state_bytes(self, batch: Batch) -> float:
        """Return what is kept of a batch from one checkpoint to the next, on the device.

        Known from the first batch that was run; infinite before.
        """
        vectors = 0 if self.stores is None else self.stores.row_bytes() * batch.rows
        return self._kept_per_entry * _entries(batch) + vectors

    def _learn_size(self, batch: Batch, reading: Mapping[Signal, Tensor]) -> None:
        if self._spreads:
            size = RunState.size(reading) / max(1, _entries(batch))
            known = 0.0 if math.isinf(self._kept_per_entry) else self._kept_per_entry
            self._kept_per_entry = max(known, size)

    def _reading(self, engine: Engine, batch: Batch) -> dict[Signal, Tensor] | Exception:
        found = _guarded(partial(engine, batch))
        if not isinstance(found, OutOfMemory) or batch.rows > 1 or not engine.differentiates:
            return found
        if self._may_recompute is None:
            self._may_recompute = self._recomputes_right(engine)
        if not self._may_recompute:
            return found
        log.info("a row does not fit in memory; its activations are made twice instead of kept")
        with _recomputing(engine):
            return _guarded(partial(engine, batch))

    def _recomputes_right(self, engine: Engine) -> bool:
        """Tell whether the rows of the probe give the same with their activations made twice."""
        if self._probed is None:
            return True
        once = _guarded(partial(engine, self._moved(self._probed)))
        with _recomputing(engine):
            twice = _guarded(partial(engine, self._moved(self._probed)))
        if isinstance(once, Exception) or isinstance(twice, Exception):
            log.warning("activations are not made twice: %s", twice)
            return False
        # The same to the bit on a CPU; a GPU may add in another order, in half precision too.
        same = [
            torch.allclose(_size(twice[s]), _size(once[s]), rtol=1e-2, equal_nan=True) for s in once
        ]
        if not all(same):
            log.warning("activations are not made twice: the model gives other signals then")
        return all(same)

    def _load(self) -> None:
        first, *rest = self.work.checkpoints
        self.model = self._model(first)
        size = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        models = [self.model]
        if size * len(self.work.checkpoints) <= RESIDENT_BYTES:
            models += [self._model(checkpoint) for checkpoint in rest]
        elif size * len(self.work.checkpoints) <= CACHED_BYTES and not is_adapter(first.path):
            # An adapter is read again instead: small, where the base model would be held each time.
            self._states = [self._weights(checkpoint) for checkpoint in self.work.checkpoints]
        wanted = of_one_checkpoint(s for s in self.wanted if s.kind not in REFERENCE_KINDS)
        self.engines = [Engine(m, self.task.outputs, wanted, probe=False) for m in models]
        for engine in self.engines:
            if self.stores is not None:
                self.stores.ready(engine)
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
                own = self.model.state_dict()
                for name, values in self._states[k].items():
                    own[name].copy_(values, non_blocking=True)
            else:
                load_weights(self.model, self.work.checkpoints[k])
            self._loaded = k
        return self.engines[0]

    def engine_at(self, k: int) -> Engine:
        """Return the engine with checkpoint k's weights, for batches of the caller's own."""
        return self._ready(k)

    def _ready(self, k: int) -> Engine:
        """Return the engine with checkpoint k's weights and what it compares rows with there."""
        engine = self._at(k)
        if self.references.expert is not None and self._compared.get(id(engine)) != k:
            engine.expert.compare_with(self.references.expert)
            self._compared[id(engine)] = k
        if self._target is not None:
            found = _of_target(partial(self._target.at, k, engine))
            if engine.directions is not found:
                engine.directions, engine.sketch = found, self._target.sketch
        if self._adam is not None:
            engine.comparisons = _of_target(partial(self._adam.at, k, engine))
        if self._curvature is not None:
            engine.curved.curvatures = self._curvature.at(k, engine)
            self._curvature.refuse_sketches(engine.sketch)
        return engine

    def _collect(
        self, found: list[list[dict[Signal, Tensor]] | Exception]
    ) -> list[Reading | Exception]:
        """Bring everything to the CPU at once: a transfer waits for all that was launched."""
        good = [f for f in found if not isinstance(f, Exception)]
        if not good:
            return [f for f in found if isinstance(f, Exception)]
        wanted = sorted(s for s in self.wanted if s.kind not in VECTOR_KINDS)
        columns = [
            torch.stack([torch.cat([_rows_last(at[signal]) for signal in wanted]) for at in batch])
            for batch in good
        ]  # [K, signals (M of some), B] each
        shapes = [good[0][0][signal].shape[1:] for signal in wanted]
        widths = [shape.numel() for shape in shapes]
        sizes = [c.shape[2] for c in columns]
        together = torch.cat(columns, 2).cpu().double()
        readings = iter(
            Reading(
                (signal, values.mT if shape else values[:, 0])
                for signal, shape, values in zip(
                    wanted, shapes, torch.split(part, widths, dim=1), strict=True
                )
            )
            for part in torch.split(together, sizes, dim=2)
        )
        return [f if isinstance(f, Exception) else next(readings) for f in found]


def _of_target(call: Callable[[], T]) -> T:
    """Return what rows are compared with, or raise a ValueError that says why it cannot be had."""
    found = _guarded(call)
    if isinstance(found, (ValueError, OSError)):
        raise found
    if isinstance(found, Exception):
        raise ValueError(f"the target's gradients cannot be taken: {said(found)}")
    return found


def _rows_last(value: Tensor) -> Tensor:
    """Return a signal as float32 [1, B] or [M, B]."""
    return value.float()[None] if value.dim() == 1 else value.float().T


def _entries(batch: Batch) -> int:
    """Return the entries of what goes into the model first."""
    return next(iter(batch.inputs.values())).numel()


def _size(x: Tensor) -> Tensor:
    return x if x.dim() == 1 else torch.linalg.vector_norm(x.flatten(1), dim=1)


@contextmanager
def _recomputing(engine: Engine) -> Iterator[None]:
    engine.recompute = True
    try:
        yield
    finally:
        engine.recompute = False


def _guarded(call: Callable[[], T]) -> T | Exception:
    """Return what `call` returns or raises; faults that are not the batch's own go on up."""
    try:
        return call()
    except EngineError:
        raise
    except Exception as error:  # whatever a task or model raises is its row's fault until shown
        found = _judged(error)
    # Not before the error is gone: its frames hold what filled the memory.
    if isinstance(found, OutOfMemory):
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
    return found


def _judged(error: Exception) -> Exception:
    """Return the error without its frames, or what it means.

    Raises:
        DeviceLost: whatever it says, the device does not answer any more.
    """
    said = str(error).partition("\n")[0]
    if is_out_of_memory(error):
        return OutOfMemory(said)
    if isinstance(error, torch.AcceleratorError) or "device-side assert" in str(error):
        raise DeviceLost(said) from None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        try:  # a library or kernel may have its own words for a fault that has no cure
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(f"{lost}".partition("\n")[0]) from None
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
