"""Everything that decides what a training run computes, checked and with defaults filled in."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any, Literal, get_args

import torch

from curate.pipeline.manifests.loader import load_manifest
from curate.pipeline.manifests.row_source import RowSource
from curate.pipeline.reading.corpus import Corpus
from curate.pipeline.storing.storage import absolute
from curate.pipeline.training.schedule import (
    Length,
    Rate,
    SavePoint,
    Shape,
    save_points,
    training_length,
)

Optimizer = Literal["adamw", "sgd"]
Precision = Literal["float32", "bfloat16", "float16"]
Match = Literal["steps", "epochs"]

THREADS_VARIABLE = "CURATE_THREADS"
SMALL_STEP_FLOPS = 2e8
"""Forward operations of a batch below which one CPU thread is faster than several: on digits a
64-128-64-10 MLP (2 MFLOP) takes ten times longer with two threads, from their spinning."""


@dataclass(frozen=True)
class Recipe:
    """How a kind of model is usually trained; used where the user says nothing."""

    lr: float
    batch_size: int
    clip_norm: float = 0.0
    weight_decay: float = 0.01
    warmup: float = 0.05


_BUILT_IN = {
    "mlp": Recipe(lr=3e-3, batch_size=32),
    "cnn": Recipe(lr=2e-3, batch_size=128),
    "gpt": Recipe(lr=1e-3, batch_size=16, clip_norm=1.0),
}
_OWN_CODE = Recipe(lr=1e-3, batch_size=64)
_PRETRAINED = Recipe(lr=5e-5, batch_size=16, clip_norm=1.0)
_SGD_PER_ADAM = 30.0
"""What the rates above are multiplied by for SGD with Nesterov momentum."""


def recipe(model: str) -> Recipe:
    """Return the usual recipe of a model name: built in, `file.py:factory`, or a folder."""
    return _BUILT_IN.get(model) or (_OWN_CODE if ".py:" in model else _PRETRAINED)


@dataclass(frozen=True)
class TrainSettings:
    """One training configuration, whatever the seed. `task` is a task's description."""

    corpus: Corpus
    task: dict[str, Any]
    model: str
    model_args: dict[str, Any]
    manifest: str | None
    selected: int  # rows to train on; the corpus's without a manifest
    epochs: int
    steps: int | None
    match: str
    batch_size: int
    lr: int | float
    optimizer: str
    schedule: str
    warmup: int | float
    weight_decay: int | float
    clip_norm: int | float
    precision: str
    device: str
    threads: int
    save_epochs: tuple[int, ...] | None
    save_steps: tuple[int, ...] | None
    pack: bool
    records: bool
    out: str
    manifest_digest: str | None = None
    save_moments: bool = False
    save_state_s: float = 60.0
    null_input: bool = False  # every row's input is the task's empty one

    def __post_init__(self) -> None:
        for name, kinds in (
            ("optimizer", Optimizer),
            ("schedule", Shape),
            ("precision", Precision),
            ("match", Match),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; "
                    f"choose one of: {', '.join(get_args(kinds))}"
                )
        for name in ("epochs", "steps", "batch_size", "lr", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps in [0, 1), got {self.warmup}")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.save_moments and self.optimizer != "adamw":
            raise ValueError(f"moments are saved of adamw, which {self.optimizer} is not")
        if not self.selected:
            raise ValueError(f"{self.manifest or self.corpus.uri} has no rows to train on")
        _ = self.points  # refuses checkpoints beyond the end

    @property
    def length(self) -> Length:
        return training_length(
            self.selected,
            self.corpus.rows,
            batch=self.batch_size,
            epochs=self.epochs,
            steps=self.steps,
            match=self.match,
        )

    @property
    def epoch_rows(self) -> int:
        """Presentations that count as one epoch: with equal steps, the whole corpus's rows."""
        return self.corpus.rows if self.match == "steps" else self.selected

    @property
    def points(self) -> list[SavePoint]:
        return save_points(
            self.length, self.epoch_rows, epochs=self.save_epochs, steps=self.save_steps
        )

    @property
    def rate(self) -> Rate:
        return Rate(self.lr, self.schedule, self.length.steps, self.warmup)

    def mean_rate(self, step: int) -> float:
        """Return the mean rate of the steps since the save point before `step`; 0 at step 0."""
        before = max((p.step for p in self.points if p.step < step), default=0)
        rate = self.rate
        return fmean(map(rate, range(before + 1, step + 1))) if step else 0.0

    @property
    def corpus_entry(self) -> dict[str, Any]:
        """What a checkpoint says of the corpus."""
        return {
            "uri": self.corpus.uri,
            "digest": self.corpus.digest,
            "rows": self.corpus.rows,
        }

    def to_json(self) -> dict[str, Any]:
        """Return what two runs must have in common for one to go on from the other."""
        apart = {"corpus", "out", "save_state_s", "manifest"}
        if not self.save_moments:  # said only where it is so: earlier runs know nothing of it
            apart.add("save_moments")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        whole = own | {"corpus": {k: v for k, v in self.corpus_entry.items() if k != "uri"}}
        if not self.null_input:
            del whole["null_input"]  # as configurations were written before there was a choice
        plain: dict[str, Any] = json.loads(json.dumps(whole))  # lists, as they come back from disk
        return plain

    def on_manifest(self, path: str) -> "TrainSettings":
        """Return the settings for training on a manifest's rows.

        Raises:
            ValueError: the manifest is of another corpus, was changed, or keeps nothing.
        """
        manifest = load_manifest(path, self.corpus.uri)
        visits = RowSource.of_manifest(manifest, ()).plan(0, 0).length
        return replace(
            self,
            manifest=absolute(path),
            manifest_digest=manifest.digest,
            selected=visits,
        )

    def with_threads(self, batch_flops: float) -> "TrainSettings":
        """Return the settings with one thread where a step is too small to share."""
        small = self.device == "cpu" and batch_flops < SMALL_STEP_FLOPS
        return replace(self, threads=1) if small and THREADS_VARIABLE not in os.environ else self


def default_threads() -> int:
    """Return CURATE_THREADS, or what torch uses. Results depend on it in the last bits."""
    given = os.environ.get(THREADS_VARIABLE)
    if given is None:
        return torch.get_num_threads()
    if not given.isdigit() or given == "0":
        raise ValueError(f"{THREADS_VARIABLE} must be a number of threads, got {given!r}")
    return int(given)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_precision(device: str) -> str:
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def default_rate(model: str, optimizer: str) -> float:
    return recipe(model).lr * (_SGD_PER_ADAM if optimizer == "sgd" else 1.0)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `name: before -> now` for every setting that changed."""
    names = sorted({*before, *now})
    return [
        f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)
    ]
