"""The mean gradients of a target's groups at each checkpoint: made once a run, then read.

Shapes: K checkpoints, M groups.

A worker that finds none in `target/` makes them and commits them; the first commit stays and all
workers read it, so that they compare rows with the same bits.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from curate.pipeline.models.checkpoint import checkpoint_name
from curate.pipeline.scoring.kept_tensors import kept_bytes, read_kept, said_of
from curate.pipeline.scoring.target_sketch import SKETCH, sketch_error
from curate.pipeline.scoring.windows import encode_rows
from curate.pipeline.scoring.work import Work
from curate.pipeline.storing.storage import Folder
from curate.pipeline.tasks.registry import task_from_description
from curate.scorers.engine import Engine
from curate.scorers.memory import is_out_of_memory
from curate.scorers.protocol import Batch
from curate.scorers.readouts import TwoSidedSketch

log = logging.getLogger("curate.score")

FOLDER = "target"
ENTRY = "curate.target"
MOST_BYTES = 4 << 30
"""What the groups' gradients at one checkpoint may take; those of all are kept on the device if
they fit in it together."""

Directions = dict[str, Tensor]
"""Parameter -> [M, *its shape], or [M, kk] where they are sketches."""


class TargetGradients:
    """Gives the mean gradients of the target's groups at a checkpoint, on the device.

    `keeps`: what is made here is committed to the run's folder. Where the gradients would take
    more than MOST_BYTES they are sketches of the kind `sketch`, else that is None; known from the
    first that are given.
    """

    def __init__(self, work: Work, device: torch.device, keeps: bool) -> None:
        assert work.target is not None, "made where there is a target"
        self.work, self.target, self.device, self.keeps = work, work.target, device, keeps
        self.folder = Folder(work.out)
        self.task = task_from_description(dict(work.task), self.target.corpus)
        self._held: dict[int, Directions] = {}
        self._checked: set[str] = set()
        self.sketch: TwoSidedSketch | None = None
        self._error: float | None = None

    def at(self, k: int, engine: Engine) -> Directions:
        """Return them at checkpoint k, whose weights `engine` has.

        Raises:
            ValueError: the target cannot be used, or its gradients take too much memory.
        """
        if k not in self._held:
            found = self._found(k, engine)
            size = sum(v.numel() * v.element_size() for v in found.values())
            if size * len(self.work.checkpoints) > MOST_BYTES:
                self._held.clear()
            self._held[k] = found
        return self._held[k]

    def _found(self, k: int, engine: Engine) -> Directions:
        name = self._name(k)
        if not self.folder.exists(name):
            made = self._made(engine)
            if not self.keeps:
                return made
            self.folder.create(name, self._bytes(made))
        return self._read(name)

    def _name(self, k: int) -> str:
        c = self.work.checkpoints[k]
        place = checkpoint_name(c.seed, step=c.step)
        return f"{FOLDER}/{place}-{c.digest.rpartition(':')[2][:16]}.safetensors"

    # -- making

    def _made(self, engine: Engine) -> Directions:
        sums: Directions = {}
        for batch, group, names in self._batches():
            moved = batch.to(self.device)
            if not sums:
                sums = self._start(engine, moved)
            self._add(engine, moved, names, {name: v[group] for name, v in sums.items()})
        for m, count in enumerate(self.target.counts):
            for v in sums.values():
                v[m] /= count
        return sums

    def _start(self, engine: Engine, batch: Batch) -> Directions:
        """Return zeros to add to, having chosen between gradients and sketches of them."""
        params, groups = self._params(engine, batch), len(self.target.groups)
        shapes = {name: p.shape for name, p in params.items()}
        size = groups * sum(p.numel() for p in params.values()) * 4
        self.sketch = self._error = None
        if size > MOST_BYTES:
            kk = SKETCH.k[0] * SKETCH.k[1]
            shapes = {name: torch.Size([kk]) for name in params}
            if groups * len(params) * kk * 4 > MOST_BYTES:
                raise ValueError(
                    f"the target's gradients take {size / 2**30:.1f} GiB ({groups} groups), and "
                    f"sketches of them too much still: make fewer groups by --target-group"
                )
            self.sketch = SKETCH
            self._error = sketch_error(engine, batch, params, SKETCH)
            log.warning(
                "the target's gradients would take %.1f GiB: similarities are estimated by "
                "sketches of %d x %d per parameter; cosines of target rows are off by %.4f (root "
                "mean square)",
                size / 2**30, *SKETCH.k, self._error,
            )  # fmt: skip
        return {
            name: torch.zeros(groups, *shapes[name], dtype=_sum_dtype(p), device=p.device)
            for name, p in params.items()
        }

    def _params(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Return the parameters whose gradients are compared."""
        return engine.target_params(batch)

    def _batches(self) -> Iterator[tuple[Batch, int, list[str]]]:
        """Yield batches of one group each, their group, and what to call their rows."""
        plan = self.work.plan
        for encoded, groups, names in self._windows():
            row_bytes = encoded.nbytes / max(1, encoded.num_rows)
            for group in np.unique(groups):
                of_group = np.flatnonzero(groups == group)
                costs = self.task.cost(encoded.take(pa.array(of_group)))
                for some in plan.batches(costs, row_bytes):
                    rows = of_group[some]
                    yield self._collated(encoded, rows, names), int(group), [names[r] for r in rows]

    def _collated(self, encoded: pa.Table, rows: np.ndarray, names: Sequence[str]) -> Batch:
        try:
            return self.task.collate(encoded.take(pa.array(rows)))
        except ValueError as error:
            if len(rows) == 1:
                name = names[rows[0]]
                raise ValueError(f"{name} in the target cannot be used: {error}") from None
            for row in rows:  # the first at fault says so
                self._collated(encoded, row[None], names)
            raise

    def _windows(self) -> Iterator[tuple[pa.Table, Int64[np.ndarray, " n"], list[str]]]:
        """Yield rows as the task encodes them, the group of each, and what to call each."""
        corpus, column = self.target.corpus, self.target.column
        columns = [*self.task.columns(corpus.schema).all, *([column] if column else [])]
        columns = list(dict.fromkeys(columns))
        for shard, path in enumerate(s.path for s in corpus.shards):
            start = 0
            for read in corpus.read(shard, columns=columns, batch_rows=self.work.plan.window_rows):
                rows = pa.Table.from_batches([read])
                names = [f"row {start + i} of {path}" for i in range(rows.num_rows)]
                encoded, _, errors = encode_rows(self.task.encode, rows)
                for row, reason in sorted(errors.items()):
                    raise ValueError(f"{names[row]} in the target cannot be used: {reason}")
                if encoded is not None:
                    yield encoded, self.target.groups_of(rows), names
                start += rows.num_rows

    def _add(
        self, engine: Engine, batch: Batch, names: Sequence[str], sums: Mapping[str, Tensor]
    ) -> None:
        """Add the rows' gradients, a few at a time where all do not fit in memory."""
        try:
            loss, grads = self._summed(engine, batch)
        except Exception as error:
            if batch.rows == 1 or not is_out_of_memory(error):
                raise
        else:
            self._check(loss, names)
            for name, grad in grads.items():
                sums[name].add_(grad)
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = batch.rows // 2
        for rows in (range(middle), range(middle, batch.rows)):
            self._add(engine, batch.select_rows(rows), [names[r] for r in rows], sums)

    def _summed(self, engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.sketch is None:
            return engine.summed_gradient(batch)
        loss, found = engine.read(batch, self._params(engine, batch), {"sketch": self.sketch})
        return loss, {name: s.sum(0) for name, s in found["sketch"].items()}

    def _check(self, loss: Float[Tensor, " b"], names: Sequence[str]) -> None:
        for row in (~torch.isfinite(loss)).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"{names[row]} in the target cannot be used: its loss is {loss[row].item()}"
            )

    # -- keeping

    def _bytes(self, made: Directions) -> bytes:
        said: dict[str, Any] = {"run": self.work.run, "groups": self.target.groups}
        if self.sketch is not None:
            said["sketch"] = {**asdict(self.sketch), "error": self._error}
        return kept_bytes(made, ENTRY, said)

    def _read(self, name: str) -> Directions:
        found, said = read_gradients(self.folder, name, self.work.run, name not in self._checked)
        self._checked.add(name)
        if (sketch := said.get("sketch")) is not None:
            self.sketch = TwoSidedSketch(sketch["seed"], (sketch["k"][0], sketch["k"][1]))
        return {name: v.to(self.device) for name, v in found.items()}


def read_gradients(
    folder: Folder, name: str, run: str, all_of_it: bool = True
) -> tuple[Directions, dict[str, Any]]:
    """Return the gradients that the run kept, and what it said of them.

    Raises:
        ValueError: the file is of another run, or damaged (`all_of_it`: by its digest).
    """
    return read_kept(folder, name, ENTRY, run, all_of_it)


def sketch_errors(folder: Folder) -> dict[str, float]:
    """Return the measured error of what was sketched, by checkpoint."""
    names = folder.names(f"{FOLDER}/")
    found = {n.removeprefix(f"{FOLDER}/"): said_of(folder, n, ENTRY).get("sketch") for n in names}
    return {n.partition(".")[0]: sketch["error"] for n, sketch in found.items() if sketch}


def _sum_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
