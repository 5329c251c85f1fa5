"""The factors of a run's curvatures at each checkpoint: estimated once a run, then read.

Shapes: K checkpoints, n rows of the corpus that they are estimated from.

A worker that finds none in `curvature/` makes them and commits them; the first commit stays and all
workers read it, so that they weigh gradients by the same bits. What is asked for with different
damping shares its factors. What Adam's moments give is read from beside the checkpoint instead.
"""

import gc
import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from curate.pipeline.models.checkpoint import checkpoint_name
from curate.pipeline.models.moments import read_moments
from curate.pipeline.scoring.corpus_sample import Sampled, sampled_windows
from curate.pipeline.scoring.kept_tensors import kept_bytes, read_kept, said_of
from curate.pipeline.scoring.windows import said as reason_of
from curate.pipeline.scoring.work import Work, model_signals
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.curvature import Asked, Curvature, CurvatureRefused, CurvatureSettings
from curate.scorers.curvature_estimate import CurvatureEstimate, made_curvature
from curate.scorers.curvature_moments import MomentCurvature
from curate.scorers.engine import Engine
from curate.scorers.memory import is_out_of_memory
from curate.scorers.protocol import TARGET_KINDS
from curate.scorers.readouts import TwoSidedSketch

log = logging.getLogger("curate.score")

FOLDER = "curvature"
ENTRY = "curate.curvature"
MOST_BYTES = 4 << 30
"""What the factors of all checkpoints may take together; else those of one are held."""
TRIAL_ROWS = 64
"""Rows that factors are made from where nothing is kept, as for `--dry-run`; or that are tried,
where moments give them, to see what the model uses."""


