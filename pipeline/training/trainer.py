"""One seed's training: a plain function of (settings, seed) that goes on where it was killed.

out/train.json                    what is trained
out/seed0-epoch005/               checkpoints
out/progress/seed0/state.pt       model and optimizer after some step, while the seed trains
out/progress/seed0/observations/  what training saw up to that step
out/progress/seed0/records.parquet    the seed's records: the seed is done
out/records.parquet               the records of all seeds; their progress is then removed
"""

import io
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.places import Places, placed
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.models.checkpoint import save_checkpoint
from curate.pipeline.models.models import make_model
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.causal_lm import CausalLM, Packed
from curate.pipeline.tasks.registry import task_from_description
from curate.pipeline.tasks.task import Task
from curate.pipeline.training.batch_loss import batch_loss
from curate.pipeline.training.encoded_rows import (
    BadRows,
    HeldRows,
    PickedRows,
    StreamedRows,
    trainable_rows,
)
from curate.pipeline.training.observations import ObservationLog
from curate.pipeline.training.records import Place, record_batch, recorded_seeds, write_records
from curate.pipeline.training.reproducible import reproducible, seed_all
from curate.pipeline.training.row_stream import Fed, RowStream
from curate.pipeline.training.schedule import SavePoint
from curate.pipeline.training.train_settings import TrainSettings

STATE = "state.pt"
LABEL_BUCKET_ROWS, TEXT_BUCKET_ROWS = 1 << 18, 1 << 13
"""Rows whose observations are folded at a time: a row of text has a bit per token."""

log = logging.getLogger("curate.train")

CHECK_EVERY = 50
"""Steps between looks at the loss, each of which waits for the device."""

Report = Callable[[int, float | None], None]
"""Called with the steps done and, now and then, the training loss."""


@dataclass(frozen=True)
class SeedReceipt:
    """What training one seed came to; `bad_rows` are (shard, row, reason)."""

    seed: int
    steps: int
    seconds: float
    bad_rows: tuple[tuple[int, int, str], ...] = ()


def seed_folder(out: str, seed: int) -> Folder:
    """Return where a seed keeps its progress."""
    return Folder(out).child(f"progress/seed{seed}")


def is_finished(settings: TrainSettings, seed: int) -> bool:
    """True if the seed's checkpoints and, if wanted, its records are all there."""
    out = Folder(settings.out)
    if not all(out.exists(f"{p.folder(seed)}/curate.json") for p in settings.points):
        return False
    done = seed_folder(settings.out, seed).exists("records.parquet")
    return done or not settings.records or seed in recorded_seeds(out)


@dataclass(frozen=True)
class TrainingRows:
    """The rows to train on, which seeds may share."""

    source: RowSource
    rows: HeldRows | PickedRows | StreamedRows
    bad: BadRows

    @classmethod
    def of(cls, settings: TrainSettings) -> "TrainingRows":
        """Return the rows that the settings name."""
        task = task_from_description(settings.task, settings.corpus)
        source, bad = training_source(settings, task), BadRows()
        presentations = settings.length.presentations
        return cls(source, trainable_rows(source, task, settings.device, bad, presentations), bad)


def train_seed(
    settings: TrainSettings,
    seed: int,
    report: Report | None = None,
    rows: TrainingRows | None = None,
) -> SeedReceipt:
    """Train one seed to its end and save its checkpoints and records. Runs without Ray.

    Killed and called again it goes on from the last state it saved, and ends with the same bytes.
    """
    started = time.monotonic()
    if is_finished(settings, seed):
        return SeedReceipt(seed, 0, 0.0)
    with reproducible(settings.threads, settings.device):
        training = SeedTraining(settings, seed, rows)
        resumed = training.resume()
        training.run(report or (lambda step, loss: None))
        training.write_records()
    steps = settings.length.steps - resumed
    found = training.rows.bad.reasons.items()
    bad = tuple((shard, row, why) for (shard, row), why in found)
    return SeedReceipt(seed, steps, time.monotonic() - started, bad)


