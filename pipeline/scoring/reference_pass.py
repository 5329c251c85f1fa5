"""The references' losses of batches, and the weights of an expert.

Shapes: B rows of a batch, R references of one kind.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from curate.pipeline.models.checkpoint import Checkpoint, load_model
from curate.pipeline.models.weights import weight_files
from curate.pipeline.scoring.reference_task import JointTask, batch_of, own_tasks
from curate.pipeline.scoring.work import Work, model_signals
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.tasks.task import Task
from curate.scorers.engine import Engine
from curate.scorers.prepared import named_parameters
from curate.scorers.protocol import EXPERT_KINDS, Batch, Signal

RESIDENT_BYTES = 1 << 30
"""All references stay on the device below this; in the host's memory below CACHED_BYTES."""
CACHED_BYTES = 8 << 30
LOSS, PLAIN, NULL = Signal("loss"), Signal("reference_loss"), Signal("null_loss")

Losses = dict[Signal, Float[Tensor, "b r"]]
Guard = Callable[[Callable[[], Tensor]], Tensor | Exception]
"""Calls what it is given, and returns what that raises where it is the batch's fault."""


def joint_task(work: Work) -> Task:
    """Return the run's task, which also reads rows as the references do where they differ."""
    task = task_from_description(dict(work.task), work.corpus)
    others = own_tasks(work.task, work.reference, work.corpus)
    return JointTask(task, others, work.reference) if others else task


class ReferencePass:
    """Takes the losses that scorers compare with: one forward pass per reference and batch.

    A reference of empty inputs is run on one row of each label, once: all rows with that label have
    the same input and so the same loss there.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.seconds = 0.0
        kinds = {s.kind for s in model_signals(work.made)}
        self.wanted = {signal for signal in (PLAIN, NULL) if signal.kind in kinds}
        signals = enumerate(NULL if c.null_input else PLAIN for c in work.reference)
        self._of = {i: signal for i, signal in signals if signal in self.wanted}
        tasks = own_tasks(work.task, work.reference, work.corpus)
        shared = task_from_description(dict(work.task), work.corpus) if self._of else None
        self._tasks = {i: tasks.get(i, shared) for i in self._of}
        size = sum(_bytes(work.reference[i]) for i in self._of)
        self._keeps, self._stays = size <= CACHED_BYTES, size <= RESIDENT_BYTES
        self._engines: dict[int, Engine] = {}
        self._null: dict[int, dict[int, float]] = {i: {} for i in self._of}
        self.expert: ExpertWeights | None = None
        if kinds & EXPERT_KINDS:
            self.expert = ExpertWeights(next(c for c in work.reference if not c.null_input))

    def verify(self, batch: Batch) -> None:
        """Run every reference on these rows.

        Raises:
            ValueError: a reference does not suit the task; the message names it.
        """
        for i in self._of:
            path = self.work.reference[i].path
            try:
                loss = self._loss(i, self._at(i), batch)
            except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
                said = " ".join(str(error).split())[:300]
                raise ValueError(f"the reference {path} cannot score the rows: {said}") from error
            finally:
                self._leave(i)
            assert loss.shape == (batch.rows,), "the engine gives one loss per row"

    def operations(self, batch: Batch) -> float:
        """Return the operations of a row's forward passes at all references."""
        with FlopCounterMode(display=False) as counter:
            self.verify(batch.to(self.device))
        return float(counter.get_total_flops()) / batch.rows

    def __call__(
        self, batches: Sequence[Batch | Exception], begin: Callable[[int], None], guard: Guard
    ) -> list[Losses | Exception]:
        """Return each batch's losses at the references, [B, R] by kind, or what it raised.

        `begin(i)` is called before batch i reaches a model.
        """
        started = time.monotonic()
        columns: list[dict[Signal, list[Tensor]] | Exception] = [
            b if isinstance(b, Exception) else {s: [] for s in self.wanted} for b in batches
        ]
        for i, signal in self._of.items():
            engine = self._at(i)
            for b, batch in enumerate(batches):
                so_far = columns[b]
                if isinstance(batch, Exception) or isinstance(so_far, Exception):
                    continue
                begin(b)
                loss = guard(partial(self._loss, i, engine, batch))
                if isinstance(loss, Exception):
                    columns[b] = loss
                else:
                    so_far[signal].append(loss)
            self._leave(i)
        self.seconds += time.monotonic() - started
        return [
            c if isinstance(c, Exception) else {s: torch.stack(v, 1) for s, v in c.items()}
            for c in columns
        ]

    def _loss(self, i: int, engine: Engine, batch: Batch) -> Float[Tensor, " b"]:
        own = batch_of(batch, i)
        if self.work.reference[i].null_input:
            return self._null_loss(i, engine, own)
        return engine(own)[LOSS]

    def _null_loss(self, i: int, engine: Engine, batch: Batch) -> Float[Tensor, " b"]:
        task, known = self._tasks[i], self._null[i]
        assert task is not None, "made for it"
        if batch.targets.dim() != 1 or batch.row_ids is not None:
            return engine(task.blank(batch))[LOSS]
        labels = batch.targets.tolist()
        for label in dict.fromkeys(labels):
            if label not in known:
                # Alone, so that its bits do not depend on the rows it happens to stand with.
                one = task.blank(batch.select_rows([labels.index(label)]))
                known[label] = float(engine(one)[LOSS])
        return torch.tensor([known[label] for label in labels], device=batch.targets.device)

    def _at(self, i: int) -> Engine:
        """Return the reference's engine, its model on the device."""
        if i in self._engines:
            self._engines[i].model.to(self.device)
            return self._engines[i]
        task, model = self._tasks[i], load_model(self.work.reference[i]).to(self.device)
        assert task is not None, "made for it"
        engine = Engine(model, task.outputs, {LOSS}, probe=False)
        if self._keeps:
            self._engines[i] = engine
        return engine

    def _leave(self, i: int) -> None:
        """Make room for the next reference where all together take too much."""
        if not self._stays and i in self._engines:
            self._engines[i].model.to("cpu")


class ExpertWeights:
    """A reference's parameters by name, on the CPU; read when they are first asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._held: dict[str, Tensor] = {}
        self._asked: frozenset[str] = frozenset()

    def __call__(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """Return those of these parameters that the reference has."""
        if not self._asked >= frozenset(names):
            self._asked |= frozenset(names)
            own = named_parameters(load_model(self.checkpoint))
            self._held = {n: own[n].detach().clone() for n in self._asked if n in own}
        return {n: self._held[n] for n in names if n in self._held}


def _bytes(reference: Checkpoint) -> int:
    return sum(file.stat().st_size for file in weight_files(Path(reference.path)))