class CurvatureFactors:
    """Gives the curvatures that the scorers ask for at a checkpoint, on the device.

    `keeps`: what is made here is committed to the run's folder.
    """

    def __init__(self, work: Work, device: torch.device, keeps: bool) -> None:
        self.work, self.device, self.keeps = work, device, keeps
        self.folder = Folder(work.out)
        self.task = task_from_description(dict(work.task), work.corpus)
        self.asked: list[Asked] = sorted(
            {(s.params, s.curvature) for s in model_signals(work.made) if s.curvature}
        )
        self._held: dict[int, Mapping[Asked, Curvature]] = {}
        self._checked: set[str] = set()
        self._refused: dict[int, str] = {}
        self._told: set[tuple[str, str]] = set()

    def at(self, k: int, engine: Engine) -> Mapping[Asked, Curvature]:
        """Return them at checkpoint k, whose weights `engine` has.

        Raises:
            ValueError: no row can be used, or nothing is covered, or it takes too much memory.
        """
        if k not in self._held:
            found, size = dict[Asked, Curvature](), 0
            made: dict[Asked, tuple[dict[str, Tensor], dict[str, Any]]] = {}
            for params, text in self.asked:
                settings = CurvatureSettings.of(text)
                shared = params, settings.undamped.text
                if shared not in made:
                    made[shared] = self._factors(k, engine, params, settings.undamped)
                    size += sum(v.numel() * v.element_size() for v in made[shared][0].values())
                found[params, text] = made_curvature(settings, *made[shared])
            if size * len(self.work.checkpoints) > MOST_BYTES:
                self._held.clear()
            self._held[k] = found
        return self._held[k]

    def refuse_sketches(self, sketch: TwoSidedSketch | None) -> None:
        """Raise ValueError where a curvature meets a target whose gradients are sketches."""
        kinds = {s.kind for s in model_signals(self.work.made) if s.curvature}
        if sketch is not None and kinds & TARGET_KINDS:
            raise ValueError(
                "influence with a curvature needs the target's gradients themselves, and they take "
                "too much memory: make fewer groups by --target-group, or limit it by params="
            )

    def _factors(
        self, k: int, engine: Engine, params: str, settings: CurvatureSettings
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if settings.from_moments:
            tensors, said = self._of_moments(k, engine, params, settings)
            return {n: v.to(self.device) for n, v in tensors.items()}, said
        name = self._name(k, params, settings)
        if not self.folder.exists(name):
            tensors, said = self._made(engine, params, settings)
            if not self.keeps:
                return {n: v.to(self.device) for n, v in tensors.items()}, said
            said |= {"run": self.work.run, "params": params, "settings": vars(settings)}
            self.folder.create(name, kept_bytes(tensors, ENTRY, said))
        whole = name not in self._checked
        tensors, said = read_kept(self.folder, name, ENTRY, self.work.run, whole)
        self._checked.add(name)
        return {n: v.to(self.device) for n, v in tensors.items()}, said

    def _name(self, k: int, params: str, settings: CurvatureSettings) -> str:
        c = self.work.checkpoints[k]
        place = checkpoint_name(c.seed, step=c.step)
        of = hashlib.sha256(f"{params}\0{settings.text}".encode()).hexdigest()[:8]
        digest = c.digest.rpartition(":")[2][:16]
        return f"{FOLDER}/{place}-{digest}-{settings.kind}-{of}.safetensors"

    # -- making

    def _made(
        self, engine: Engine, params: str, settings: CurvatureSettings
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = min(self.work.corpus.rows, settings.rows)
        rows = rows if self.keeps else min(rows, TRIAL_ROWS)
        log.info("estimating the curvature %s from %d rows", settings.kind, rows)
        estimate = CurvatureEstimate(engine, settings, params)
        return self._finished(estimate, settings, params, rows)

    def _of_moments(
        self, k: int, engine: Engine, params: str, settings: CurvatureSettings
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.work.checkpoints[k].path
        moments = read_moments(path, engine.model)
        try:
            made = MomentCurvature(engine, settings, params, moments)
            return self._finished(made, settings, params, min(self.work.corpus.rows, TRIAL_ROWS))
        except CurvatureRefused as error:
            raise CurvatureRefused(f"checkpoint {path}: {error}") from None

    def _finished(
        self,
        estimate: CurvatureEstimate | MomentCurvature,
        settings: CurvatureSettings,
        params: str,
        rows: int,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        for _ in range(estimate.stages):
            self._refused = {}
            for window in sampled_windows(self.work, self.task, rows):
                self._refused |= window.refused
                for some in self._batches(window):
                    self._add(estimate, window, some)
            if len(self._refused) == rows:
                number, reason = min(self._refused.items())
                raise ValueError(
                    f"no row of the corpus can be used for the curvature; row {number} says: "
                    f"{reason}"
                )
            estimate.end_stage()
        tensors, said = estimate.found()
        if self._refused and not settings.from_moments:
            log.warning(
                "the curvature is estimated without %d rows that cannot be scored, the first is "
                "row %d: %s", len(self._refused), *min(self._refused.items()),
            )  # fmt: skip
        told = params, settings.kind
        if said["left_out"] and told not in self._told:
            self._told.add(told)
            log.warning("curvature=%s leaves out %s", settings.kind, said["left_out"])
        return tensors, {**said, "refused": len(self._refused)}

    def _batches(self, window: Sampled) -> Iterator[Int64[np.ndarray, " n"]]:
        """Yield the places of the rows that share a batch."""
        if window.encoded is not None:
            row_bytes = window.encoded.nbytes / max(1, window.encoded.num_rows)
            yield from self.work.plan.batches(self.task.cost(window.encoded), row_bytes)

    def _add(
        self,
        estimate: CurvatureEstimate | MomentCurvature,
        window: Sampled,
        rows: Int64[np.ndarray, " n"],
    ) -> None:
        """Add these rows; those that cannot be used are found by halving, and left out."""
        assert window.encoded is not None, "there are rows"
        reason = "a value of its gradient is not finite"
        try:
            batch = self.task.collate(window.encoded.take(pa.array(rows))).to(self.device)
            if estimate.add(batch, window.numbers[rows].tolist()):
                return
        except CurvatureRefused:
            raise
        except Exception as error:  # a row's fault, or the memory's, until one is left
            if isinstance(error, torch.AcceleratorError):
                raise
            reason, is_memory = reason_of(error), is_out_of_memory(error)
            error.__traceback__ = None
            if is_memory:
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if len(rows) == 1:
            self._refused[int(window.numbers[rows[0]])] = reason
            return
        middle = len(rows) // 2
        self._add(estimate, window, rows[:middle])
        self._add(estimate, window, rows[middle:])


def curvature_notes(folder: Folder) -> dict[str, Any]:
    """Return what the run's factors were made from and leave out, by file."""
    told = ("rows", "refused", "labels", "left_out")
    found = {}
    for name in folder.names(f"{FOLDER}/"):
        said = said_of(folder, name, ENTRY)
        plain = name.removeprefix(f"{FOLDER}/").removesuffix(".safetensors")
        found[plain] = {key: said.get(key) for key in told}
    return found


def read_factors(folder: Folder, name: str, run: str) -> None:
    """Raise ValueError when a file of factors is damaged, or of another run."""
    read_kept(folder, name, ENTRY, run)