class SeedTraining:
    """The state of one seed's training. Make and run it inside `reproducible`."""

    def __init__(
        self, settings: TrainSettings, seed: int, rows: TrainingRows | None = None
    ) -> None:
        self.settings, self.seed = settings, seed
        self.task: Task = task_from_description(settings.task, settings.corpus)
        self.folder = seed_folder(settings.out, seed)
        self.rows = rows or TrainingRows.of(settings)
        packing = self.task if settings.pack and isinstance(self.task, CausalLM) else None
        self.stream = RowStream(
            self.rows.source, self.rows.rows, seed, settings.length, settings.device, packing
        )
        seed_all(seed, "weights")
        self.model = make_model(settings.model, **settings.model_args).to(settings.device)
        self.optimizer = _optimizer(settings, self.model)
        self.scaler = torch.amp.GradScaler(enabled=settings.precision == "float16")
        self.step = 0
        self.log = self._observation_log() if settings.records else None
        self._losses: list[tuple[Fed, Tensor]] = []

    def resume(self) -> int:
        """Go back to the last saved state, if there is one; return its step."""
        if self.folder.exists(STATE):
            stream = io.BytesIO(self.folder.read(STATE))
            state = torch.load(stream, map_location=self.settings.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = int(state["step"])
            log.info("seed %d goes on after step %d", self.seed, self.step)
        if self.log is not None:
            self.log.rewind(self.step)
        return self.step

    def run(self, report: Report, save: bool = True) -> nn.Module:
        """Train to the end, saving checkpoints on the way; return the model in training mode."""
        points = {p.step: p for p in self.settings.points if save}
        if self.step == 0 and 0 in points:
            self._save_checkpoint(points[0])
        self.model.train()
        saved = time.monotonic()
        for fed in self.stream.batches(self.step):
            self._take_step(fed)
            self.step = fed.step
            due = fed.step in points or time.monotonic() - saved >= self.settings.save_state_s
            if due or fed.step % CHECK_EVERY == 0:
                report(self.step, self._mean_loss())
            if fed.step in points:
                self._save_checkpoint(points[fed.step])
            if due:
                self._save_state()
                saved = time.monotonic()
        return self.model

    def write_records(self) -> None:
        """Write the seed's records and drop what they were made of; the seed is then done."""
        if self.log is not None:
            batches = _records(self.seed, self.log, self.rows.source.places)
            write_records(self.folder, batches, [self.seed])
            self.log.rewind(-1)
        self.folder.delete(STATE)

    def _take_step(self, fed: Fed) -> None:
        if fed.batch is None:
            return
        settings = self.settings
        seed_all(self.seed, "step", fed.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(fed.step)
        kind = torch.device(settings.device).type
        dtype = getattr(torch, settings.precision)
        with torch.autocast(kind, dtype, enabled=dtype is not torch.float32):
            loss = self._forward(fed)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _forward(self, fed: Fed) -> Tensor:
        """Return the step's loss and note what it says of every row."""
        if isinstance(fed.batch, Packed):
            assert isinstance(self.task, CausalLM), "only documents are packed"
            loss = self.task.packed_loss(self.model, fed.batch)
            self._losses.append((fed, loss.detach().expand(len(fed.positions))))
            return loss
        assert fed.batch is not None, "a step without rows is skipped"
        batch = self.task.blank(fed.batch) if self.settings.null_input else fed.batch
        outputs = self.task.outputs(self.model, batch)
        self._losses.append((fed, outputs.loss.detach()))
        if self.log is not None:
            self.log.add(fed.step, fed.positions, outputs)
        return batch_loss(outputs, fed.batch, self.settings.task.get("row_loss", "mean"))

    def _mean_loss(self) -> float | None:
        """Return the mean loss since the last call, after making sure that all are finite."""
        if not self._losses:
            return None
        feds, losses = zip(*self._losses, strict=True)
        self._losses = []
        host = torch.cat(losses).float().cpu().numpy()
        for bad in np.flatnonzero(~np.isfinite(host))[:1]:
            ends = np.cumsum([len(f.positions) for f in feds])
            position = np.concatenate([f.positions for f in feds])[bad]
            (place,) = placed(self.rows.source.places, int(position), int(position) + 1)
            raise ValueError(
                f"training diverged at step {feds[np.searchsorted(ends, bad, 'right')].step}: the "
                f"loss of row {place.row[0]} of shard {place.shard[0]} is {host[bad]}; lower the "
                "learning rate, or look for bad numbers in that row"
            )
        return float(host.mean())

    def _save_checkpoint(self, point: SavePoint) -> None:
        settings = self.settings
        save_checkpoint(
            f"{settings.out}/{point.folder(self.seed)}",
            self.model,
            spec=settings.model,
            model_args=settings.model_args,
            task=settings.task,
            seed=self.seed,
            epoch=self._epoch(point),
            step=point.step,
            lr=settings.rate(point.step) if point.step else 0.0,
            mean_lr=settings.mean_rate(point.step),
            rows_seen=settings.length.rows_seen(point.step),
            corpus=settings.corpus_entry,
            null_input=settings.null_input,
            optimizer=self.optimizer if settings.save_moments else None,
        )

    def _epoch(self, point: SavePoint) -> int | float:
        if point.epoch is not None:
            return point.epoch
        return round(self.settings.length.rows_seen(point.step) / self.settings.epoch_rows, 6)

    def _save_state(self) -> None:
        if self.log is not None:
            self.log.flush(self.step)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        self.folder.replace(STATE, stream.getvalue())

    def _observation_log(self) -> ObservationLog:
        is_text = "tokenizer" in str(self.settings.task.get("preprocess", ""))
        bucket = TEXT_BUCKET_ROWS if is_text else LABEL_BUCKET_ROWS
        return ObservationLog(self.folder.child("observations"), bucket)


def training_source(settings: TrainSettings, task: Task) -> RowSource:
    """Return the rows to train on, with the columns that the task reads."""
    columns = task.columns(settings.corpus.schema).all
    if settings.manifest is None:
        return RowSource.of_corpus(settings.corpus, columns)
    manifest = load_manifest(settings.manifest, settings.corpus.uri)
    return RowSource.of_manifest(manifest, columns)


def _optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer; biases and norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"model {settings.model!r} has no parameters to train")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _records(seed: int, log: ObservationLog, places: Places) -> Iterator[pa.RecordBatch]:
    for rows in log.fold():
        yield record_batch(seed, _places_of(places, rows.position), rows)


def _places_of(places: Places, positions: np.ndarray) -> Place:
    """Return the shards and rows of sorted positions."""
    first, stop = int(positions[0]), int(positions[-1]) + 1
    pieces = list(placed(places, first, stop))
    shard = np.concatenate([p.shard for p in pieces])
    row = np.concatenate([p.row for p in pieces])
    return shard[positions - first], row[positions - first]
